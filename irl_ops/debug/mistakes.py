"""Mistakes that people make, as changes of a batch: each gives a loss to compare with.

A change takes a batch with the options that are right, and returns the batch that the mistake makes
of it, or None where there is nothing to mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from irl_ops.algebra import IGNORED
from irl_ops.debug.arrays import bfloat16, dtype_name, float16
from irl_ops.debug.report import Place
from irl_ops.debug.rows import Batch, Logits
from irl_ops.options import DEFAULTS
from irl_ops.readout import Readout

CHUNKS = (2, 3, 4, 8, 16)


class Mistake(NamedTuple):
    """What is wrong, in words, and the batch that it makes."""

    place: Place
    words: str
    change: Callable[[Batch], Batch | None]


def _with(**options: Any) -> Callable[[Batch], Batch]:
    """A change of options alone."""
    return lambda batch: batch.but(**options)


def mistakes(batch: Batch) -> Iterator[Mistake]:
    """Those that a batch like this can show; cheap ones, which read no logits again."""
    yield from _shift(batch)
    yield from _neighbour(batch)
    yield from _end(batch)
    yield from _terms(batch)


def roundings(batch: Batch) -> Iterator[Mistake]:
    """Those that need one more pass over the logits each."""
    if dtype_name(batch.logits.flat) not in ("float32", "float64"):
        return
    for name, rounding in (("bfloat16", bfloat16), ("float16", float16)):

        def rounded(b: Batch, rounding: Any = rounding) -> Batch:
            old = b.logits
            source = old.flat.reshape(*b.labels.shape, old.vocab)
            logits = Logits(source, old.readout, old.entropy is not None, rounding)
            return b._replace(logits=logits)

        yield Mistake("dtype", f"the logits are rounded to {name} before the loss", rounded)


def _shift(batch: Batch) -> Iterator[Mistake]:
    if batch.options.get("shift", False):
        yield Mistake(
            "shift",
            "the labels are not shifted: logits[t] scores labels[t], the token that it was "
            "computed from (give shift=True)",
            _with(shift=False),
        )
        for marks in ("logits", "labels"):
            yield Mistake(
                "shift",
                "the labels are shifted twice: logits[t] scores labels[t + 2] (slice, or give "
                "shift=True, not both)",
                partial(_shifted_twice, marks=marks),
            )
    else:
        yield Mistake(
            "shift",
            "labels that stand beside their logits are shifted again: logits[t] scores "
            "labels[t + 1] (give shift=False)",
            _with(shift=True),
        )


def _shifted_twice(b: Batch, marks: str) -> Batch:
    """As a caller makes it who slices ``logits[:, :-1]`` and ``labels[:, 1:]`` beforehand."""
    first, last = (..., slice(None, -1)), (..., slice(1, None))
    cut = last if marks == "labels" else first
    shape = b.labels.shape
    options = {
        name: x[cut] if isinstance(x, np.ndarray) and x.shape == shape else x
        for name, x in b.marked().options.items()
    }
    index = np.arange(b.labels.size).reshape(shape)[first]
    return Batch(b.logits.take(index), b.labels[last], options)


def _neighbour(batch: Batch) -> Iterator[Mistake]:
    marks = ("segment_ids", "position_ids", "cu_seqlens")
    none: dict[str, Any] = dict.fromkeys(marks)
    told = any(batch.options.get(name) is not None for name in marks)
    if told:
        yield Mistake(
            "neighbour",
            "the last row of a document reads the first row of the next: the loss is not told "
            "where documents end (give segment_ids, position_ids or cu_seqlens)",
            lambda b: b.aligned().but(segment_ids=None),
        )
        if batch.options.get("shift", False):
            yield Mistake(
                "neighbour",
                "the last row of a document scores the first token of the next, and reads its row: "
                "the loss is not told where documents end (give segment_ids, position_ids or "
                "cu_seqlens)",
                _with(**none),
            )
    yield Mistake(
        "neighbour",
        "the sequences of the batch are joined to one: the last row of each reads the first row of "
        "the next (keep [B, T, V], do not flatten)",
        _flattened,
    )
    yield Mistake(
        "neighbour",
        "no row reads the next one: V' is 0 in all of them (each row came alone, or in a batch of "
        "one row)",
        lambda b: b.aligned().but(
            segment_ids=np.broadcast_to(np.arange(b.labels.shape[-1]), b.labels.shape),
            **{"boundary": "terminal", "eos_token_id": None, "truncated": None},
        ),
    )
    yield Mistake(
        "neighbour",
        "rows without a label are dropped before the loss: V' is that of the next labelled row "
        "(give all rows)",
        _compacted,
    )
    yield Mistake(
        "neighbour",
        "rows without a label are dropped before the loss, and all sequences joined: V' is that of "
        "the next labelled row, whichever document has it (give all rows)",
        lambda b: _unmarked(_compacted(b)),
    )
    for n in CHUNKS:
        yield Mistake(
            "neighbour",
            f"the sequence comes in {n} chunks: V' is missing at each cut (give whole sequences, "
            "or take linear_iqlearn_loss, which cuts inside)",
            partial(_chunked, n=n),
        )


def _flattened(b: Batch) -> Batch | None:
    """Documents are known; that a row of the batch ends is not."""
    if b.labels.ndim < 2 or b.labels.size == b.labels.shape[-1]:
        return None
    one = _one_row(b.aligned())
    ids = one.options["segment_ids"]
    first = np.arange(len(ids)) % b.labels.shape[-1] == 0
    starts = np.concatenate([ids[:1] < 0, ids[1:] != ids[:-1]]) & ~first
    return one.but(segment_ids=starts.cumsum())


def _compacted(b: Batch) -> Batch | None:
    """As a loss does that selects the labelled positions of the batch."""
    one = _one_row(b.aligned())
    kept = np.flatnonzero(one.rows().kind != IGNORED)
    if len(kept) in (0, one.labels.size):
        return None
    options = {
        name: x[kept] if isinstance(x, np.ndarray) and x.shape == one.labels.shape else x
        for name, x in one.options.items()
    }
    return Batch(one.logits.take(kept), one.labels[kept], options)


def _one_row(b: Batch) -> Batch:
    """All sequences in one, their segments kept apart."""
    shape, size = b.labels.shape, b.labels.size
    options = dict(b.options)
    for name, x in b.options.items():
        if isinstance(x, np.ndarray) and x.shape == shape:
            options[name] = x.reshape(-1)
        elif isinstance(x, np.ndarray) and x.ndim and x.shape == shape[:-1]:
            options[name] = np.repeat(x, shape[-1])
    options["segment_ids"] = options["segment_ids"] + np.arange(size) // shape[-1] * shape[-1]
    return Batch(b.logits.take(np.arange(size)), b.labels.reshape(-1), options)


def _unmarked(b: Batch | None) -> Batch | None:
    return None if b is None else b.but(segment_ids=None)


def _chunked(b: Batch, n: int) -> Batch | None:
    length = b.labels.shape[-1]
    if length < 2 * n:
        return None
    whole = b.aligned()
    cut = np.arange(length) // -(-length // n)
    return whole.but(segment_ids=whole.options["segment_ids"] * n + cut)


def _end(batch: Batch) -> Iterator[Mistake]:
    ends, rule = batch.options.get("eos_token_id"), batch.options.get("boundary", "terminal")
    for other in ("terminal", "bootstrap", "drop"):
        if ends is None and other == rule:
            continue
        told = "eos_token_id is not given, and " if ends is not None else ""
        yield Mistake(
            "end",
            f"the last row of a document ends as by boundary={other!r}: {told}it should be "
            + ("by its end token" if ends is not None else f"{rule!r}"),
            _with(eos_token_id=None, boundary=other),
        )
    if batch.options.get("truncated") is not None:
        yield Mistake(
            "end",
            "rows that are cut off count as ended: truncated is not given",
            _with(truncated=None),
        )


def _terms(batch: Batch) -> Iterator[Mistake]:
    yield Mistake(
        "terms",
        "there is no TD term: this is the negative log-likelihood (is the loss called at all? a "
        "trainer's fused cross-entropy may have taken its place)",
        _with(lam=0.0),
    )
    options = batch.options
    for name in ("lam", "gamma"):
        if options.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            yield Mistake(
                "terms",
                f"{name} is {DEFAULTS[name]}, the default, and should be {options[name]:g}",
                _with(**{name: DEFAULTS[name]}),
            )
    for name in ("entropy_coef", "z_loss"):
        if options.get(name, 0.0) != 0.0:
            yield Mistake(
                "terms",
                f"{name} is 0, and should be {options[name]:g}",
                _with(**{name: 0.0}),
            )
    for name in ("token_weights", "where", "values", "next_values"):
        if options.get(name) is not None:
            yield Mistake(
                "terms",
                f"{name} does not reach the loss",
                _with(**{name: None}),
            )
    if not batch.logits.readout.plain:
        yield Mistake(
            "terms",
            "logit_scale and softcap do not reach the loss",
            _plain,
        )


def _plain(b: Batch) -> Batch:
    source = b.logits.flat.reshape(*b.labels.shape, b.logits.vocab)
    logits = Logits(source, Readout(), b.logits.entropy is not None)
    return b._replace(logits=logits).but(logit_scale=1.0, softcap=None)
