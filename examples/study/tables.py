"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from study.config import Experiment
from study.results import Mean, Results, mean, of

NAMES = {
    "nll": "NLL",
    "entropy": "entropy",
    "td": "TD²",
    "accuracy": "accuracy %",
    "accuracy_calculator": "with calculator %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeLsum": "ROUGE-Lsum",
    "self_bleu": "Self-BLEU",
    "length": "length",
    "unfinished": "unfinished %",
}
DIGITS = {"nll": 3, "entropy": 2, "td": 2}


def cell(found: Mean | None, digits: int) -> str:
    """A mean with its standard error; nothing where there is none."""
    if found is None:
        return ""
    middle, error = found
    return f"{middle:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(experiment: Experiment, results: Results, seeds: Sequence[int]) -> str:
    """One row for each run and decoding."""
    many = len(experiment.decodings) > 1
    header = ["run", *(["decoding"] if many else []), *(NAMES[c] for c in experiment.columns)]
    rows = []
    for label, run in experiment.runs.items():
        records = results.seeds(run, seeds)
        if not records:
            rows.append([f"{label} (not run)", *[""] * (len(header) - 1)])
            continue
        for how in experiment.decodings:
            cells = [
                cell(of(records, name, how.name), DIGITS.get(name, 1))
                for name in experiment.columns
            ]
            rows.append([label, *([how.name] if many else []), *cells])
    if "length" in experiment.columns and rows:
        first = next(r for run in experiment.runs.values() for r in results.seeds(run, seeds))
        length = f"{first['reference_length']:.1f}"
        cells = [length if name == "length" else "" for name in experiment.columns]
        rows.append(["*held-out answers*", *([""] if many else []), *cells])
    return markdown(header, rows)


def rewards_table(experiment: Experiment, results: Results, seeds: Sequence[int]) -> str:
    """Spearman's correlations: over all answers, and within prompts."""
    header = ["run", "score", "γ"]
    metrics = {"accuracy": "accuracy", "rouge1": "ROUGE-1"}
    header += [f"{name}, {how}" for name in metrics.values() for how in ("all", "per prompt")]
    rows = []
    for label, run in experiment.runs.items():
        records = [r for r in results.seeds(run, seeds) if "rewards" in r]
        if not records:
            continue
        for place in range(0, len(records[0]["rewards"]["rows"]), len(metrics)):
            first = records[0]["rewards"]["rows"][place]
            if first["score"] == "discounted" and first["gamma"] == 1:
                continue  # as summed
            cells = [
                cell(_mean_of(records, place + offset, how), 2)
                for offset in range(len(metrics))
                for how in ("all", "per_prompt")
            ]
            gamma = "" if first["gamma"] is None else f"{first['gamma']:g}"
            rows.append([label, first["score"], gamma, *cells])
    return markdown(header, rows)


def _mean_of(records: Sequence[Any], place: int, how: str) -> Mean | None:
    values = [r["rewards"]["rows"][place][how] for r in records]
    values = [x for x in values if x is not None]
    return mean(values) if values else None
