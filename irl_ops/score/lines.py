"""Reading a file of JSON lines: prompts, answers, and what is wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAIRS = (("prompt", "completion"), ("question", "answer"))
"""Names of prompt and answer that are looked for where none are given."""


class BadLineError(ValueError):
    """Says why a line cannot be scored."""


class Line(NamedTuple):
    """A line of the data."""

    number: int  # from 1
    raw: bytes
    end: int  # bytes read so far


class Item(NamedTuple):
    """A prompt, and its answer where one is scored that was given."""

    prompt: str
    answer: str | None
    chat: bool = False  # the prompt has all special tokens already


class Fields(NamedTuple):
    """Where a line holds what."""

    prompt: str | None = None
    answer: str | None = None
    answers_wanted: bool = True
    template: Callable[[list[dict[str, str]]], str] | None = None  # of chats


def lines(path: Path, limit: int | None = None) -> Iterator[Line]:
    """The lines of a file that are not blank, in order, without reading it whole."""
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if limit is not None and number > limit:
                return
            end += len(raw)
            if raw.strip():
                yield Line(number, raw, end)


def item(raw: bytes, fields: Fields) -> Item:
    """What a line holds.

    Raises:
        BadLineError: it holds something else; says what.
    """
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise BadLineError("nested too deeply") from error
    if not isinstance(row, dict):
        raise BadLineError(f"a JSON {type(row).__name__}; accepted: an object")
    if "messages" in row and fields.prompt is None:
        return _chat(row["messages"], fields)
    prompt, answer = _names(row, fields)
    text = _text(row, prompt)
    return Item(text, _text(row, answer) if fields.answers_wanted else None)


def _names(row: dict[str, Any], fields: Fields) -> tuple[str, str]:
    for prompt, answer in PAIRS:
        prompt, answer = fields.prompt or prompt, fields.answer or answer
        if prompt in row and (answer in row or not fields.answers_wanted):
            return prompt, answer
    wanted = [
        f"{fields.prompt or p!r} and {fields.answer or a!r}" if fields.answers_wanted else repr(p)
        for p, a in PAIRS
    ]
    raise BadLineError(
        f"an object with the fields {sorted(row)}; accepted: {' or '.join(dict.fromkeys(wanted))}"
    )


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise BadLineError(f"{name!r} is {value!r}; accepted: a string with text in it")
    return value


def _chat(messages: Any, fields: Fields) -> Item:
    turns = isinstance(messages, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        for turn in messages
    )
    if not turns or not messages:
        raise BadLineError(
            '"messages" is not a list of objects with strings "role" and "content"; others, such '
            "as images, are not served"
        )
    if fields.template is None:
        raise BadLineError('"messages", and the tokenizer has no chat template')
    answered = messages[-1]["role"] == "assistant"
    if len(messages) < 1 + answered or not (answered or not fields.answers_wanted):
        roles = [turn["role"] for turn in messages]
        raise BadLineError(
            f'"messages" has the roles {roles}; accepted: a prompt, then the assistant'
        )
    try:
        prompt = fields.template(messages[:-1] if answered else messages)
    except Exception as error:  # templates raise what they like
        raise BadLineError(f"the chat template refuses the messages: {error}") from error
    answer = _text(messages[-1], "content") if fields.answers_wanted else None
    return Item(prompt, answer, chat=True)
