"""What the tables say, in sentences that are made from the figures."""

from collections.abc import Sequence

from study.config import Decoding, Experiment
from study.results import Mean, Results, mean, of, value_of
from study.tables import NAMES

BETTER = {"nll": min, "accuracy": max, "rouge1": max, "self_bleu": min}
COMPARED = {  # with the baseline: what less of it is called, and what more of it
    "nll": ("lower", "higher"),
    "accuracy_calculator": ("less", "more"),
    "accuracy": ("less", "more"),
    "self_bleu": ("more diverse", "less diverse"),
    "length": ("shorter", "longer"),
}


def sentences(experiment: Experiment, results: Results, seeds: Sequence[int]) -> list[str]:
    """Which run is best by each measure, and whether by more than the errors."""
    said = []
    how = usual(experiment)
    for name in [c for c in experiment.columns if c in BETTER]:
        best = BETTER[name]
        found = {
            label: value
            for label, run in experiment.runs.items()
            if (value := of(results.seeds(run, seeds), name, how)) is not None
        }
        if len(found) < 2:
            continue
        ordered = sorted(found, key=lambda label: found[label][0], reverse=best is max)
        (first, e1), (second, e2) = (found[label] for label in ordered[:2])
        if len(seeds) < 2:
            verdict = "of one seed"
        elif abs(first - second) > 2 * ((e1 or 0) ** 2 + (e2 or 0) ** 2) ** 0.5:
            verdict = "more than two standard errors apart"
        else:
            verdict = "within two standard errors of each other"
        title = {"nll": "NLL", "self_bleu": "Self-BLEU", "rouge1": "ROUGE-1"}.get(name, name)
        said.append(
            f"Best {title}: {ordered[0]} ({first:.3g}), then {ordered[1]} ({second:.3g}), "
            f"{verdict}."
        )
    if "length" in experiment.columns:
        said += lengths(experiment, results, seeds)
    return said + against(experiment, results, seeds)


def against(experiment: Experiment, results: Results, seeds: Sequence[int]) -> list[str]:
    """Which runs differ from the baseline; runs of one seed are compared with each other."""
    if not experiment.baseline or len(seeds) < 2:
        return []
    said = []
    for name in [c for c in experiment.columns if c in COMPARED]:
        below, above = COMPARED[name]
        groups: dict[str, list[str]] = {"like it": [], below: [], above: []}
        for label in experiment.runs:
            found = difference(experiment, results, seeds, label, name)
            if label == experiment.baseline or found is None:
                continue
            middle, error = found
            like = abs(middle) <= 2 * (error or 0)
            group = "like it" if like else below if middle < 0 else above
            groups[group].append(f"*{label}*")
        if any(groups.values()):
            told = "; ".join(f"{how}: {', '.join(them)}" for how, them in groups.items() if them)
            title = NAMES[name][0].upper() + NAMES[name][1:]
            said.append(f"{title} beside *{experiment.baseline}*: {told}.")
    return said


def difference(
    experiment: Experiment, results: Results, seeds: Sequence[int], label: str, name: str
) -> Mean | None:
    """The mean difference from the baseline over the seeds that both have; None below two."""
    how = usual(experiment)
    pairs = [
        (results.read(experiment.runs[label], seed),
         results.read(experiment.runs[experiment.baseline], seed))
        for seed in seeds
    ]  # fmt: skip
    both = [(value_of(a, name, how), value_of(b, name, how)) for a, b in pairs if a and b]
    found = [a - b for a, b in both if a is not None and b is not None]
    return mean(found) if len(found) > 1 else None


def usual(experiment: Experiment) -> str:
    """Plain samples, where they are among the decodings; the others are compared in the plot."""
    names = [how.name for how in experiment.decodings]
    return Decoding().name if Decoding().name in names else names[0]


def lengths(experiment: Experiment, results: Results, seeds: Sequence[int]) -> list[str]:
    """Whose answers are as long as held-out ones, and whose are not."""
    how = usual(experiment)
    records = {
        label: found
        for label, run in experiment.runs.items()
        if (found := results.seeds(run, seeds))
    }
    wanted = next(iter(records.values()))[0]["reference_length"]
    found = {label: of(r, "length", how) for label, r in records.items()}
    means = {label: value[0] for label, value in found.items() if value is not None}
    if len(means) < 2:
        return []
    ordered = sorted(means, key=lambda label: abs(means[label] - wanted))
    near, far = ordered[0], ordered[-1]
    return [
        f"Length nearest to that of held-out answers ({wanted:.1f}): {near} ({means[near]:.1f}); "
        f"furthest: {far} ({means[far]:.1f})."
    ]
