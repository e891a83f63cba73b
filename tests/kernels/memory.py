"""Rows in memory as kernels meet them: at any place and stride, between bytes that must stay.

The dtypes are those of logits by name; bfloat16, which NumPy lacks, is carried as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

STORAGE = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float64": np.float64,  # of the reference alone
}
CANARY = 0xA5


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in the dtype's storage: rounded to float32, and from there to nearest even."""
    if dtype == "float64":
        return np.asarray(values, np.float64)
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
    transposed: bool = False  # rows lie in the reverse order of axes, as [T, B, V] for [B, T, V]
    buffer: np.ndarray = field(init=False)
    rows: np.ndarray = field(init=False)
    strides: list[int] = field(init=False)  # of the leading axes, in elements

    def __post_init__(self) -> None:
        storage = np.dtype(STORAGE[self.dtype])
        pitch = self.vocab + self.gap
        axes = range(len(self.sizes))
        inner = [self.sizes[:k] if self.transposed else self.sizes[k + 1 :] for k in axes]
        self.strides = [int(np.prod(sizes)) * pitch for sizes in inner]
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
    def values(self) -> np.ndarray:
        """In float64."""
        return decode(self.rows, self.dtype)

    @property
    def address(self) -> int:
        return self.rows.ctypes.data

    def holding(self, values: np.ndarray) -> Placed:
        """Itself, with these values in its rows."""
        self.rows[...] = encode(values, self.dtype)
        return self

    def poison(self) -> None:
        """What no kernel may leave in a row."""
        self.rows.view(np.uint8)[...] = CANARY

    def untouched_outside(self) -> bool:
        """Whether every byte that belongs to no row is still the canary."""
        keep = self.rows.copy()
        self.poison()
        clean = bool((self.buffer == CANARY).all())
        self.rows[...] = keep
        return clean
