"""The C++ row kernels called on buffers, and what they should have computed, in float64 NumPy.

Every array that a kernel sees lies in a buffer of its own, at any offset and row stride, between
bytes that must stay as they were. bfloat16 is carried as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from irl_ops import _native

ISAS = _native.isas()
DTYPES = ["float32", "bfloat16", "float16"]
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
# Half a unit in the last place, relative, and half the smallest step.
ROUNDING = {
    "float32": (0.0, 0.0),
    "bfloat16": (2.0**-8, 2.0**-134),
    "float16": (2.0**-11, 2.0**-25),
}
# One element; two; below, at and above one vector and one unrolled step; above one block of the
# kernels (2048); odd and even vocabularies of real models.
VOCABS = [1, 2, 17, 63, 64, 65, 1000, 2049, 50257, 151936]
EPS = 2.0**-24
CANARY = 0xA5


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in the dtype's storage, rounded to nearest even."""
    values = np.asarray(values, np.float32)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE[dtype])
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The stored values in float64, exactly."""
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return stored.astype(np.float64)


@dataclass
class Placed:
    """Rows [*sizes, vocab] inside a canary-filled buffer, at an odd place if asked."""

    dtype: str
    sizes: tuple[int, ...]
    vocab: int
    start: int = 0  # elements between a 64-byte boundary and the first row
    gap: int = 0  # elements between rows
    buffer: np.ndarray = field(init=False)
    rows: np.ndarray = field(init=False)
    strides: list[int] = field(init=False)

    def __post_init__(self) -> None:
        storage = np.dtype(STORAGE[self.dtype])
        pitch = self.vocab + self.gap
        self.strides = [int(np.prod(self.sizes[k + 1 :])) * pitch for k in range(len(self.sizes))]
        count = int(np.prod(self.sizes)) * pitch
        self.buffer = np.full(count * storage.itemsize + 512, CANARY, np.uint8)
        first = -self.buffer.ctypes.data % 64 + 128 + self.start * storage.itemsize
        self.rows = np.ndarray(
            (*self.sizes, self.vocab),
            storage,
            self.buffer.data,
            first,
            [s * storage.itemsize for s in self.strides] + [storage.itemsize],
        )

    @property
    def address(self) -> int:
        return self.rows.ctypes.data

    def untouched_outside(self) -> bool:
        """Whether every byte that belongs to no row is still the canary."""
        keep = self.rows.copy()
        self.rows.view(np.uint8)[...] = CANARY
        clean = bool((self.buffer == CANARY).all())
        self.rows[...] = keep
        return clean


class Vector:
    """A row vector between canaries."""

    def __init__(self, values: np.ndarray):
        self.buffer = np.full(values.nbytes + 128, CANARY, np.uint8)
        self.values = self.buffer[64:-64].view(values.dtype).reshape(values.shape)
        self.values[...] = values
        self.address = self.values.ctypes.data

    def untouched_outside(self) -> bool:
        return bool((self.buffer[:64] == CANARY).all() and (self.buffer[-64:] == CANARY).all())


def poisoned(sizes: tuple[int, ...]) -> Vector:
    """An output that must be written: no result of a test is this number."""
    return Vector(np.full(sizes, -123456.75, np.float32))


@dataclass(frozen=True)
class Readout:
    """What the kernels make of logits: q = softcap tanh(logit_scale x / softcap), or the scale."""

    logit_scale: float = 1.0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        assert all(float(np.float32(x)) == x for x in (self.logit_scale, self.softcap))

    @property
    def numbers(self) -> tuple[float, float]:
        return self.logit_scale, self.softcap

    def q(self, x: np.ndarray) -> np.ndarray:
        if not self.softcap:
            return self.logit_scale * x
        return np.where(
            x == -np.inf, x, self.softcap * np.tanh(self.logit_scale * x / self.softcap)
        )

    def slope(self, x: np.ndarray) -> np.ndarray:
        if not self.softcap:
            return np.full(x.shape, self.logit_scale)
        with np.errstate(over="ignore"):  # cosh of a saturated logit
            return self.logit_scale / np.cosh(self.logit_scale * x / self.softcap) ** 2

    def q_tolerance(self, q: np.ndarray) -> np.ndarray:
        """tanh within 7 units of 2^-24, its argument rounded twice, the product once."""
        return (10 if self.softcap else self.logit_scale != 1) * EPS * np.abs(q)

    def slope_tolerance(self) -> float:
        """Of 1 - tanh^2: twice the error of tanh, and the square's and the difference's own."""
        return 24 * EPS * self.logit_scale if self.softcap else 0.0


PLAIN = Readout()


@dataclass
class Exact:
    """Row statistics in float64, from the textbook formulae."""

    row_max: np.ndarray
    logsum: np.ndarray
    entropy: np.ndarray
    p: np.ndarray
    logp: np.ndarray  # 0 where p is 0 because q = -inf

    @staticmethod
    def of(q: np.ndarray) -> Exact:
        row_max = q.max(-1)
        centred = q - row_max[..., None]
        logsum = np.log(np.exp(centred).sum(-1))
        logp = centred - logsum[..., None]
        p = np.exp(logp)
        logp = np.where(np.isneginf(q), 0.0, logp)
        return Exact(row_max, logsum, -(p * logp).sum(-1), p, logp)

    def gradient(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.p * (a[..., None] + b[..., None] * self.logp)

    def statistics_tolerance(self) -> np.ndarray:
        """logsum and entropy: exp within 2 ulp, sums of 32 numbers a lane, one final rounding."""
        return 20 * EPS + 2 * EPS * (self.logsum + self.entropy)

    def gradient_tolerance(self, a: np.ndarray, b: np.ndarray, a_error: np.ndarray) -> np.ndarray:
        """Of p (a + b log p): log p is rounded twice in float32, and p inherits that relatively.

        The last term is the step of subnormal numbers.
        """
        logp_error = EPS * (2 * np.abs(self.logp) + 2 * np.abs(self.logsum)[..., None] + 16)
        size = np.abs(a)[..., None] + np.abs(b[..., None] * self.logp)
        inner = a_error[..., None] + np.abs(b)[..., None] * logp_error + 4 * EPS * size
        return self.p * (size * logp_error + inner) + 2.0**-148 * (1 + size)


def close(stored: np.ndarray, dtype: str, exact: np.ndarray, tolerance: np.ndarray) -> None:
    """Within the tolerance of the float32 arithmetic plus the rounding to the dtype."""
    relative, absolute = ROUNDING[dtype]
    error = np.abs(decode(stored, dtype) - exact)
    bound = tolerance + relative * (np.abs(exact) + tolerance) + absolute
    worst = int((error - bound).argmax())
    assert (error <= bound).all(), (error.flat[worst], bound.flat[worst], worst)


def logits_for(
    seed: int, sizes: tuple[int, ...], vocab: int, dtype: str, scale: float, offset: float = 0.0
) -> np.ndarray:
    """Normal logits, with some -inf columns where the row has others."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*sizes, vocab)) * scale + offset
    q[..., 1::5] = -np.inf
    return encode(q, dtype)


def run_stats(
    q: Placed, labels: np.ndarray, entropy: bool = True, threads: int = 1, isa: str = "",
    readout: Readout = PLAIN,
) -> list[np.ndarray]:  # fmt: skip
    out = [poisoned(q.sizes) for _ in range(4)]
    label_vector = Vector(labels.astype(np.int64))
    _native.row_stats(
        q.address, q.dtype, q.sizes, q.strides, q.vocab, label_vector.address,
        *(v.address for v in out[:3]), out[3].address if entropy else 0, threads, isa,
        *readout.numbers,
    )  # fmt: skip
    assert all(v.untouched_outside() for v in [*out, label_vector])
    return [v.values for v in out]


def run_grad(
    q: Placed, labels: np.ndarray, stats: list[np.ndarray], abc: list[np.ndarray], y: Placed,
    threads: int = 1, isa: str = "", readout: Readout = PLAIN,
) -> None:  # fmt: skip
    inputs = [Vector(np.asarray(v, np.float32)) for v in (*stats, *abc)]
    label_vector = Vector(labels.astype(np.int64))
    _native.row_grad(
        q.address, q.dtype, q.sizes, q.strides, q.vocab, label_vector.address,
        *(v.address for v in inputs), y.address, y.strides, threads, isa,
        *readout.numbers,
    )  # fmt: skip


def run_stats_grad(
    q: Placed, alpha: np.ndarray, beta: np.ndarray, weight: np.ndarray | None, y: Placed,
    entropy: bool = True, threads: int = 1, isa: str = "", readout: Readout = PLAIN,
) -> list[np.ndarray]:  # fmt: skip
    inputs = [Vector(np.asarray(v, np.float32)) for v in (alpha, beta)]
    w = Vector(np.asarray(weight, np.float32)) if weight is not None else None
    out = [poisoned(q.sizes) for _ in range(3)]
    _native.row_stats_grad(
        q.address, q.dtype, q.sizes, q.strides, q.vocab, *(v.address for v in inputs),
        w.address if w else 0, out[0].address, out[1].address, out[2].address if entropy else 0,
        y.address, y.strides, threads, isa,
        *readout.numbers,
    )  # fmt: skip
    assert all(v.untouched_outside() for v in [*out, *inputs])
    return [v.values for v in out]
