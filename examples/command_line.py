"""The command line of the demos: what is compared, how much is done, and where it is written."""

import argparse
import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from text_data import ACCEPTED

RESULTS = ("report.png", "results.json", "samples.json", "models")  # what a run writes


class Sizes(NamedTuple):
    """How much is done."""

    vocab_size: int
    hidden_size: int
    layers: int
    start_steps: int  # of the pre-training
    steps: int  # of each fine-tuning run
    held_out: int  # pairs, at most
    prompts: int  # of the held-out pairs, to sample from
    samples: int  # of each prompt
    max_new_tokens: int


def parse(
    description: str | None,
    *,
    full: Sizes,
    quick: Sizes,
    lams: Sequence[float],
    out: Path,
    head_lams: Sequence[float] | None = None,
) -> tuple[argparse.Namespace, Sizes]:
    """Read the command line.

    Args:
        description: what ``--help`` says first.
        full: how much is done by default.
        quick: how much is done with ``--quick``.
        lams: default of ``--lams``.
        out: the folder in which each comparison gets a folder of its own.
        head_lams: default of ``--head-lams`` where ``--lams`` is not given; None: no such option.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=ACCEPTED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="text to fine-tune on; default: pydoc's topics")
    add(
        "--lams",
        type=float,
        nargs="+",
        metavar="LAM",
        help="weights of the TD term, one run for each; 0 is maximum likelihood; "
        f"default: {' '.join(f'{lam:g}' for lam in lams)}",
    )
    if head_lams is not None:
        add(
            "--head-lams",
            type=float,
            nargs="*",
            metavar="X",
            help="the same with a value head; "
            f"default: {' '.join(f'{lam:g}' for lam in head_lams)}, and none beside --lams",
        )
    add("--gamma", type=float, default=1.0, help="discount of the next value; default: 1")
    add(
        "--steps",
        type=int,
        help=f"of each fine-tuning run; default: {full.steps}. The pre-training has "
        f"{full.start_steps / full.steps:g} times as many",
    )
    add("--seed", type=int, default=0, help="of the weights, the batches, the samples; default: 0")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"where the results go; default: a new folder in {out}, named after data and losses",
    )
    add("--overwrite", action="store_true", help="replace the results that --out already holds")
    add("--save-models", action="store_true", help="keep the fine-tuned models, in OUT/models")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that it runs")
    options = parser.parse_args()
    if head_lams is None or options.head_lams is None:
        options.head_lams = list(head_lams or ()) if options.lams is None else []
    else:
        options.heads_asked = True
    options.lams = list(lams) if options.lams is None else options.lams
    if not all(0 <= lam < math.inf for lam in options.lams):
        parser.error(f"--lams: {options.lams} given, finite numbers from 0 up are accepted")
    if len(set(options.lams)) < len(options.lams):
        parser.error(f"--lams: {options.lams} given, distinct numbers are accepted")
    if not all(0 < lam < math.inf for lam in options.head_lams):
        parser.error(f"--head-lams: {options.head_lams} given, finite numbers above 0 are accepted")
    if len(set(options.head_lams)) < len(options.head_lams):
        parser.error(f"--head-lams: {options.head_lams} given, distinct numbers are accepted")
    if not 0 <= options.gamma <= 1:
        parser.error(f"--gamma: {options.gamma} given, a number from 0 to 1 is accepted")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps} given, a number from 1 up is accepted")
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} given, which is a file; a folder is accepted")
    if options.out and not options.overwrite and (held := results_in(options.out)):
        parser.error(
            f"--out: {options.out} holds {', '.join(held)} of an earlier run; accepted are another "
            "folder, or --overwrite beside it"
        )
    options.parent = out
    return options, scaled(quick if options.quick else full, options.steps)


def scaled(sizes: Sizes, steps: int | None) -> Sizes:
    """Take another number of fine-tuning steps, and pre-train for longer or shorter in proportion.

    Without this, a look at the demo with few steps would be a long pre-training.
    """
    if steps is None:
        return sizes
    start_steps = max(1, round(sizes.start_steps * steps / sizes.steps))
    return sizes._replace(steps=steps, start_steps=start_steps)


def results_in(folder: Path) -> list[str]:
    """Name what an earlier run left in a folder."""
    return [name for name in RESULTS if (folder / name).exists()]


def run_name(options: argparse.Namespace) -> str:
    """Name a comparison after its data and its losses."""
    data = options.data.stem if options.data else "pydoc"
    lams = "-".join(f"{lam:g}" for lam in options.lams)
    if "heads_asked" in options:
        lams += "_head-" + "-".join(f"{lam:g}" for lam in options.head_lams)
    return f"{data}_lam-{lams}_gamma-{options.gamma:g}"


@contextlib.contextmanager
def run_folder(options: argparse.Namespace, console: Console) -> Iterator[Path]:
    """Make the folder of a run: the one asked for, or a new one named after data and losses.

    It is made before the work begins, so that two runs at a time do not take the same one, and
    taken away again if the run leaves nothing in it.
    """
    folder: Path = options.out or options.parent / run_name(options)
    made = not folder.exists() or not options.out
    if options.out:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(folder)
        if folder.name != run_name(options):
            console.print(f"results of an earlier run are kept; these go to {folder}")
    try:
        yield folder
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def new_folder(wanted: Path) -> Path:
    """Make a folder that was not there before, with a number behind its name where need be."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
