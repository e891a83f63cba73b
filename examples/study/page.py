"""docs/study.md: what ran, with tables and plots, made from the results.

What somebody has written between two marks of an earlier page is kept.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study.config import Experiment
from study.findings import sentences
from study.plots import draw
from study.results import Results
from study.tables import rewards_table, table

BY_HAND = "<!-- by hand: kept when the page is written anew -->", "<!-- end -->"


def write(
    page: Path, experiments: Sequence[Experiment], results: Results, seeds: Sequence[int],
    facts: dict[str, Any], command: str,
) -> None:  # fmt: skip
    """The page, with its figures in a folder of its name beside it.

    Args:
        page: where it goes.
        experiments: what is reported; those without results are named as not run.
        results: where they are.
        seeds: what means are over.
        facts: of the whole study.
        command: what made it.
    """
    kept = by_hand(page)
    folder = page.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cost = results.cpu_seconds((run for one in experiments for run in one.runs.values()), seeds)
    parts = ["# The study", opening(facts, seeds, command, cost),
             fitting(experiments, results, seeds, facts), kept]  # fmt: skip
    for experiment in experiments:
        beside = f"Beside the paper's {experiment.paper}. " if experiment.paper else ""
        parts += [f"## {experiment.title}", beside +
                  experiment.says]  # fmt: skip
        if not any(results.seeds(run, seeds) for run in experiment.runs.values()):
            parts.append("Not run.")
            continue
        parts.append(table(experiment, results, seeds))
        parts.append("\n".join(f"- {line}" for line in sentences(experiment, results, seeds)))
        if experiment.plot:
            draw(experiment, results, seeds, folder / f"{experiment.name}.png")
            parts.append(f"![{experiment.title}]({folder.name}/{experiment.name}.png)")
        if experiment.rewards:
            parts += [rewards_table(experiment, results, seeds),
                      telescoping(experiment, results, seeds)]  # fmt: skip
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def by_hand(page: Path) -> str:
    """What stands between the marks of an earlier page, with them."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    first, last = BY_HAND
    if first not in text:
        return ""
    return first + text.partition(first)[2].partition(last)[0] + last


def opening(facts: dict[str, Any], seeds: Sequence[int], command: str, cost: float) -> str:
    """What ran, and how to read it."""
    sizes = facts["sizes"]
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"""\
Quality beside diversity for maximum likelihood, entropy-regularised maximum likelihood, offline and
online IQLearn and GAIL. This page is written by

    {command}

(`make study` is the same with an environment for it), from results that it leaves in a folder,
one JSON file for each run and seed; interrupted, it goes on. Each table is a file in
`examples/study/`, where its runs stand. All of it took {cost / 60:.0f} minutes of CPU time;
runs go side by side, one on each core.

What ran: {facts["data"]}; {facts["model"]}. {facts["train"]} pairs to train on and
{facts["held_out"]} held out, {sizes["steps"]} updates of {sizes["batch_size"]} pairs
({sizes["online_steps"]} for GAIL, after those of maximum likelihood); {sizes["samples"]} answers to
each held-out question, {count}. Figures are means over the seeds ± their standard error.
NLL, entropy and TD² are means over the tokens of held-out answers; TD² is that at γ = 1, whatever
the run was trained with, and of a value head where there is one. Lower Self-BLEU is more diverse,
but Self-BLEU moves with the length of answers too: compare runs of like length. Beside a baseline,
runs are compared seed by seed, as those of a seed begin with the same initial policy: they are
"like it" where the mean difference is within two of its standard errors, which so few seeds tell
only roughly. At most
{sizes["max_new_tokens"]} tokens are generated; "unfinished" answers have no end token by then.

At this size the tables show how the comparison is made; they decide nothing about models of another
size."""


def fitting(
    experiments: Sequence[Experiment], results: Results, seeds: Sequence[int], facts: dict[str, Any]
) -> str:
    """How many pairs were too long, where any were."""
    runs = {run for one in experiments for run in one.runs.values()}
    pairs = [r["pairs"] for run in runs for r in results.seeds(run, seeds) if "pairs" in r]
    if not pairs:
        return ""
    train, held_out, cut = (min(x[n] for x in pairs) for n in ("train", "held_out", "cut"))
    if (train, held_out, cut) == (facts["train"], facts["held_out"], 0):
        return ""
    return (
        f"{train} questions to train on and {held_out} held out left room for an answer within "
        f"{facts['sizes']['max_length']} tokens; {cut} of the answers were cut there."
    )


def telescoping(experiment: Experiment, results: Results, seeds: Sequence[int]) -> str:
    """That rewards at gamma = 1 sum to log pi + V(start)."""
    found = [
        record["rewards"]
        for run in experiment.runs.values()
        for record in results.seeds(run, seeds)
        if "rewards" in record
    ]
    if not found:
        return ""
    worst = max(one["telescoping"] for one in found)
    count = sum(one["finished"] for one in found)
    return (
        f"At γ = 1 the rewards of all {count} finished answers summed to their log-likelihood plus "
        f"V(start), to {worst:.1e} at worst: within a prompt, summed rewards at γ = 1 rank as "
        "likelihood does."
    )
