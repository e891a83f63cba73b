"""row_stats: maximum, log-sum, label logit and, with ENTROPY, entropy of every row.

Traffic: one read of the logits. Exponentials: 1 + 1/R per element, one more with
SOFTCAP.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.columns import groups_of, row_of
from irl_ops.kernels.triton.scan import scan
from irl_ops.kernels.triton.softmax import capped, entropy_of


@triton.jit(do_not_specialize=["n_cols", "inner", "q_outer", "q_inner"])
def row_stats(
    logits, labels, n_cols, inner, q_outer, q_inner,
    row_max, logsum, label_logit, entropy,
    R: tl.constexpr, L: tl.constexpr, ENTROPY: tl.constexpr, EDGES: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One row per program."""
    row = tl.program_id(0)
    source = row_of(logits, row, inner, q_outer, q_inner, EDGES)
    skip, count = groups_of(source, n_cols, EDGES)
    top, total, centred_sum = scan(
        source, n_cols, skip, count, R, L, ENTROPY, EDGES, "evict_first", SCALE, SOFTCAP
    )
    log_total = tl.log(total)
    tl.store(row_max + row, top)
    tl.store(logsum + row, log_total)
    if ENTROPY:
        tl.store(entropy + row, entropy_of(total, centred_sum, log_total))
    label = tl.load(labels + row)
    picked = tl.load(source + label, (label >= 0) & (label < n_cols), 0.0)
    picked = capped(picked, SCALE, SOFTCAP)
    tl.store(label_logit + row, tl.where(label >= n_cols, float("nan"), picked))
