"""A backend as the contract sees it, the rows it is given, and the check of all its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from .exact import PLAIN, Arithmetic, Exact, Readout, close
from .memory import Placed, encode

Array = np.ndarray


class Backend(ABC):
    """The kernels of ``irl_ops.kernels.reference``; vectors are float32, in any order of axes.

    Gradients are written to ``y``, which may be the logits.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    label_dtypes: tuple[Any, ...] = (np.int64,)
    rounds = Arithmetic()

    @abstractmethod
    def row_stats(
        self, q: Placed, labels: Array, entropy: bool = True, readout: Readout = PLAIN
    ) -> tuple[Array, Array, Array, Array | None]: ...

    @abstractmethod
    def row_grad(
        self, q: Placed, labels: Array, row_max: Array, logsum: Array, a: Array, b: Array, c: Array,
        y: Placed, readout: Readout = PLAIN,
    ) -> None: ...  # fmt: skip

    @abstractmethod
    def row_stats_grad(
        self, q: Placed, alpha: Array, beta: Array, weight: Array | None, y: Placed,
        readout: Readout = PLAIN,
    ) -> tuple[Array, Array, Array | None]: ...  # fmt: skip

    @abstractmethod
    def label_logit(self, q: Placed, labels: Array, readout: Readout = PLAIN) -> Array: ...

    @abstractmethod
    def set_label(
        self, y: Placed, labels: Array, elements: Array, readout: Readout = PLAIN,
        label_logit: Array | None = None,
    ) -> None: ...  # fmt: skip


class Case(NamedTuple):
    """Rows of one size."""

    sizes: tuple[int, ...]
    vocab: int

    def __str__(self) -> str:
        return "x".join(map(str, (*self.sizes, self.vocab)))


def cases(*vocabs: int) -> tuple[Case, ...]:
    """Several rows along two axes; of long ones, few."""
    return tuple(Case((2, 3) if vocab < 10_000 else (3,), vocab) for vocab in vocabs)


def logits_for(
    seed: int, sizes: tuple[int, ...], vocab: int, scale: float, offset: float = 0.0
) -> Array:
    """Normal logits, with some -inf columns where the row has others."""
    q = np.random.default_rng(seed).standard_normal((*sizes, vocab)) * scale + offset
    q[..., 1::5] = -np.inf
    return q


def labels_for(seed: int, sizes: tuple[int, ...], vocab: int, dtype: Any) -> Array:
    """Good ones, none, and bad ones just outside and far outside."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    far = [info.min, info.max, 2**31 - 1, -100, vocab]
    if dtype == np.int64:  # cut to 32 bits these would be good
        far += [2**32, 2**32 + vocab - 1, -(2**32)]
    labels = np.where(
        rng.random(sizes) < 0.75, rng.integers(0, vocab, sizes), rng.choice(far, sizes)
    )
    labels.flat[2:4] = [-1, vocab]
    return labels.astype(dtype)


def vectors_for(seed: int, sizes: tuple[int, ...]) -> list[Array]:
    """Coefficients with zeros among them: no A, no B, neither. The first axis is the innermost."""
    rng = np.random.default_rng(seed)
    a, b, c = (np.array(rng.standard_normal(sizes), np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0
    return [np.array(x, order="F") for x in (a, b, c)]


def check(
    kernels: Backend, q: Placed, y: Placed, labels: Array, seed: int, readout: Readout = PLAIN
) -> None:
    """Every kernel, on rows that have mass."""
    x = q.values
    exact = Exact.of(x, readout, kernels.rounds)
    given = {"readout": readout}

    def check_statistics(row_max: Array, logsum: Array, entropy: Array | None) -> None:
        for found in filter(lambda out: out is not None, (row_max, logsum, entropy)):
            assert found.shape == q.sizes
            assert found.dtype == (np.float64 if q.dtype == "float64" else np.float32)
        assert (np.abs(row_max - exact.row_max) <= exact.max_error).all()
        for found, wanted in ((logsum, exact.logsum), (entropy, exact.entropy)):
            assert found is None or (np.abs(found - wanted) <= exact.statistics_error).all()

    wanted = exact.label_logit(labels)
    good = np.isfinite(wanted)
    for entropy in (False, True):
        row_max, logsum, picked, h = kernels.row_stats(q, labels, entropy, **given)
        assert (h is not None) == entropy
        check_statistics(row_max, logsum, h)
        np.testing.assert_array_equal(np.where(good, 0.0, picked), np.where(good, 0.0, wanted))
        assert (np.abs(picked[good] - wanted[good]) <= np.asarray(exact.max_error)[good]).all()
        np.testing.assert_array_equal(kernels.label_logit(q, labels, **given), picked)
        # nor is a log-likelihood above 0
        assert (picked <= row_max)[good & (labels >= 0)].all() and (logsum >= 0).all()

    a, b, c = vectors_for(seed, q.sizes)
    none = np.zeros(q.sizes)
    y.poison()
    kernels.row_grad(q, labels, row_max, logsum, a, b, c, y, **given)
    error = exact.gradient_error(a, b, none) + exact.at_label_error(labels, c)
    close(y.rows, y.dtype, exact.gradient(a, b) + exact.at_label(labels, c), error)
    assert y.untouched_outside() and q.untouched_outside()

    for weight in (None, b):
        y.poison()
        *statistics, h = kernels.row_stats_grad(q, a, c, weight, y, **given)
        assert (h is None) == (weight is None)
        check_statistics(*statistics, h)
        w = none if weight is None else np.float64(weight)
        total = exact.total(a, c, w)
        error = exact.gradient_error(total, w, exact.total_error(a, c, w))
        close(y.rows, y.dtype, exact.gradient(total, w), error)
        assert not y.values[np.isneginf(x)].any()
        assert y.untouched_outside() and q.untouched_outside()

    before = y.rows.copy()
    kernels.set_label(y, labels, c, label_logit=picked if readout.softcap else None, **given)
    hit = np.arange(q.vocab) == labels[..., None]
    assert (y.rows == before)[~hit].all() and y.untouched_outside()
    elements, error = exact.at_label(labels, c), exact.at_label_error(labels, c)
    if readout == PLAIN:  # rounded once
        np.testing.assert_array_equal(y.rows[hit], encode(elements, y.dtype)[hit])
    else:
        close(np.where(hit, y.rows, 0).astype(y.rows.dtype), y.dtype, elements, error)
    np.testing.assert_array_equal(q.values, x)
