"""What the row kernels have to compute, in float64 NumPy, and how far rounding may lead from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import decode

EPS = 2.0**-24
# Half a unit in the last place, relative, and half the smallest step.
ROUNDING = {
    "float64": (0.0, 0.0),
    "float32": (0.0, 0.0),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float16": (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True)
class Arithmetic:
    """How a backend rounds.

    A number of ``chain`` stands for as many roundings that follow one another: the additions to
    one lane of a sum, and what exp and log are off by beyond two units in the last place. log p is
    rounded ``reach`` times before it is an exponent. Numbers below ``step`` may be lost.
    """

    eps: float = EPS
    lanes: float = np.inf
    more: float = 0.0
    reach: float = 2.0
    step: float = 2.0**-148

    def chain(self, vocab: int) -> float:
        return vocab / self.lanes + self.more


@dataclass(frozen=True)
class Readout:
    """What the kernels make of logits: q = softcap tanh(logit_scale x / softcap), or the scale."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        assert all(float(np.float32(x)) == x for x in (self.logit_scale, self.softcap or 0.0))

    def __str__(self) -> str:
        return f"scale {self.logit_scale:g}, cap {self.softcap or 0:g}"

    @property
    def options(self) -> dict[str, float | None]:
        """As the kernels of the reference take them."""
        return dict(logit_scale=self.logit_scale, softcap=self.softcap)

    def q(self, x: np.ndarray) -> np.ndarray:
        if self.softcap is None:
            return self.logit_scale * x
        capped = self.softcap * np.tanh(self.logit_scale * x / self.softcap)
        return np.where(np.isneginf(x), -np.inf, capped)  # what is masked has no mass

    def slope(self, x: np.ndarray) -> np.ndarray:
        if self.softcap is None:
            return np.full(x.shape, self.logit_scale)
        with np.errstate(over="ignore"):  # cosh of a saturated logit
            return self.logit_scale / np.cosh(self.logit_scale * x / self.softcap) ** 2

    def q_error(self, q: np.ndarray, eps: float) -> np.ndarray:
        """tanh within 7 units of 2^-24, its argument rounded twice, the product once."""
        largest = np.abs(np.where(np.isneginf(q), 0.0, q)).max(-1, initial=0.0)
        return (10 if self.softcap else self.logit_scale != 1) * eps * largest

    def slope_error(self, eps: float) -> float:
        """Of 1 - tanh^2: twice the error of tanh, and the square's and the difference's own."""
        return 24 * eps * self.logit_scale if self.softcap else 0.0


PLAIN = Readout()


@dataclass
class Exact:
    """Rows that have mass: their statistics and gradients, from the textbook formulae."""

    readout: Readout
    rounds: Arithmetic
    x: np.ndarray
    q: np.ndarray
    row_max: np.ndarray
    logsum: np.ndarray
    entropy: np.ndarray
    p: np.ndarray
    logp: np.ndarray  # 0 where p is 0 because q = -inf
    slope: np.ndarray  # dq/dx

    @staticmethod
    def of(x: np.ndarray, readout: Readout = PLAIN, rounds: Arithmetic = Arithmetic()) -> Exact:
        q = readout.q(x)
        row_max = q.max(-1)
        centred = q - row_max[..., None]
        logsum = np.log(np.exp(centred).sum(-1))
        logp = centred - logsum[..., None]
        p = np.exp(logp)
        logp = np.where(np.isneginf(q), 0.0, logp)
        entropy = -(p * logp).sum(-1)
        slope = readout.slope(x)
        return Exact(readout, rounds, x, q, row_max, logsum, entropy, p, logp, slope)

    def label_logit(self, labels: np.ndarray) -> np.ndarray:
        vocab = self.q.shape[-1]
        picked = np.take_along_axis(self.q, np.clip(labels, 0, vocab - 1)[..., None], -1)[..., 0]
        return np.where(labels < 0, 0.0, np.where(labels >= vocab, np.nan, picked))

    def at_label(self, labels: np.ndarray, c: np.ndarray) -> np.ndarray:
        """C dq/dx in the label's column, 0 elsewhere."""
        hit = np.arange(self.q.shape[-1]) == labels[..., None]
        with np.errstate(invalid="ignore"):
            return np.where(hit, np.float64(c)[..., None] * self.slope, 0.0)

    def gradient(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """p (A + B log p) dq/dx."""
        return self.p * (a[..., None] + b[..., None] * self.logp) * self.slope

    def total(self, alpha: np.ndarray, beta: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """A of ``row_stats_grad``."""
        value = self.row_max + self.logsum
        return np.float64(alpha) + np.float64(beta) * value + weight * self.entropy

    # --- Tolerances ---

    @property
    def max_error(self) -> np.ndarray:
        return self.readout.q_error(self.q, self.rounds.eps)

    @property
    def statistics_error(self) -> np.ndarray:
        """Of logsum and entropy: exp within 2 ulp, sums of 32 numbers a lane, one final rounding.

        An error of q counts log p times in p log p.
        """
        chain = self.rounds.chain(self.q.shape[-1])
        own = self.rounds.eps * (20 + chain + (2 + chain) * (self.logsum + self.entropy))
        return own + 2 * self.max_error * (1 + np.abs(self.logp).max(-1))

    def total_error(self, alpha: np.ndarray, beta: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Of A of ``row_stats_grad``, whose value is rounded before it is used."""
        value = self.row_max + self.logsum
        inherited = (self.statistics_error + self.max_error) * (np.abs(beta) + np.abs(weight))
        sizes = np.abs(self.total(alpha, beta, weight)) + np.abs(beta * value)
        return inherited + 2 * self.rounds.eps * sizes

    def gradient_error(self, a: np.ndarray, b: np.ndarray, a_error: np.ndarray) -> np.ndarray:
        """Log p is rounded, and p inherits that relatively; so it does an error of q.

        The last term is the step of subnormal numbers.
        """
        eps, reach = self.rounds.eps, np.abs(self.logp)
        chain = self.rounds.chain(self.q.shape[-1])
        sums = (2 + chain) * np.abs(self.logsum)[..., None]
        logp_error = eps * (self.rounds.reach * reach + sums + 16 + chain)
        size = np.abs(a)[..., None] + np.abs(b[..., None] * self.logp)
        inner = a_error[..., None] + np.abs(b)[..., None] * logp_error + 4 * eps * size
        error = self.p * (size * logp_error + inner) + self.rounds.step * (1 + size)
        steepness = np.abs(self.slope)
        if self.readout == PLAIN:
            return error
        of_q = self.max_error + self.max_error * (1 + reach.max(-1))
        moved = 4 * self.p * (size + np.abs(b)[..., None]) * of_q[..., None]
        bent = self.p * size * (self.readout.slope_error(eps) + 4 * eps * steepness)
        return (error + moved) * steepness + bent + 4 * self.rounds.step

    def at_label_error(self, labels: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Of C dq/dx, and of adding it."""
        eps, element = self.rounds.eps, np.abs(self.at_label(labels, c))
        hit = np.arange(self.q.shape[-1]) == labels[..., None]
        bent = np.abs(np.float64(c))[..., None] * self.readout.slope_error(eps) * hit
        return bent + (2 if self.readout == PLAIN else 6) * eps * element


def close(stored: np.ndarray, dtype: str, exact: np.ndarray, tolerance: np.ndarray) -> None:
    """Within the tolerance of the arithmetic plus the rounding to the dtype; overflow is none."""
    relative, absolute = ROUNDING[dtype]
    largest = 65504.0 if dtype == "float16" else np.inf
    found, exact = (np.clip(x, -largest, largest) for x in (decode(stored, dtype), exact))
    error = np.abs(found - exact)
    bound = tolerance + relative * (np.abs(exact) + tolerance) + absolute
    worst = np.unravel_index(int((error - bound).argmax()), error.shape) if error.size else ()
    assert (error <= bound).all(), (error[worst], bound[worst], worst)
