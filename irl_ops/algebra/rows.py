"""Before the pass: which label each row scores, and what kind of row that makes it."""

from __future__ import annotations

from typing import Any, NamedTuple

from irl_ops.algebra.neighbours import following
from irl_ops.algebra.options import Sequence

Array = Any

IGNORED, TERMINAL, BOOTSTRAP, NO_TD = 0, 1, 2, 3
"""Kinds of row: no label; V' = 0; V' = V_{t+1}; labelled, but without a TD term."""

NO_LABEL = -1
BAD_LABEL = 2**31 - 1  # outside every vocabulary: the kernels answer NaN and read nothing


class Rows(NamedTuple):
    """What the labels alone decide; arrays of shape ``[..., T]``."""

    labels: Array  # NO_LABEL in ignored rows, BAD_LABEL where out of range
    kind: Array  # int8


def has_td(kind: Array) -> Array:
    """Whether rows have a TD term."""
    return (kind == TERMINAL) | (kind == BOOTSTRAP)


def align(xp: Any, labels: Array, vocab: int, sequence: Sequence) -> Rows:
    """Aligns the labels with their logits and gives every row its kind.

    The first rule that applies decides:

    ====================================  =============================================
    no label (ignore_index, ``where``)    IGNORED
    the label is in ``eos_token_id``      TERMINAL
    next row exists and is labelled       BOOTSTRAP
    ``truncated`` holds for the row       BOOTSTRAP if a next row exists, else NO_TD
    ``eos_token_id`` is given             BOOTSTRAP if a next row exists, else NO_TD
    ``boundary="terminal"``               TERMINAL
    ``boundary="bootstrap"``              BOOTSTRAP if a next row exists, else NO_TD
    ``boundary="drop"``                   NO_TD
    ====================================  =============================================

    Where ``cu_seqlens`` are not offsets (from 0 to the number of rows, never decreasing), every
    label is a bad one.
    """
    offsets, ends = sequence.cu_seqlens, sequence.eos_token_id
    has_next = next_row_exists(xp, labels, sequence)
    if sequence.shift:
        ahead = following(xp, labels, sequence.ignore_index)
        labels = xp.where(has_next, ahead, sequence.ignore_index)
    labelled = labels != sequence.ignore_index
    if sequence.where is not None:
        labelled = labelled & sequence.where

    at_end = TERMINAL if sequence.boundary == "terminal" and ends is None else NO_TD
    kind = xp.full_like(labels, at_end, dtype=xp.int8)
    if ends is not None or sequence.boundary == "bootstrap":
        kind = xp.where(has_next, BOOTSTRAP, kind)
    if sequence.truncated is not None:
        cut = per_row(sequence.truncated, labels)
        kind = xp.where(cut, xp.where(has_next, BOOTSTRAP, xp.full_like(kind, NO_TD)), kind)
    kind = xp.where(has_next & following(xp, labelled, False), BOOTSTRAP, kind)
    for token in ends or ():
        kind = xp.where(labels == token, TERMINAL, kind)
    kind = xp.where(labelled, kind, IGNORED)

    in_range = (labels >= 0) & (labels < vocab)
    if offsets is not None:
        in_range = in_range & are_offsets(xp, offsets, labels.shape[-1])
    labels = xp.where(labelled, xp.where(in_range, labels, BAD_LABEL), NO_LABEL)
    return Rows(labels, kind)


def next_row_exists(xp: Any, labels: Array, sequence: Sequence) -> Array:
    """True where row t + 1 lies in the same batch row and the same segment; bool ``[..., T]``."""
    segment_ids, position_ids = sequence.segment_ids, sequence.position_ids
    if sequence.cu_seqlens is not None:
        offsets = sequence.cu_seqlens
        row = xp.cumulative_sum(xp.ones_like(labels, dtype=offsets.dtype), axis=-1) - 1
        segment_ids = xp.searchsorted(offsets, row, side="right")
    if position_ids is not None:
        joined = position_ids[..., 1:] == position_ids[..., :-1] + 1
    elif segment_ids is not None:
        joined = segment_ids[..., 1:] == segment_ids[..., :-1]
    else:
        joined = xp.ones_like(labels[..., 1:], dtype=xp.bool)
    return xp.concat([joined, xp.zeros_like(labels[..., :1], dtype=xp.bool)], axis=-1)


def are_offsets(xp: Any, cu_seqlens: Array, rows: int) -> Array:
    """Whether ``cu_seqlens`` begins with 0, ends with ``rows`` and never decreases; 0-d bool."""
    if cu_seqlens.shape[0] == 0:
        return xp.zeros_like(cu_seqlens, dtype=xp.bool).any()
    ordered = xp.all(cu_seqlens[1:] >= cu_seqlens[:-1])
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & ordered


def per_row(flags: Array, labels: Array) -> Array:
    """One flag per row, from those or from one per sequence."""
    return flags[..., None] if flags.ndim < labels.ndim else flags
