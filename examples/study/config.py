"""What the study runs: one TOML file for each table or figure.

A file has a title, the columns of its table, its plot, how answers are decoded, and runs. Where a
run's setting is a list, there is one run for each of its values.
"""

import dataclasses
import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LOSSES = ("mle", "iqlearn", "online", "gail")
ARCHITECTURES = ("decoder", "encoder-decoder")


class ConfigError(ValueError):
    """A file that cannot be used: says which and why."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning, apart from its seed.

    Attributes:
        loss: "mle", "iqlearn" (offline), "online" (IQLearn with samples) or "gail".
        lam: weight of the TD term.
        gamma: discount.
        entropy_coef: weight of the entropy of demonstrations (Eq. 18).
        z_loss: weight of V² of the logits.
        boundary: what follows a document without an end token.
        value_head: V from a head of its own (A.1.1), not from the logits.
        kl: weight of the KL to the initial policy, on demonstrations.
        warmup: share of the updates that are maximum likelihood first.
        anneal: share of the updates at the end over which lam falls to 0.
        alpha: mix-in of samples, of "online".
        mle_weight: of "gail".
        subset: share of the training data.
        architecture: "decoder" or "encoder-decoder".
    """

    loss: str = "mle"
    lam: float = 0.0
    gamma: float = 1.0
    entropy_coef: float = 0.0
    z_loss: float = 0.0
    boundary: str = "terminal"
    value_head: bool = False
    kl: float = 0.0
    warmup: float = 0.1
    anneal: float = 0.0
    alpha: float = 0.0
    mle_weight: float = 0.0
    subset: float = 1.0
    architecture: str = "decoder"

    @property
    def key(self) -> str:
        """A name for its folder, the same for the same settings."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.loss}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Decoding(NamedTuple):
    """How answers are drawn: sampled, or the best of a beam."""

    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 1

    @property
    def name(self) -> str:
        """Such as "T=0.5", "top-p 0.9" or "beam 4"."""
        if self.beams > 1:
            return f"beam {self.beams}"
        if self.top_p < 1:
            return f"top-p {self.top_p:g}"
        return f"T={self.temperature:g}"


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

    name: str
    title: str
    paper: str  # what it stands beside
    says: str  # how to read it
    runs: dict[str, Run]  # by label
    decodings: list[Decoding]
    columns: list[str]
    plot: dict[str, str] = field(default_factory=dict)
    baseline: str = ""  # the label of the run that others are compared with
    rewards: bool = False  # correlate rewards with the task's metrics


def read(path: Path) -> Experiment:
    """Read one file.

    Raises:
        ConfigError: a setting that is unknown, or a value that is not accepted.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    known = {f.name for f in dataclasses.fields(Experiment)} - {"name"}
    if unknown := set(given) - known:
        raise ConfigError(f"{path}: {sorted(unknown)} given; accepted: {sorted(known)}")
    try:
        runs = dict(pair for entry in given["runs"] for pair in expand(entry))
        decodings = [Decoding(**one) for one in given.get("decodings", [{}])]
        baseline = given.get("baseline", "")
        if baseline and baseline not in runs:
            raise ConfigError(f"baseline={baseline!r}; accepted: a label, of {', '.join(runs)}")
        return Experiment(
            path.stem, given["title"], given["paper"], given["says"], runs, decodings,
            given["columns"], given.get("plot", {}), baseline, given.get("rewards", False),
        )  # fmt: skip
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def expand(entry: dict[str, Any]) -> list[tuple[str, Run]]:
    """One run for each combination of the values that are lists, with its label."""
    entry = dict(entry)
    label = entry.pop("label")
    known = {f.name for f in dataclasses.fields(Run)}
    if unknown := set(entry) - known:
        raise ConfigError(f"run {label!r}: {sorted(unknown)} given; accepted: {sorted(known)}")
    values = [value if isinstance(value, list) else [value] for value in entry.values()]
    found = []
    for combination in itertools.product(*values):
        run = Run(**dict(zip(entry, combination, strict=True)))
        if run.loss not in LOSSES or run.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"run {label!r}: loss={run.loss!r}, architecture={run.architecture!r}; accepted: "
                f"{', '.join(LOSSES)}; {', '.join(ARCHITECTURES)}"
            )
        found.append((label.format(**dataclasses.asdict(run)), run))
    return found
