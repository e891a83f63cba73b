"""The command line of ``irl-ops score``; nothing is imported for it but the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """Value, log-likelihood, entropy and extracted reward,
r_t = Q(s_t, a_t) - gamma V(s_t+1), of every token of an answer, given in the data or sampled from
the model.

One JSON object a line goes to --out. Interrupted, the same command goes on where it stopped. Lines
that cannot be scored go to OUT.bad.jsonl with their numbers and the reason, and the exit status is
then 1."""

FIELDS = """Accepted lines: objects with "prompt" and "completion", or "question" and "answer"
(strings; other names by --prompt-field and --answer-field), or "messages", a list of {"role": ...,
"content": ...} that ends with the assistant, for tokenizers with a chat template. With --sample no
answer is needed, and of "messages" the last of the assistant is left out."""


def add_to(commands: Any) -> None:
    """Adds the subcommand to those of ``irl-ops``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "score",
        help="rewards of given or sampled answers, for every token",
        description=DESCRIPTION,
        epilog=FIELDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_NAME", help="of Transformers, with a tokenizer")
    add("--data", required=True, type=Path, metavar="FILE.jsonl", help="one object a line")
    add("--out", required=True, type=Path, metavar="FILE", help="the scores, as JSON lines")
    add("--gamma", type=fraction, default=1.0, help="discount in [0, 1]; default: 1")
    add("--prompt-field", metavar="NAME", help="field that holds the prompt")
    add("--answer-field", metavar="NAME", help="field that holds the answer")
    add(
        "--separator",
        default="\n",
        help="what stands between prompt and answer of a decoder; default: a line break",
    )
    add("--sample", type=positive, metavar="N", help="score N samples of each prompt instead")
    add("--temperature", type=above_zero, default=1.0, help="of the samples; default: 1")
    add("--top-p", type=fraction, default=1.0, help="nucleus of the samples; default: 1, all")
    add("--max-new-tokens", type=positive, default=256, help="of a sample; default: 256")
    add("--seed", type=int, default=0, help="of the samples; default: 0")
    add(
        "--max-length",
        type=positive,
        help="tokens of prompt and answer; longer answers are cut and marked as not finished; "
        "default: the positions that the model has",
    )
    add("--limit", type=positive, metavar="N", help="read the first N lines only")
    add("--answers-only", action="store_true", help="write sums of answers, and nothing per token")
    add("--device", help="such as cpu or cuda; default: cuda where there is one")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; default: auto, as they were saved",
    )
    add(
        "--batch-tokens",
        type=positive,
        default=8192,
        help="tokens of a batch, padding included; default: 8192",
    )
    add(
        "--window",
        type=positive,
        default=512,
        help="lines that are read, put in order of length and written together; default: 512",
    )
    add(
        "--stored-logits",
        action="store_true",
        help="for models whose logits are not those of a linear layer: store them",
    )
    add("--show", type=count, default=3, metavar="K", help="answers to show in colour; default: 3")
    add("--html", type=Path, metavar="FILE", help="write the shown answers as HTML too")


def positive(text: str) -> int:
    """An integer of 1 or more."""
    return _integer(text, 1)


def count(text: str) -> int:
    """An integer of 0 or more."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    number = int(text) if text.lstrip("-").isdecimal() else least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} given; an integer of {least} or more accepted")
    return number


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; a number from 0 to 1 is accepted")
    return number


def above_zero(text: str) -> float:
    """A number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} given; a number above 0 is accepted")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
