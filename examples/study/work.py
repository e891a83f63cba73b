"""The runs that are missing, trained and measured: in this process, or side by side in several."""

import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Progress
from rich.console import Console
from transformers.utils import logging

from study.config import Decoding, Experiment, Run
from study.measures import generate, held_out, measured, score_all, scorer_of, texts
from study.results import Results, lacks
from study.rewards import correlations
from study.start import Sizes, Start, prepare
from study.tasks import Task
from study.training import fine_tune, pre_train


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

    def missing(self, results: Results, seeds: Sequence[int]) -> Iterator[tuple[Run, int]]:
        """Runs that have not been measured: one after another, each with all its seeds."""
        for run in self.decodings:
            for seed in seeds:
                record = results.read(run, seed)
                if lacks(record, self.decodings[run], run in self.rewards):
                    yield run, seed


class Work(NamedTuple):
    """What all runs have in common.

    Attributes:
        task: makes the data. The data itself would be too much for a pipe, and the second process
            would not start before the first has imported all.
        model: the name of a pre-trained model, None for small ones that are made here.
        sizes: how much is done.
        folder: of the results.
        threads: of a run; None leaves torch as it is.
    """

    task: Callable[[], Task]
    model: str | None
    sizes: Sizes
    folder: Path
    threads: int | None


class Bench:
    """Where one process works: it keeps the initial policies, which are small or the same one."""

    def __init__(self, work: Work) -> None:
        self.work, self.task = work, work.task()
        self.kept: dict[tuple[str, int], Start] = {}
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def start(self, architecture: str, seed: int) -> Start:
        """The initial policy; the first to ask for it pre-trains it, and keeps what that cost."""
        # A pre-trained model is the same for all seeds.
        place = (architecture, seed if self.work.model is None else 0)
        if place not in self.kept:
            task, name, sizes = self.task, self.work.model, self.work.sizes
            saved = self.work.folder / "start" / f"{architecture}-{seed}.pt"
            new, began = not saved.exists(), time.process_time()
            train = partial(pre_train, sizes)
            self.kept[place] = prepare(task, architecture, name, sizes, place[1], saved, train)
            if new and saved.exists():
                cost = {"cpu_seconds": time.process_time() - began}
                saved.with_suffix(".json").write_text(json.dumps(cost), encoding="utf-8")
        return self.kept[place]

    def run(
        self, run: Run, seed: int, decodings: dict[str, Decoding], rewards: bool
    ) -> dict[str, Any]:
        """Train one model and measure all that is asked of it."""
        start, sizes = self.start(run.architecture, seed), self.work.sizes
        began = time.process_time()
        model, curve, seconds = fine_tune(start, run, sizes, seed, partial(held_out, start))
        references = [start.tokenizer.decode(x.answer, skip_special_tokens=True)
                      for x in start.test]  # fmt: skip
        ends = set(start.scorer.ends)
        answers = [*(x["labels"] for x in start.train), *(x.answer for x in start.test)]
        found = {
            "pairs": {
                "train": len(start.train),
                "held_out": len(start.test),
                "cut": sum(x[-1] not in ends for x in answers),
            },
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
        return found | {"cpu_seconds": time.process_time() - began}


_bench: Bench  # of a process that was started for the runs


def _open(work: Work) -> None:
    global _bench
    threading.Thread(target=_watch, daemon=True).start()
    _bench = Bench(work)


def _watch() -> None:
    """End with the process that hands out the runs, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start(architecture: str, seed: int) -> None:
    _bench.start(architecture, seed)


def _run(*given: Any) -> dict[str, Any]:
    return _bench.run(*given)


def run_all(
    wanted: Wanted, results: Results, seeds: Sequence[int], work: Work, jobs: int, console: Console
) -> None:
    """Train and measure what is missing, ``jobs`` runs at a time.

    Each process has ``work.threads`` threads: with one, results don't depend on ``jobs``.
    """
    missing = list(wanted.missing(results, seeds))
    with Progress(console, len(missing)) as progress:

        def keep(run: Run, seed: int, found: dict[str, Any]) -> None:
            results.write(run, seed, found)
            progress.advance()

        if jobs == 1:
            bench = Bench(work)
            for done, (run, seed) in enumerate(missing, start=1):
                progress.phase(f"{done}/{len(missing)} {run.loss}, seed {seed}")
                given = wanted.decodings[run], run in wanted.rewards
                keep(run, seed, bench.run(run, seed, *given))
            return
        fresh = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        pool = ProcessPoolExecutor(min(jobs, len(missing) or 1), fresh, _open, (work,))
        try:
            progress.phase("initial policies")  # each made once, before several ask for it
            starts = dict.fromkeys((run.architecture, seed) for run, seed in missing)
            for made in [pool.submit(_start, *place) for place in starts]:
                made.result()
            for done, (run, seed, found) in enumerate(side_by_side(pool, missing, wanted), 1):
                progress.phase(f"{done}/{len(missing)} {run.loss}, seed {seed}")
                keep(run, seed, found)
        finally:
            pool.shutdown(cancel_futures=True)


def side_by_side(
    pool: Executor, missing: Sequence[tuple[Run, int]], wanted: Wanted
) -> Iterator[tuple[Run, int, dict[str, Any]]]:
    """Runs with what was found, as they end."""
    asked: dict[Future[dict[str, Any]], tuple[Run, int]] = {
        pool.submit(_run, run, seed, wanted.decodings[run], run in wanted.rewards): (run, seed)
        for run, seed in missing
    }
    for ended in as_completed(asked):
        yield *asked[ended], ended.result()
