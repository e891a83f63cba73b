"""Which mistake gives the number that was found, and which would have shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from irl_ops.debug.arrays import bfloat16, float16
from irl_ops.debug.mistakes import Mistake, mistakes, roundings
from irl_ops.debug.report import PLACES, Place, Row
from irl_ops.debug.rows import Batch, Summed
from irl_ops.debug.shares import Counts, Share, right, wrong

EVERYWHERE: dict[Place, str] = {
    "shift": "",
    "neighbour": "give a batch of several documents in a row, and tell where they end (documents)",
    "end": "give a batch in which a document ends",
    "terms": "",
    "normaliser": "give a batch with rows that have no label",
    "ranks": "give world_size",
    "accumulation": "give accumulation_steps, or the micro-batches of a step",
    "dtype": "the logits are 16-bit already, or too small for a difference",
}
"""What it takes for a mistake to show."""


class Guess(NamedTuple):
    """The numbers that one mistake, or two together, would give."""

    mistakes: tuple[tuple[Place, str], ...]
    number: float


class Findings(NamedTuple):
    """The verdict on the loss."""

    expected: float
    tolerance: float
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether the number is right."""
        return not any(row.verdict == "wrong" for row in self.rows)


def explain(
    found: float, dtype: str, batches: list[Batch], counts: Counts, rtol: float
) -> Findings:
    """Compares the loss with the reference's, and with those of all known mistakes."""
    parts = [batch.summed() for batch in batches]
    share = right(counts)
    expected = share.of(parts)
    size = share.of([Summed(np.abs(part.losses), part.weights) for part in parts])
    tolerance = rtol * abs(size)
    narrow = {"bfloat16": bfloat16, "float16": float16}.get(dtype)
    if narrow is not None:  # then it is wrong in any case, and rounded before it came here
        tolerance = max(tolerance, 2.0**-8 * abs(expected))

    def is_found(number: float) -> bool:
        return bool(abs(number - found) <= tolerance)

    single = list(_single(batches, parts, counts))
    agrees = is_found(expected)
    causes: list[tuple[Place, str]] = []
    together = 1
    if narrow is not None:
        causes.append(
            (
                "dtype",
                f"the loss itself is {dtype}, rounded to some 3 digits: compute it in float32",
            )
        )
    if not agrees:
        near = [guess for guess in single if is_found(guess.number)]
        if not near:
            near = [g for g in _pairs(batches, counts) if is_found(g.number)][:1]
        causes += dict.fromkeys(cause for guess in near for cause in guess.mistakes)
        together = len(causes) if len(near) == 1 else together
    rows = _rows(found, expected, tolerance, single, causes, agrees, together)
    return Findings(expected, tolerance, tuple(rows))


def _changed(batches: list[Batch], mistake: Mistake) -> list[Batch] | None:
    changed = [mistake.change(batch) for batch in batches]
    return None if None in changed else [batch for batch in changed if batch is not None]


def _single(batches: list[Batch], parts: list[Summed], counts: Counts) -> Iterator[Guess]:
    exact = right(counts)
    for mistake in (*mistakes(batches[0]), *roundings(batches[0])):
        made = _changed(batches, mistake)
        if made is not None:
            summed = [batch.summed() for batch in made]
            yield Guess(((mistake.place, mistake.words),), exact.of(summed))
    for share in wrong(counts, parts):
        yield Guess((_named(share),), share.of(parts))


def _pairs(batches: list[Batch], counts: Counts) -> Iterator[Guess]:
    """A mistake in what is computed together with one in what it is divided by."""
    for mistake in mistakes(batches[0]):
        made = _changed(batches, mistake)
        if made is not None:
            summed = [batch.summed() for batch in made]
            for share in wrong(counts, summed):
                both = ((mistake.place, mistake.words), _named(share))
                yield Guess(both, share.of(summed))


def _named(share: Share) -> tuple[Place, str]:
    assert share.place is not None
    return share.place, share.words


def _rows(
    found: float,
    expected: float,
    tolerance: float,
    single: list[Guess],
    causes: list[tuple[Place, str]],
    agrees: bool,
    together: int,
) -> Iterator[Row]:
    """``together``: how many of the causes it takes for the number, where they are not choices."""
    several = together < len(causes)
    for place in PLACES:
        here = list(dict.fromkeys(words for at, words in causes if at == place))
        for words in here:
            doubt = " (one of several that give this number)" if several else ""
            yield Row(place, "wrong", words + doubt)
        if here:
            continue
        ruled_out = sum(
            abs(guess.number - expected) > 2 * tolerance
            for guess in single
            if guess.mistakes[0][0] == place
        )
        if not ruled_out:
            why = EVERYWHERE[place]
            yield Row(place, "not shown", "no mistake would show" + (f": {why}" if why else ""))
        elif agrees or causes:
            yield Row(place, "right", _ruled_out(ruled_out))
        else:
            yield Row(place, "not judged", "")
    if not agrees and not causes:
        ratio = f", {found / expected:.5g} times it" if expected else ""
        yield Row("unknown", "wrong", f"no known mistake gives {found:.6g}{ratio}")


def _ruled_out(n: int) -> str:
    return "one known mistake would show" if n == 1 else f"{n} known mistakes would show"
