"""``irl-ops score``, from the data's lines to the files and the pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from irl_ops.score import picture
from irl_ops.score.batches import by_length
from irl_ops.score.lines import BadLineError, Fields, Line, item, lines
from irl_ops.score.loading import LoadError, load
from irl_ops.score.outputs import BadLines, OtherRunError, Scores
from irl_ops.score.record import Scored
from irl_ops.score.sampling import Sampling, sample
from irl_ops.score.scorer import Encoded, Scorer

# They say how the work is done, and change no score beyond rounding.
OF_THE_WORK = ("command", "out", "limit", "device", "batch_tokens", "show", "html", "stored_logits")
OF_SAMPLES = ("temperature", "top_p", "max_new_tokens", "seed", "window", "batch_tokens")

Answers = list[tuple[int, list[Scored]]]  # by line


def run(options: argparse.Namespace) -> int:
    """Score what the options name; the exit status, 1 where lines could not be scored."""
    console = Console(stderr=True)
    size: int = options.data.stat().st_size
    scores = Scores(options.out, settings(options), options.sample or 1)
    if scores.done:
        console.print(f"{options.out} holds {len(scores.done)} lines already; going on")
    work = Work(load(options), options, BadLines(options.out))
    with progress(console) as bar:
        task = bar.add_task("scoring", total=size)
        wanted = (x for x in lines(options.data, options.limit) if x.number not in scores.done)
        for _, group in groupby(wanted, lambda line: (line.number - 1) // options.window):
            window = list(group)
            scores.append(work.records(work.window(window)))
            bar.update(task, completed=window[-1].end, description=f"line {window[-1].number}")
        bar.update(task, completed=size)
    report(scores, options)
    if work.bad.count:
        console.print(f"{work.bad.count} lines could not be scored; {work.bad.path} says why")
    return 1 if work.bad.count else 0


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    unused = set(OF_THE_WORK) | (set() if options.sample else set(OF_SAMPLES)) | {"window"}
    if options.sample:
        unused -= {"window", "batch_tokens"}  # samples depend on the batch they are drawn in
    kept = {name: value for name, value in vars(options).items() if name not in unused}
    kept["data"] = str(Path(options.data).resolve())
    return kept


def progress(console: Console) -> Progress:
    """A bar over the bytes of the data, gone when done; nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Work:
    """What is done with a window of lines."""

    def __init__(self, scorer: Scorer, options: argparse.Namespace, bad: BadLines) -> None:
        self.scorer = scorer
        self.options = options
        self.bad = bad
        tokenizer: Any = scorer.tokenizer
        template = None
        if getattr(tokenizer, "chat_template", None):

            def template(messages: list[dict[str, str]]) -> str:
                return str(
                    tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True
                    )
                )

        self.fields = Fields(
            options.prompt_field, options.answer_field, not options.sample, template
        )

    def window(self, window: list[Line]) -> Answers:
        """The scores of lines, in their order; what cannot be scored goes to the side file."""
        read: list[tuple[Line, Any]] = []
        encode = self.scorer.encode_prompt if self.options.sample else self.scorer.encode
        for line in window:
            try:
                read.append((line, encode(item(line.raw, self.fields))))
            except BadLineError as error:
                self.bad.add(line.number, str(error), line.raw)
        encoded = [one for _, one in read]
        answers = self.sampled(encoded, window) if self.options.sample else [[x] for x in encoded]
        flat = [answer for group in answers for answer in group]
        scored: list[Scored | None] = [None] * len(flat)
        for batch in by_length(flat, lambda x: x.length, self.options.batch_tokens):
            found = self.scorer.score([one for _, one in batch])
            for (place, _), result in zip(batch, found, strict=True):
                scored[place] = result
        each = iter(scored)
        groups = [[x for _ in group if (x := next(each))] for group in answers]
        finite: Answers = []
        for (line, _), group in zip(read, groups, strict=True):
            if all(one.finite for one in group):
                finite.append((line.number, group))
            else:
                self.bad.add(line.number, "the model's statistics are not finite", line.raw)
        return finite

    def sampled(self, prompts: list[list[int]], window: list[Line]) -> list[list[Encoded]]:
        """Samples of each prompt, from a seed of the window's own."""
        options = self.options
        torch.manual_seed(options.seed + window[0].number)
        how = Sampling(
            options.sample,
            options.temperature,
            options.top_p,
            options.max_new_tokens,
        )
        found: list[list[Encoded]] = [[] for _ in prompts]

        def room(prompt: list[int]) -> int:
            return how.samples * (len(prompt) + how.max_new_tokens)

        for batch in by_length(prompts, room, options.batch_tokens):
            made = sample(self.scorer, [prompt for _, prompt in batch], how)
            for (place, _), group in zip(batch, made, strict=True):
                found[place] = group
        return found

    def records(self, found: Answers) -> Iterator[dict[str, Any]]:
        """What is written of each answer."""
        for number, group in found:
            for index, scored in enumerate(group):
                record: dict[str, Any] = {"line": number}
                if self.options.sample:
                    record["sample"] = index
                record |= scored.answer_fields()
                record["answer"] = self.scorer.tokenizer.decode(
                    scored.ids, skip_special_tokens=True
                )
                if not self.options.answers_only:
                    record["per_token"] = scored.token_fields()
                yield record


def report(scores: Scores, options: argparse.Namespace) -> None:
    """The histogram of all answers, and the first of them in colour."""
    console = Console()
    rewards: list[float] = []
    shown: list[dict[str, Any]] = []
    finished = 0
    for record in scores:
        rewards.append(record["discounted_reward"])
        finished += record["finished"]
        if len(shown) < options.show and "per_token" in record:
            shown.append(record)
    if not rewards:
        console.print("no answers were scored")
        return
    parts: list[Any] = [picture.answers(shown, options.gamma)] if shown else []
    parts.append(picture.histogram(f"discounted reward at \u03b3 = {options.gamma:g}", rewards))
    for part in parts:
        console.print(part, highlight=False)
    console.print(f"{len(rewards)} answers, {finished} with an end token: {scores.path}")
    if options.gamma == 1:
        console.print(
            "At \u03b3 = 1 the rewards of a finished answer sum to its log-likelihood + V(start): "
            "they rank the answers to one prompt as likelihood does."
        )
    if options.html:
        picture.write_html(options.html, *parts)
        console.print(str(options.html))


def main(options: argparse.Namespace) -> int:
    """Run, and say in one line what is wrong with the arguments or the files."""
    try:
        return run(options)
    except (OtherRunError, LoadError) as error:
        print(f"irl-ops score: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("irl-ops score: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"irl-ops score: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2
