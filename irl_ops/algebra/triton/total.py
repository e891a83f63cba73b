"""After the pass: ``total``, the loss and the metrics."""

import triton
import triton.language as tl

from irl_ops.algebra.triton.numbers import sum_of


@triton.jit(do_not_specialize=["blocks"])
def total(sums, blocks, loss, metrics):
    """The loss; the means nll, value, entropy, td, reward, accuracy and z, and the tokens."""
    tokens, with_td = sum_of(sums + 8 * blocks, blocks), sum_of(sums + 9 * blocks, blocks)
    tl.store(loss, sum_of(sums, blocks))
    for k in tl.static_range(7):
        count = with_td if k == 3 or k == 4 else tokens
        mean = sum_of(sums + (k + 1) * blocks, blocks) / tl.where(count > 0.0, count, 1.0)
        tl.store(metrics + k, mean)
    tl.store(metrics + 7, tokens)
