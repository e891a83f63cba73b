"""One element per row: label_logit reads it, set_label writes it.

Traffic: one 32-byte sector per row. A label below 0 is none, one of V or more is bad: neither is
ever turned into an address.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import row_of
from irl_ops.kernels.triton.softmax import capped, through_cap


@triton.jit(do_not_specialize=["rows", "n_cols", "inner", "q_outer", "q_inner"])
def label_logit(
    logits, labels, rows, n_cols, inner, q_outer, q_inner,
    picked,
    BLOCK: tl.constexpr, SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """``q[label]``: 0 without a label, NaN for a bad one; BLOCK rows per program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = row < rows
    label = tl.load(labels + row, in_range, -1)
    place = row_of(logits, row, inner, q_outer, q_inner, True) + label
    logit = capped(tl.load(place, (label >= 0) & (label < n_cols), 0.0), SCALE, SOFTCAP)
    tl.store(picked + row, tl.where(label >= n_cols, float("nan"), logit), in_range)


@triton.jit(do_not_specialize=["rows", "n_cols", "inner", "d_outer", "d_inner"])
def set_label(
    labels, elements, rows, n_cols, inner, d_outer, d_inner,
    dlogits,
    BLOCK: tl.constexpr, SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
    label_logit=None,
):  # fmt: skip
    """Rounds once; rows without a good label keep what they have.

    The elements are gradients in q. With SOFTCAP what they are in x needs q[label], as label_logit
    gives it: in place, x has been written over by now.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = row < rows
    label = tl.load(labels + row, in_range, -1)
    place = row_of(dlogits, row, inner, d_outer, d_inner, True) + label
    element = tl.load(elements + row, in_range, 0.0) * SCALE
    if SOFTCAP != 0.0:
        element = through_cap(element, tl.load(label_logit + row, in_range, 0.0), SOFTCAP)
    tl.store(place, element.to(dlogits.dtype.element_ty), (label >= 0) & (label < n_cols))
