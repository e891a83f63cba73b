"""The quality-diversity study: train, measure, and write tables and plots.

    python examples/run_study.py                         # small: sums in words, a model made here
    python examples/run_study.py --quick                 # a minute, to see that it runs
    python examples/run_study.py --only pareto settings
    python examples/run_study.py --data gsm8k_train.jsonl --test gsm8k_test.jsonl
    python examples/run_study.py --paper --model google/t5-base --data ... --test ...

Every run and seed leaves one JSON file in --out; interrupted, the same command goes on, and a
change of what is reported trains nothing again. What there is to run stands in
examples/study/*.toml.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Progress
from rich.console import Console
from study import page
from study.config import ConfigError, Decoding, Experiment, Run, read
from study.measures import generate, held_out, measured, score_all, scorer_of, texts
from study.results import Results, lacks
from study.rewards import correlations
from study.start import Sizes, Start, prepare
from study.tasks import Task, from_files, synthetic
from study.training import fine_tune, pre_train
from text_data import DataError
from transformers.utils import logging

CONFIGS = Path(__file__).parent / "study"
ORDER = ("pareto", "settings", "decoding", "online", "subsets", "gail", "architectures", "rewards")
SMALL = Sizes(
    start_pairs=1500, train_pairs=400, test_pairs=48, samples=4, vocab_size=640, width=64,
    layers=2, start_steps=400, steps=120, online_steps=60, batch_size=16, learning_rate=1e-3,
    max_length=160, max_new_tokens=80,
)  # fmt: skip
QUICK = Sizes(
    start_pairs=40, train_pairs=24, test_pairs=4, samples=2, vocab_size=300, width=16,
    layers=1, start_steps=4, steps=4, online_steps=2, batch_size=4, learning_rate=1e-3,
    max_length=160, max_new_tokens=8,
)  # fmt: skip
PAPER = Sizes(  # Tables 3 and 4; the number of updates is not given there
    start_pairs=0, train_pairs=10**9, test_pairs=10**9, samples=4, vocab_size=0, width=0,
    layers=0, start_steps=0, steps=20_000, online_steps=20_000, batch_size=32, learning_rate=1e-4,
    max_length=512, max_new_tokens=256,
)  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few updates, to see that it runs")
    size.add_argument("--paper", action="store_true", help="the paper's batches and rates")
    add("--only", nargs="+", choices=ORDER, metavar="NAME", help=f"of {', '.join(ORDER)}")
    add("--data", type=Path, help="JSON lines to train on, such as GSM8k's; default: sums in words")
    add("--test", type=Path, help="JSON lines held out; asked for beside --data")
    add("--model", help="a pre-trained model; default: a small one is made and pre-trained")
    add("--seeds", type=int, default=None, help="default: 3, and 2 with --quick")
    for name in ("steps", "batch_size", "width", "layers", "max_new_tokens", "test_pairs"):
        add(f"--{name.replace('_', '-')}", type=int, help="another number than the size has")
    add("--out", type=Path, help="default: runs/study/NAME, by data, model and size")
    add("--page", type=Path, help="default: study.md in --out; docs/study.md to publish it")
    options = parser.parse_args()
    if (options.data is None) != (options.test is None):
        parser.error("--data and --test: one given; accepted: both, or neither")
    if options.paper and not (options.model and options.data):
        parser.error("--paper: given without --model or --data; accepted: all three")
    options.seeds = options.seeds or (2 if options.quick else 3)
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The size that is asked for, with what was changed of it."""
    sizes = QUICK if options.quick else PAPER if options.paper else SMALL
    changed = {n: v for n in Sizes._fields if (v := getattr(options, n, None)) is not None}
    return sizes._replace(**changed)


def task_of(options: argparse.Namespace, sizes: Sizes) -> Task:
    """The data that is asked for."""
    if options.data is None:
        return synthetic(sizes.start_pairs, sizes.train_pairs, sizes.test_pairs)
    return from_files(options.data, options.test, sizes.train_pairs, sizes.test_pairs)


class Wanted:
    """What has to be measured of each run, over all experiments."""

    def __init__(self, experiments: list[Experiment]) -> None:
        self.decodings: dict[Run, dict[str, Decoding]] = {}
        self.rewards: set[Run] = set()
        for experiment in experiments:
            for run in experiment.runs.values():
                named = {how.name: how for how in experiment.decodings}
                self.decodings.setdefault(run, {}).update(named)
                if experiment.rewards:
                    self.rewards.add(run)


def run_all(
    wanted: Wanted, results: Results, seeds: range, task: Task, name: str | None, sizes: Sizes,
    console: Console,
) -> None:  # fmt: skip
    """Train and measure what is missing; seeds go outermost, so that all runs have the first."""
    pairs = [(seed, run) for seed in seeds for run in wanted.decodings]
    kept: dict[tuple[str, int], Start] = {}
    with Progress(console, len(pairs)) as progress:
        for done, (seed, run) in enumerate(pairs, start=1):
            progress.phase(f"{done}/{len(pairs)} {run.loss}, seed {seed}")
            decodings = wanted.decodings[run]
            if lacks(results.read(run, seed), decodings, run in wanted.rewards):
                place = (run.architecture, seed)
                if place not in kept:
                    kept = {k: v for k, v in kept.items() if k[1] == seed}
                    saved = results.folder / "start" / f"{run.architecture}-{seed}.pt"
                    train = partial(pre_train, sizes)
                    kept[place] = prepare(task, *place[:1], name, sizes, seed, saved, train)
                found = one(kept[place], run, decodings, run in wanted.rewards, sizes, seed, task)
                results.write(run, seed, found)
            progress.advance()


def one(
    start: Start, run: Run, decodings: dict[str, Decoding], rewards: bool, sizes: Sizes, seed: int,
    task: Task,
) -> dict[str, Any]:  # fmt: skip
    """Train one model and measure all that is asked of it."""
    model, curve, seconds = fine_tune(start, run, sizes, seed, partial(held_out, start))
    references = [start.tokenizer.decode(x.answer, skip_special_tokens=True) for x in start.test]
    found = {
        "held_out": held_out(start, model),
        "reference_length": statistics.fmean(len(x.answer) - 1 for x in start.test),
        "curve": curve,
        "seconds": seconds,
        "decodings": {
            name: measured(start, model, how, sizes, seed, references)
            for name, how in decodings.items()
        },
    }
    if rewards:
        groups = generate(start, model, Decoding(), sizes, seed)
        flat = [one for group in groups for one in group]
        scored = iter(score_all(scorer_of(start, model), flat))
        of_groups = [[next(scored) for _ in group] for group in groups]
        found["rewards"] = correlations(of_groups, texts(start, groups), references)
    return found


def shown(arguments: Sequence[str]) -> list[str]:
    """The command line without the places of this machine: no --out and --page, files by name."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--page"):
            next(rest)
        else:
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return kept


def main() -> None:
    """Run what is missing, then write the page."""
    options = parse()
    sizes = sizes_of(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    # A model that is named has the architecture that it has.
    usual = [name for name in ORDER if not (options.model and name == "architectures")]
    experiments = [read(CONFIGS / f"{name}.toml") for name in options.only or usual]
    size = "quick" if options.quick else "paper" if options.paper else "small"
    data = options.data.stem if options.data else "sums"
    model = options.model.replace("/", "_") if options.model else "made"
    out = options.out or Path("runs/study") / f"{size}_{data}_{model}"
    task = task_of(options, sizes)
    made = "small models made here, pre-trained on other pairs of the kind"
    facts = {
        "data": task.name,
        "train": len(task.train),
        "held_out": len(task.test),
        "model": options.model or made,
        "sizes": sizes._asdict(),
    }
    results = Results(out, facts)
    seeds = range(options.seeds)
    run_all(Wanted(experiments), results, seeds, task, options.model, sizes, console)
    target = options.page or out / "study.md"
    command = shlex.join(["python", "examples/run_study.py", *shown(sys.argv[1:])])
    page.write(target, experiments, results, list(seeds), facts, command)
    console.print(f"{target}, from {out}", highlight=False)


if __name__ == "__main__":
    try:
        torch.set_num_threads(torch.get_num_threads())
        main()
    except (ConfigError, DataError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
