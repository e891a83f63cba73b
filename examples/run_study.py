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
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from study import page
from study.config import ConfigError, read
from study.results import Results
from study.start import Sizes
from study.tasks import Task, from_files, synthetic
from study.work import Wanted, Work, run_all
from text_data import DataError

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
    for name in ("train_pairs", "test_pairs", "start_steps", "steps", "online_steps", "batch_size",
                 "width", "layers", "vocab_size", "max_length", "max_new_tokens"):  # fmt: skip
        add(f"--{name.replace('_', '-')}", type=int, help="another number than the size has")
    add("--jobs", type=int, help="runs side by side, of one thread each; default: one a core of a "
        "CPU for small models that are made here, else 1")  # fmt: skip
    add("--out", type=Path, help="default: runs/study/NAME, by data, model and size")
    add("--page", type=Path, help="default: study.md in --out; docs/study.md to publish it")
    options = parser.parse_args()
    if (options.data is None) != (options.test is None):
        parser.error("--data and --test: one given; accepted: both, or neither")
    if options.paper and not (options.model and options.data):
        parser.error("--paper: given without --model or --data; accepted: all three")
    options.seeds = options.seeds or (2 if options.quick else 3)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} given; accepted: at least 1")
    small = options.model is None and not torch.cuda.is_available()
    options.jobs = options.jobs or (torch.get_num_threads() if small and not options.quick else 1)
    # A small model gains nothing from a second thread.
    options.threads = 1 if small or options.jobs > 1 else None
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


def shown(arguments: Sequence[str]) -> list[str]:
    """The command line without what changes no figure and names a place of this machine."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--page", "--jobs"):
            next(rest)
        else:
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return kept


def main() -> None:
    """Run what is missing, then write the page."""
    options = parse()
    sizes = sizes_of(options)
    console = Console()
    # A model that is named has the architecture that it has.
    usual = [name for name in ORDER if not (options.model and name == "architectures")]
    experiments = [read(CONFIGS / f"{name}.toml") for name in options.only or usual]
    size = "quick" if options.quick else "paper" if options.paper else "small"
    data = options.data.stem if options.data else "sums"
    model = options.model.replace("/", "_") if options.model else "made"
    out = options.out or Path("runs/study") / f"{size}_{data}_{model}"
    task = task_of(options, sizes)
    other = "other pairs of the kind" if options.data is None else "the training data"
    made = f"small models made here, pre-trained on {other}"
    facts = {
        "data": task.name,
        "train": len(task.train),
        "held_out": len(task.test),
        "model": options.model or made,
        "sizes": sizes._asdict(),
    }
    results = Results(out, facts)
    seeds = range(options.seeds)
    work = Work(partial(task_of, options, sizes), options.model, sizes, out, options.threads)
    run_all(Wanted(experiments), results, seeds, work, options.jobs, console)
    target = options.page or out / "study.md"
    command = shlex.join(["python", "examples/run_study.py", *shown(sys.argv[1:])])
    told = facts | {"model": shown([facts["model"]])[0]}
    page.write(target, experiments, results, list(seeds), told, command)
    console.print(f"{target}, from {out}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
