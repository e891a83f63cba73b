"""Before the pass: ``align``, with the logit at each label, and the sums that ``weigh`` needs."""

import triton
import triton.language as tl

from irl_ops.algebra.triton.numbers import flag
from irl_ops.kernels.triton.columns import row_of

IGNORED, TERMINAL, BOOTSTRAP, NO_TD = (tl.constexpr(kind) for kind in range(4))
NO_LABEL, BAD_LABEL = tl.constexpr(-1), tl.constexpr(2**31 - 1)


@triton.jit(
    do_not_specialize=[
        "n", "length", "vocab", "ignore_index", "offsets", "inner", "q_outer", "q_inner",
    ]
)  # fmt: skip
def align(
    given, where, marks, truncated, is_expert, token_weights, logits,
    n, length, vocab, ignore_index, offsets, inner, q_outer, q_inner,
    labels, kinds, weights, label_logit, partial,
    SHIFT: tl.constexpr, EOS: tl.constexpr, BOUNDARY: tl.constexpr,  # "terminal", ...
    WHERE: tl.constexpr,
    MARKS: tl.constexpr,  # what the marks of segments are: "segment_ids", ..., or ""
    WEIGHTS: tl.constexpr, TRUNCATED: tl.constexpr, EXPERT: tl.constexpr,  # how flags come
    MEAN: tl.constexpr, PICK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Labels, kinds, the weights of labelled rows with their sums (MEAN), and q[label] (PICK).

    ``offsets`` is how many numbers ``cu_seqlens`` has.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    label, labelled, has_next = _labelled(
        i, given, where, marks, n, length, ignore_index, offsets, SHIFT, WHERE, MARKS
    )
    _, next_labelled, _ = _labelled(
        i + 1, given, where, marks, n, length, ignore_index, offsets, SHIFT, WHERE, MARKS
    )

    onward = tl.where(has_next, BOOTSTRAP, NO_TD)
    kind = tl.full((BLOCK,), NO_TD, tl.int32)
    if len(EOS) > 0 or BOUNDARY == "bootstrap":
        kind = onward
    elif BOUNDARY == "terminal":
        kind = tl.full((BLOCK,), TERMINAL, tl.int32)
    if TRUNCATED:
        kind = tl.where(flag(truncated, i, inside, length, TRUNCATED), onward, kind)
    kind = tl.where(has_next & next_labelled, BOOTSTRAP, kind)
    for k in tl.static_range(len(EOS)):
        kind = tl.where(label == EOS[k], TERMINAL, kind)
    kind = tl.where(labelled, kind, IGNORED)
    in_range = (label >= 0) & (label < vocab)
    if MARKS == "cu_seqlens":
        in_range = in_range & _are_offsets(marks, offsets, n)
    label = tl.where(labelled, tl.where(in_range, label, BAD_LABEL), NO_LABEL)
    tl.store(labels + i, label.to(tl.int64), inside)
    tl.store(kinds + i, kind.to(tl.int8), inside)
    if PICK:
        place = row_of(logits, i, inner, q_outer, q_inner, True) + label
        picked = tl.load(place, labelled & in_range, 0.0).to(tl.float32)
        picked = tl.where(labelled & ~in_range, float("nan"), picked)
        tl.store(label_logit + i, picked, inside)

    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTS:
        weight = tl.load(token_weights + i, inside, 0.0).to(tl.float32)
    weight = tl.where(labelled, weight, 0.0)
    tl.store(weights + i, weight, inside)
    if MEAN:
        place = partial + tl.program_id(0)
        if EXPERT:
            expert = flag(is_expert, i, inside, length, EXPERT)
            tl.store(place, tl.sum(tl.where(expert, weight, 0.0), 0))
            tl.store(place + tl.num_programs(0), tl.sum(tl.where(expert, 0.0, weight), 0))
        else:
            tl.store(place, tl.sum(weight, 0))


@triton.jit
def has_td(kind):
    """Whether rows have a TD term."""
    return (kind == TERMINAL) | (kind == BOOTSTRAP)


@triton.jit
def _labelled(
    i, given, where, marks, n, length, ignore_index, offsets,
    SHIFT: tl.constexpr, WHERE: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """``(label, labelled, has_next)`` of the rows i, of which some may lie outside."""
    inside = i < n
    has_next = inside & (i % length + 1 < length)
    if MARKS == "cu_seqlens":
        has_next = has_next & (_segment(marks, offsets, i) == _segment(marks, offsets, i + 1))
    elif MARKS != "":
        here, ahead = tl.load(marks + i, has_next, 0), tl.load(marks + i + 1, has_next, 0)
        if MARKS == "position_ids":
            here += 1
        has_next = has_next & (here == ahead)
    if SHIFT:
        label = tl.load(given + i + 1, has_next, 0).to(tl.int64)
        labelled = has_next & (label != ignore_index)
    else:
        label = tl.load(given + i, inside, 0).to(tl.int64)
        labelled = inside & (label != ignore_index)
    if WHERE:
        labelled = labelled & (tl.load(where + i, inside, 0) != 0)
    return label, labelled, has_next


@triton.jit
def _segment(cu_seqlens, offsets, row):
    """How many offsets are not beyond each row: a binary search."""
    low, high = tl.zeros_like(row), tl.zeros_like(row) + offsets
    width = offsets
    while width > 0:
        unsure = low < high
        middle = (low + high) // 2
        passed = tl.load(cu_seqlens + middle, unsure, 0) <= row
        low = tl.where(unsure & passed, middle + 1, low)
        high = tl.where(unsure & ~passed, middle, high)
        width = width // 2
    return low


@triton.jit
def _are_offsets(cu_seqlens, offsets, n):
    """Whether they begin with 0, end with n and never decrease."""
    some = offsets > 0
    good = (tl.load(cu_seqlens, some, 1) == 0) & (tl.load(cu_seqlens + offsets - 1, some, 0) == n)
    falls = 0
    for start in tl.range(0, offsets, 1024):
        k = start + tl.arange(0, 1024)
        pair = k + 1 < offsets
        fall = tl.load(cu_seqlens + k + 1, pair, 0) < tl.load(cu_seqlens + k, pair, 0)
        falls += tl.sum(fall.to(tl.int32), 0)
    return good & (falls == 0)
