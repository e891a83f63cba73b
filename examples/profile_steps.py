"""Table 1 of the paper: what does an update cost with each system, as a ratio of MLE's?

    python examples/profile_steps.py                  # on a CPU: the shapes of T5, divided by 4
    python examples/profile_steps.py --device cuda    # whole
    python examples/profile_steps.py --quick          # seconds, to see that it runs
    python examples/profile_steps.py --only shares    # where the time goes, and no Table 1
    python examples/profile_steps.py --page docs/systems.md   # put the tables there

Prints tables for each shape and in Markdown, and writes every time to a JSON file under
benchmarks/results/. Times are of a quiet machine or they say nothing: the load is written beside
them. Shares of an update's time, from a profile of updates of their own, mind the load less.

Random weights and tokens; the trainers are the library's own, and the time of an update is what
they take between two callbacks, sampling apart. The systems take turns, in an order drawn anew in
each round, on copies of the same weights.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import write_json
from rich import box
from rich.console import Console
from rich.table import Table
from step_shares import PARTS
from step_shares import measure as measure_shares
from transformers import (
    PrinterCallback,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from irl_ops.integrations.transformers import (
    GAILArguments,
    GAILTrainer,
    OnlineIQLearnArguments,
    OnlineIQLearnTrainer,
    apply_iqlearn,
)


class Shape(NamedTuple):
    """A T5 as published, and what the paper measured with it (Table 1), in milliseconds."""

    width: int
    inner: int
    key: int
    heads: int
    layers: int
    batch: int
    paper: dict[str, float]


SHAPES = {
    "base": Shape(768, 3072, 64, 12, 12, 32,
                  {"MLE": 189, "GAIL": 451, "IQLearn": 196, "sampling": 443}),
    "large": Shape(1024, 4096, 64, 16, 24, 32,
                   {"MLE": 422, "GAIL": 1064, "IQLearn": 606, "sampling": 1345}),
    "xl": Shape(1024, 16384, 128, 32, 24, 16,
                {"MLE": 1031, "GAIL": 1410, "IQLearn": 1355, "sampling": 1823}),
}  # fmt: skip
MARKS = {"times": "<!-- profile-steps -->", "shares": "<!-- profile-shares -->"}  # of a page
END = "<!-- end -->"
SYSTEMS = ("MLE", "offline IQLearn", "online IQLearn", "GAIL")
PAPERS = {"offline IQLearn": "IQLearn", "online IQLearn": "IQLearn", "GAIL": "GAIL",
          "sampling": "sampling"}  # fmt: skip


class Size(NamedTuple):
    """How large the batches and the vocabulary are, and how often it is measured."""

    batch: int
    prompt: int
    answer: int
    vocab: int
    rounds: int
    updates: int  # timed in each round, after one that warms up


class Rows(torch.utils.data.Dataset):
    """Random questions and answers of one length, that end in the end token."""

    def __init__(self, size: Size, number: int) -> None:
        self.size, self.number = size, number

    def __len__(self) -> int:
        """How many there are."""
        return self.number

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        """The same row each time for the same number."""
        draw = torch.Generator().manual_seed(i)
        prompt, answer = (
            torch.randint(2, self.size.vocab, (n,), generator=draw).tolist()
            for n in (self.size.prompt, self.size.answer - 1)
        )
        return {"input_ids": prompt, "labels": [*answer, 1]}


class Pads:
    """What the collator asks of a tokenizer."""

    padding_side = "right"
    pad_token_id = 0

    def pad(self, rows: dict[str, Any] | list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        """All rows have one length."""
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


class Clock(TrainerCallback):
    """The time of every update, without what comes before it."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batch is there."""
        self.began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        self.milliseconds.append(1e3 * (now() - self.began))


def now() -> float:
    """The time, once the device has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def t5(shape: Shape, scale: int, vocab: int, dtype: torch.dtype) -> T5ForConditionalGeneration:
    """A T5 whose widths, heads and layers are divided by ``scale``."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab,
        d_model=shape.width // scale,
        d_ff=shape.inner // scale,
        d_kv=shape.key,
        num_heads=max(1, shape.heads // scale),
        num_layers=max(1, shape.layers // scale),
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def trainer_of(system: str, model: T5ForConditionalGeneration, size: Size, device: str) -> Trainer:
    """The trainer of a system, for one round."""
    common: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "max_steps": size.updates + 1,
        "per_device_train_batch_size": size.batch,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": device == "cpu",
    }
    sampled = {"max_new_tokens": size.answer, "sample_batch_size": size.batch}
    data: dict[str, Any] = {
        "train_dataset": Rows(size, size.batch * (size.updates + 1)),
        "data_collator": Pads().pad,
    }
    if system == "MLE":
        return Trainer(model, TrainingArguments(**common), **data)
    if system == "offline IQLearn":
        model = apply_iqlearn(model, lam=0.1, eos_token_id=1)
        return Trainer(model, TrainingArguments(**common), **data)
    if system == "online IQLearn":
        return OnlineIQLearnTrainer(model, OnlineIQLearnArguments(**common, **sampled), **data)
    return GAILTrainer(model, GAILArguments(**common, **sampled), **data)


def measure(model: T5ForConditionalGeneration, size: Size, device: str) -> dict[str, list[float]]:
    """Milliseconds of updates by system, and of sampling one batch."""
    found: dict[str, list[float]] = {name: [] for name in ("MLE", *PAPERS)}
    order = random.Random(0)
    for _ in range(size.rounds):
        for system in order.sample(SYSTEMS, len(SYSTEMS)):
            clock = Clock()
            trainer = trainer_of(system, copy.deepcopy(model), size, device)
            trainer.add_callback(clock)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found[system] += clock.milliseconds[1:]  # the first warms up
            if system == "online IQLearn":
                seconds = trainer.seconds["sampling_seconds"]
                found["sampling"].append(1e3 * seconds / (size.updates + 1))
            del trainer
    return found


def profiled(model: T5ForConditionalGeneration, size: Size, device: str) -> dict[str, Any]:
    """Milliseconds of an update by system and part."""
    found = {}
    for system in SYSTEMS:
        trainer = trainer_of(system, copy.deepcopy(model), size, device)
        trainer.remove_callback(PrinterCallback)
        found[system] = measure_shares(trainer, size.updates)
    return found


def main() -> None:
    """Measure the shapes that the command line names; print and write the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--quick", action="store_true", help="the smallest of all, once; its times say nothing")
    add("--shapes", nargs="+", choices=SHAPES, help="default: all")
    add("--scale", type=int, help="divide widths, heads, layers, batch and vocabulary; default: 1 "
        "on a GPU, 4 on a CPU")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--batch", type=int, help="default: the paper's, divided")
    add("--prompt", type=int, help="tokens of a question; default: 256 on a GPU, 64 on a CPU")
    add("--answer", type=int, help="tokens of an answer; default: 128 on a GPU, 64 on a CPU")
    add("--vocab", type=int, help="default: 32128, divided")
    add("--rounds", type=int, help="default: 3")
    add("--updates", type=int, help="timed in each round; default: 3")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    add("--only", choices=MARKS, help="times of updates, or the shares of their parts; default: "
        "both")  # fmt: skip
    add("--out", type=Path, help="default: benchmarks/results/profile-steps-DEVICE.json")
    add("--page", type=Path, help="put the Markdown tables between the marks of this file")
    options = parser.parse_args()
    gpu, quick = options.device == "cuda", options.quick
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    scale = options.scale or (16 if quick else 1 if gpu else 4)
    tokens = (8, 8) if quick else (256, 128) if gpu else (64, 64)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, results = Console(), {name: {} for name in MARKS if options.only in (None, name)}
    for name in options.shapes or (["base"] if quick else list(SHAPES)):
        shape = SHAPES[name]
        size = Size(
            options.batch or max(1, shape.batch // scale), options.prompt or tokens[0],
            options.answer or tokens[1], options.vocab or 32128 // scale,
            options.rounds or (1 if quick else 3), options.updates or (1 if quick else 3),
        )  # fmt: skip
        model = t5(shape, scale, size.vocab, dtype)
        about = {"size": size._asdict(), "parameters": model.num_parameters()}
        title = f"T5-{name}" + (f", divided by {scale}" if scale > 1 else "")
        title += f": {model.num_parameters() / 1e6:.1f} M parameters"
        if "times" in results:
            times = measure(model, size, options.device)
            results["times"][name] = about | {"milliseconds": times}
            console.print(table(title, shape, times))
        if "shares" in results:
            parts = profiled(model, size, options.device)
            results["shares"][name] = about | {"milliseconds": parts}
            console.print(shares_table(title, parts))
    device = torch.cuda.get_device_name() if gpu else platform.machine()
    facts = {"device": device, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
             "dtype": str(dtype).removeprefix("torch."), "scale": scale}  # fmt: skip
    file = f"profile-steps-{device.lower().replace(' ', '-') if gpu else 'cpu'}.json"
    folder = Path("runs" if quick else "benchmarks/results")
    out = options.out or folder / file
    out.parent.mkdir(parents=True, exist_ok=True)
    # What was not measured this time stays as it was.
    kept = json.loads(out.read_text(encoding="utf-8")) if options.only and out.exists() else {}
    texts = {}
    if "times" in results:
        kept |= {**facts, "shapes": results["times"]}
        texts["times"] = markdown(facts, results["times"])
    if "shares" in results:
        kept["shares"] = {**facts, "shapes": results["shares"]}
        texts["shares"] = markdown_of_shares(facts, results["shares"])
    write_json(out, kept)
    for what, text in texts.items():
        console.print(f"\n{text}\n", markup=False, highlight=False, soft_wrap=True)
        if options.page:
            put(options.page, MARKS[what], text)
    console.print(str(out), highlight=False)


def table(title: str, shape: Shape, times: dict[str, list[float]]) -> Table:
    """Medians, and their ratios to MLE's beside the paper's."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for header in ("update", "ms", "of MLE's", "in the paper"):
        made.add_column(header, justify="left" if header == "update" else "right")
    mle = statistics.median(times["MLE"])
    for system, series in times.items():
        middle = statistics.median(series)
        paper = shape.paper.get(PAPERS.get(system, "MLE"), 0) / shape.paper["MLE"]
        made.add_row(system, f"{middle:.1f}", f"{middle / mle:.2f}", f"{paper:.2f}")
    return made


def markdown(facts: dict[str, Any], results: dict[str, Any]) -> str:
    """One column for each shape: a ratio to MLE's median, and the paper's."""
    ratios = {}
    for name, found in results.items():
        times, paper = found["milliseconds"], SHAPES[name].paper
        mle = statistics.median(times["MLE"])
        ratios[name] = {"MLE": f"{mle:.0f} ms ({paper['MLE']:.0f} ms)"} | {
            system: f"{statistics.median(times[system]) / mle:.2f} ({beside / paper['MLE']:.2f})"
            for system, key in PAPERS.items()
            for beside in [paper[key]]
        }
    header = ["of MLE's update (the paper's)", *(
        f"T5-{name}, {found['parameters'] / 1e6:.1f} M" for name, found in results.items()
    )]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    lines += [[system, *(one[system] for one in ratios.values())] for system in ("MLE", *PAPERS)]
    size = next(iter(results.values()))["size"]
    counted = f"medians of {size['rounds'] * size['updates']} updates"
    return rows_of(lines) + f"\n\n{conditions(facts, results)}; {counted}."


def shares_table(title: str, parts: dict[str, dict[str, float]]) -> Table:
    """The percentage of an update that each part takes."""
    made = Table(title=title, box=box.SIMPLE_HEAD)
    for header in ("% of an update", *parts):
        made.add_column(header, justify="left" if header == "% of an update" else "right")
    for line in shares_lines(parts):
        made.add_row(*line)
    return made


def shares_lines(parts: dict[str, dict[str, float]]) -> list[list[str]]:
    """A line for each part that any system has."""
    totals = {system: sum(found.values()) for system, found in parts.items()}
    return [
        [part, *(f"{100 * found[part] / totals[system]:.1f}" if found[part] else ""
                 for system, found in parts.items())]
        for part in PARTS
    ]  # fmt: skip


def markdown_of_shares(facts: dict[str, Any], results: dict[str, Any]) -> str:
    """The shares with the largest shape that was measured."""
    name, found = list(results.items())[-1]
    header = [f"% of an update of T5-{name}, {found['parameters'] / 1e6:.1f} M",
              *found["milliseconds"]]  # fmt: skip
    lines = [header, ["---"] * len(header), *shares_lines(found["milliseconds"])]
    counted = f"{found['size']['updates']} updates under torch.profiler"
    return rows_of(lines) + f"\n\n{conditions(facts, {name: found})}; {counted}."


def rows_of(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(facts: dict[str, Any], results: dict[str, Any]) -> str:
    """On what, and with what, it was measured."""
    size = next(iter(results.values()))["size"]
    return (
        f"{facts['device']}, {facts['threads']} threads, {facts['dtype']}; "
        f"load {facts['load']:.1f}; "
        + (f"shapes and vocabulary divided by {facts['scale']}; " if facts["scale"] > 1 else "")
        + f"{size['prompt']} tokens of a question and {size['answer']} of an answer, batches of "
        + ", ".join(str(found["size"]["batch"]) for found in results.values())
    )


def put(page: Path, first: str, text: str) -> None:
    """Replace what stands between that mark of a page and the next end.

    Raises:
        ValueError: they are not there.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"--page {page}: no {first} ... {END} in it; accepted: a page with both")
    page.write_text(f"{before}{first}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
