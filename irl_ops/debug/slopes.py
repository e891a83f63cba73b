"""The gradient of a set-up, row by row beside that of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from irl_ops.algebra import BOOTSTRAP, IGNORED, NO_LABEL
from irl_ops.debug.report import Parting, Row
from irl_ops.debug.rows import Batch
from irl_ops.debug.seen import Slopes

KINDS = ("ignored", "terminal", "bootstrap", "no TD term")
SHOWN = 5

# Of the row's norm. A gradient in float32 is off by some 1e-6 of it, and one that went through a
# matrix product by more; a 16-bit one is rounded to 2^-9 of each element, and so is what it comes
# from.
TOLERANCES = {"float64": 1e-4, "float32": 1e-3}
COARSE = 5e-2


class Compared(NamedTuple):
    """One micro-batch: norms of the rows' gradients, ``[rows]``, and which of them part."""

    expected: NDArray[np.float64]
    found: NDArray[np.float64]
    error: NDArray[np.float64]
    parted: NDArray[np.bool_]


def compare(slopes: Slopes, expected: NDArray[np.float32]) -> Compared:
    """Rows part by more than a share of their norm, and of a hundredth of the largest."""
    given, wanted = (
        x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (slopes.found, expected)
    )
    norm, found, error = (np.linalg.norm(x, axis=-1) for x in (wanted, given, given - wanted))
    floor = norm + 0.01 * norm.max(initial=0.0)
    parted = ~(error <= TOLERANCES.get(slopes.dtype, COARSE) * floor)
    return Compared(norm, found, error, parted & ((norm != 0) | (found != 0)))


def judge(
    batches: list[Batch], slopes: list[Slopes | None], factor: float
) -> tuple[Row, tuple[Parting, ...]]:
    """The verdict on the gradient of ``factor`` times the summed loss, and where it parts."""
    pairs = [(b, s) for b, s in zip(batches, slopes, strict=True) if s is not None]
    if len(pairs) < len(batches):
        words = "the set-up shows no gradient of its logits"
        return Row("gradient", "not shown", words), ()
    by = pairs[0][1].of
    compared = [compare(s, s.expected(b.gradient(factor))) for b, s in pairs]
    partings = tuple(_partings(batches, compared))
    if not partings:
        rows = sum(len(one.expected) for one in compared)
        return Row("gradient", "right", f"that by {by}, in {rows} rows"), ()
    words = _cause(pairs, compared, factor)
    count = sum(int(one.parted.sum()) for one in compared)
    return Row("gradient", "wrong", f"that by {by} parts in {count} rows: {words}"), partings[
        :SHOWN
    ]


def _cause(pairs: list[tuple[Batch, Slopes]], compared: list[Compared], factor: float) -> str:
    for words, changed in _mistakes([batch for batch, _ in pairs], factor):
        slopes = [s for _, s in pairs]
        again = [compare(s, s.expected(x)) for s, x in zip(slopes, changed, strict=True)]
        if not any(one.parted.any() for one in again):
            return words
    wanted, given = (sum((x**2).sum() for x in norms) for norms in zip(
        *((one.expected, one.found) for one in compared), strict=True
    ))  # fmt: skip
    if wanted > 0:
        ratio = float(np.sqrt(given / wanted))
        scaled = [b.gradient(ratio * factor) for b, _ in pairs]
        again = [compare(s, s.expected(x)) for (_, s), x in zip(pairs, scaled, strict=True)]
        if not any(one.parted.any() for one in again):
            return f"it is {ratio:.5g} times what it should be"
    return "no known mistake gives it"


def _mistakes(
    batches: list[Batch], factor: float
) -> Iterator[tuple[str, list[NDArray[np.float32]]]]:
    stopped = bool(batches[0].options.get("detach_next", False))
    yield (
        "it flows through V', which detach_next=True should stop"
        if stopped
        else "it does not flow through V', the value of the next row (detach_next=True, or a cut "
        "graph)",
        [b.but(detach_next=not stopped).gradient(factor) for b in batches],
    )
    yield (
        "rows without a label get none, though the row before reads their value: do not zero the "
        "gradient where labels are ignored",
        [b.gradient(factor, cut=b.rows().kind == IGNORED) for b in batches],
    )


def _partings(batches: list[Batch], compared: list[Compared]) -> Iterator[Parting]:
    for number, (batch, one) in enumerate(zip(batches, compared, strict=True)):
        rows = batch.rows()
        labels, kinds = rows.labels.reshape(-1), rows.kind.reshape(-1)
        onto = np.concatenate([kinds[:1] * 0, kinds[:-1]]) == BOOTSTRAP
        for i in np.flatnonzero(one.parted):
            read = ", read by the row before" if onto[i] else ""
            yield Parting(
                part=number,
                position=tuple(int(n) for n in np.unravel_index(i, rows.kind.shape)),
                label=None if labels[i] == NO_LABEL else int(labels[i]),
                kind=KINDS[kinds[i]] + read,
                expected=float(one.expected[i]),
                found=float(one.found[i]),
                error=float(one.error[i]),
            )
