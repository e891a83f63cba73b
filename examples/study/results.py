"""Results as files: one JSON for each run and seed, so that an interrupted study goes on."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study.config import Run

Record = dict[str, Any]
Mean = tuple[float, float | None]  # with its standard error


class Results:
    """The folder of a study. It is of one data set, model and size; others are refused."""

    def __init__(self, folder: Path, facts: Record) -> None:
        self.folder = folder
        path = folder / "facts.json"
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for name, value in facts.items():
                if earlier.get(name) != json.loads(json.dumps(value)):
                    raise ValueError(
                        f"{folder} holds results with {name}={earlier.get(name)!r}, not {value!r}; "
                        "accepted: the same, or another --out"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def path(self, run: Run, seed: int) -> Path:
        """Where the results of a run are."""
        return self.folder / run.key / f"seed-{seed}.json"

    def read(self, run: Run, seed: int) -> Record | None:
        """The results of a run, None where there are none yet."""
        path = self.path(run, seed)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, run: Run, seed: int, found: Record) -> None:
        """Keep the results of a run; the file is whole or absent."""
        path = self.path(run, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"run": dataclasses.asdict(run), "seed": seed, **found}
        half = path.with_suffix(".half")
        half.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        half.replace(path)

    def seeds(self, run: Run, seeds: Iterable[int]) -> list[Record]:
        """Those of the seeds that are there."""
        return [found for seed in seeds if (found := self.read(run, seed)) is not None]

    def cpu_seconds(self, runs: Iterable[Run], seeds: Sequence[int]) -> float:
        """What runs took, and the initial policies that they begin with."""
        runs = set(runs)
        found = [r["cpu_seconds"] for run in runs for r in self.seeds(run, seeds)]
        for architecture in {run.architecture for run in runs}:
            for seed in seeds:
                path = self.folder / "start" / f"{architecture}-{seed}.json"
                if path.exists():
                    found.append(json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"])
        return math.fsum(found)


def lacks(record: Record | None, decodings: Iterable[str], rewards: bool) -> bool:
    """Whether something that is asked for has not been measured."""
    if record is None or (rewards and "rewards" not in record):
        return True
    return not set(decodings) <= record["decodings"].keys()


def mean(values: Sequence[float]) -> Mean:
    """The mean and its standard error, which one value has not."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def of(records: Sequence[Record], name: str, decoding: str) -> Mean | None:
    """A metric by its name over the seeds; None where it was not measured."""
    found = [value_of(record, name, decoding) for record in records]
    values = [value for value in found if value is not None]
    return mean(values) if values else None


def value_of(record: Record, name: str, decoding: str) -> float | None:
    """A metric of one run and seed, None where it was not measured."""
    value: float | None = {**record["held_out"], **record["decodings"].get(decoding, {})}.get(name)
    return value
