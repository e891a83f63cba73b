"""The arithmetic of a row, in float32.

A row's numbers are those of q = SOFTCAP tanh(SCALE x / SOFTCAP), x being the logits, or of
q = SCALE x where SOFTCAP is 0; both are constants of a kernel, and cost nothing at 0 and 1.

exp(x - m) is exp2((x - m) log2 e). The cheaper exp2(x log2 e - m log2 e), one fused multiply-add,
loses digits in proportion to m: at a common offset of 1e4 the probabilities would be off by 6e-4.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    """One instruction of the special function unit; 0 at -inf."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """To a few units in the last place, near 0 as well; one instruction of the same unit."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2  # the polynomial of Cephes' tanhf
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z
    return tl.where(tl.abs(x) < 0.625, x + x * series, 1.0 - 2.0 / (exp(2.0 * x) + 1.0))


@triton.jit
def capped(x, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """q of the logits x. -inf stays -inf, so that a cap gives no mass to what is masked."""
    q = x.to(tl.float32)
    if SOFTCAP != 0.0:
        q = tl.where(q == -INF, -INF, SOFTCAP * tanh(q * (SCALE / SOFTCAP)))
    elif SCALE != 1.0:
        q = q * SCALE
    return q


@triton.jit
def through_cap(g, q, SOFTCAP: tl.constexpr):
    """The gradient in q times dq/dx / SCALE = 1 - (q / SOFTCAP)^2; zeros stay, beside a NaN too."""
    if SOFTCAP != 0.0:
        t = q * (1.0 / SOFTCAP)
        g = tl.where((g == 0.0) | (q == -INF), 0.0, g * (1.0 - t * t))
    return g


@triton.jit
def origin_of(top):
    """The maximum, or 0 where nothing but -inf was seen, so that -inf less the origin is no NaN."""
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def weighted(e, centred):
    """``e centred``, and 0 in columns of -inf: they have neither p nor p log p."""
    return tl.where(centred == -INF, 0.0, e * centred)


@triton.jit
def entropy_of(total, centred_sum, log_total):
    """H = log sum_j e_j - sum_j p_j (q_j - row_max); 0 in a row without mass."""
    return tl.where(total == 0.0, 0.0, log_total - centred_sum / total)


@triton.jit
def coefficients_of(alpha, beta, row):
    """``(alpha, beta, needed)`` of a row; alpha = -inf says that nobody needs it."""
    alpha_row = tl.load(alpha + row)
    needed = alpha_row != -INF
    beta_row = tl.load(beta + row)
    return tl.where(needed, alpha_row, 0.0), tl.where(needed, beta_row, 0.0), needed


@triton.jit
def coefficient(alpha, beta, b, value, entropy):
    """``A = alpha + beta V + B H``. A coefficient of 0 silences its factor, NaN or not."""
    a = alpha + tl.where(beta == 0.0, 0.0, beta * value)
    return a + tl.where(b == 0.0, 0.0, b * entropy)


@triton.jit
def gradient(e, centred, total, log_total, a, b, live, ENTROPY: tl.constexpr):
    """``p (A + B log p)``; without ENTROPY B is 0 and ``e`` serves once more.

    Exactly 0 where p = 0 because q = -inf, and in rows that are not live, NaN or not.
    """
    if ENTROPY:
        log_p = centred - log_total
        g = tl.where(centred == -INF, 0.0, exp(log_p) * (a + b * log_p))
    else:
        g = tl.where(e == 0.0, 0.0, e * (a / total))
    return tl.where(live, g, 0.0)
