"""Scaled and soft-capped logits in the C++ row kernels, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from irl_ops import _native

from .native_rows import (
    DTYPES,
    EPS,
    ISAS,
    PLAIN,
    Exact,
    Placed,
    Readout,
    Vector,
    close,
    decode,
    encode,
    poisoned,
    run_grad,
    run_stats,
    run_stats_grad,
)

READOUTS = [Readout(0.0625), Readout(3.0), Readout(1.0, 30.0), Readout(0.5, 8.0), Readout(2.0, 1e4)]
NAMES = [f"scale {r.logit_scale:g}, cap {r.softcap:g}" for r in READOUTS]


def logits(sizes: tuple[int, ...], vocab: int, dtype: str, seed: int, start: int = 3) -> Placed:
    """From 0 to beyond what saturates each of the caps."""
    placed = Placed(dtype, sizes, vocab, start=start, gap=5)
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.01, 1.0, 20.0], (*sizes, 1))
    placed.rows[...] = encode(rng.standard_normal((*sizes, vocab)) * spread, dtype)
    return placed


def labels_of(sizes: tuple[int, ...], vocab: int, seed: int) -> np.ndarray:
    labels = np.random.default_rng(seed).integers(0, vocab, sizes)
    labels.flat[:2] = [-100, vocab]
    return labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("readout", READOUTS, ids=NAMES)
@pytest.mark.parametrize("vocab", [1, 33, 1000, 4129])
def test_kernels_match_float64(vocab: int, readout: Readout, isa: str, dtype: str) -> None:
    sizes = (2, 4)
    x, y = logits(sizes, vocab, dtype, vocab), Placed(dtype, sizes, vocab, start=1, gap=2)
    labels, rng = labels_of(sizes, vocab, 1), np.random.default_rng(2)
    values = decode(x.rows, dtype)
    q, slope = readout.q(values), readout.slope(values)
    q_error = readout.q_tolerance(q).max(-1)
    exact = Exact.of(q)

    row_max, logsum, picked, entropy = run_stats(x, labels, isa=isa, readout=readout)
    # Of p log p, an error of q counts log p times.
    reach = 2 * q_error * (1 + np.abs(exact.logp).max(-1))
    tolerance = exact.statistics_tolerance() + reach
    assert (np.abs(row_max - exact.row_max) <= q_error).all()
    assert (np.abs(logsum - exact.logsum) <= tolerance).all()
    assert (np.abs(entropy - exact.entropy) <= tolerance).all()
    good = (labels >= 0) & (labels < vocab)
    wanted = np.take_along_axis(q, np.where(good, labels, 0)[..., None], -1)[..., 0]
    assert (np.abs(picked - wanted)[good] <= (q_error + 0 * wanted)[good]).all()
    assert np.isnan(picked[labels >= vocab]).all() and (picked[labels < 0] == 0).all()

    a, b, c = (rng.standard_normal(sizes).astype(np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0

    def bound(total: np.ndarray, w: np.ndarray, total_error: np.ndarray) -> np.ndarray:
        """The plain kernels' own, that of q in log p, and that of dq/dx."""
        inner = np.abs(total)[..., None] + np.abs(w[..., None] * exact.logp)
        moved = exact.p * (inner + np.abs(w)[..., None]) * (2 * q_error + reach)[..., None]
        plain = exact.gradient_tolerance(total, w, total_error) + 2 * moved
        sized = exact.p * inner * (readout.slope_tolerance() + 4 * EPS * slope)
        return plain * slope + sized + 2.0**-146

    run_grad(x, labels, [row_max, logsum], [a, b, c], y, isa=isa, readout=readout)
    at_label = (np.arange(vocab) == labels[..., None]) * c[..., None]
    full = (exact.gradient(a, b) + at_label) * slope
    extra = np.abs(at_label) * (readout.slope_tolerance() + 4 * EPS * slope)
    close(y.rows, dtype, full, bound(a, b, np.zeros(sizes)) + extra)
    for weight in (None, b):
        out = run_stats_grad(x, a, c, weight, y, isa=isa, readout=readout)
        for ours, other in zip(out, (row_max, logsum, entropy), strict=True):
            np.testing.assert_array_equal(ours, other)
        w = np.zeros(sizes) if weight is None else weight.astype(np.float64)
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        error = (tolerance + q_error) * (np.abs(c) + np.abs(w)) + 2 * EPS * np.abs(total)
        close(y.rows, dtype, exact.gradient(total, w) * slope, bound(total, w, error))
        assert y.untouched_outside() and x.untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("readout", [PLAIN, *READOUTS], ids=["plain", *NAMES])
def test_ends_of_a_pass(readout: Readout, isa: str, dtype: str) -> None:
    """label_logit has the bits of row_stats; set_label is C dq/dx at the label."""
    sizes, vocab = (3, 4), 70
    x, labels = logits(sizes, vocab, dtype, 5), labels_of((3, 4), 70, 6)
    stats = run_stats(x, labels, isa=isa, readout=readout)
    picked = poisoned(sizes)
    where = (x.address, dtype, sizes, x.strides, vocab)
    label_vector = Vector(labels.astype(np.int64))
    _native.label_logit(*where, label_vector.address, picked.address, isa, *readout.numbers)
    np.testing.assert_array_equal(picked.values, stats[2])
    # Nor is the label's logit above the largest, or the log-likelihood above 0.
    best = decode(x.rows, dtype).argmax(-1)
    top = run_stats(x, best, isa=isa, readout=readout)
    np.testing.assert_array_equal(top[2], top[0])

    values = decode(x.rows, dtype)
    elements = Vector(np.random.default_rng(7).standard_normal(sizes).astype(np.float32))
    _native.set_label(
        *where, label_vector.address, elements.address, picked.address, *readout.numbers
    )
    at_label = np.arange(vocab) == labels[..., None]
    wanted = np.where(at_label, elements.values[..., None] * readout.slope(values), values)
    error = np.abs(elements.values)[..., None] * (readout.slope_tolerance() + 4 * EPS)
    close(x.rows, dtype, wanted, np.where(at_label, error, 0.0))
    assert x.untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("readout", [PLAIN, *READOUTS], ids=["plain", *NAMES])
def test_a_certain_label_has_no_positive_log_likelihood(readout: Readout, isa: str) -> None:
    """One logit far above the others: logsum >= 0 whatever the rounding of q."""
    x = Placed("float32", (500,), 64)
    rng = np.random.default_rng(0)
    x.rows[...] = rng.standard_normal((500, 64)) - 100
    x.rows[:, 7] = rng.uniform(1, 90, 500)
    _, logsum, picked, _ = (row_max, *_) = run_stats(x, np.full(500, 7), isa=isa, readout=readout)
    assert (logsum >= 0).all()
    np.testing.assert_array_equal(picked, row_max)


@pytest.mark.parametrize("isa", ISAS)
def test_edges(isa: str) -> None:
    """-inf has no mass and no gradient, inf is the end of the cap, a NaN stays one."""
    cap, largest = Readout(1.0, 4.0), np.finfo(np.float32).max
    x, y = (Placed("float32", (5,), 20) for _ in range(2))
    x.rows[...] = 1.0
    x.rows[:4, 3] = -np.inf, np.inf, np.nan, -largest
    x.rows[4] = -np.inf
    ones, labels = np.ones(5, np.float32), np.array([3, 3, 0, 3, 3])
    seen = [0, 1, 3]
    for weight in (None, ones):
        out = run_stats_grad(x, ones, ones, weight, y, isa=isa, readout=cap)
        exact = Exact.of(cap.q(decode(x.rows, "float32")[seen]))
        np.testing.assert_allclose(out[1][seen], exact.logsum, rtol=0, atol=60 * EPS)
        assert y.rows[0, 3] == 0 and np.abs(y.rows[0]).max() > 0
        assert np.abs(y.rows[[1, 3], 3]).max() <= 2.0**-20  # 1 - tanh^2, tanh rounded to 1
        assert np.isnan(y.rows[2]).all() and np.isnan(out[1][2])
        assert out[0][4] == out[1][4] == -np.inf and not y.rows[4].any()
    row_max, logsum, picked, _ = run_stats(x, labels, isa=isa, readout=cap)
    assert picked[[0, 1, 3, 4]].tolist() == [-np.inf, 4.0, -4.0, -np.inf]
    run_grad(x, labels, [row_max, logsum], [0 * ones, 0 * ones, ones], y, isa=isa, readout=cap)
    assert y.rows[[0, 4], 3].tolist() == [0.0, 0.0]

    # what the label's element is multiplied by; a 0 stays one beside a NaN
    picked = Vector(np.array([-np.inf, 4.0, np.nan, 0.0, np.nan], np.float32))
    elements = Vector(np.array([-np.inf, 1.0, 0.0, 2.0, 1.0], np.float32))
    threes = Vector(np.full(5, 3, np.int64))
    where = (y.address, "float32", (5,), y.strides, 20)
    addresses = (threes.address, elements.address, picked.address)
    _native.set_label(*where, *addresses, *cap.numbers)
    np.testing.assert_array_equal(y.rows[:, 3], [0.0, 0.0, 0.0, 2.0, np.nan])


def test_numbers_are_checked() -> None:
    x = logits((2,), 8, "float32", 0)
    labels, out = Vector(np.zeros(2, np.int64)), poisoned((2,))
    where = (x.address, "float32", (2,), x.strides, 8, labels.address, out.address)
    for scale in (0.0, -1.0, np.inf, np.nan, 1e39):
        with pytest.raises(ValueError, match=r"logit_scale is .*, accepted are finite numbers > 0"):
            _native.label_logit(*where, logit_scale=scale)
    for cap in (-1.0, np.inf, np.nan):
        with pytest.raises(
            ValueError, match=r"softcap is .*, accepted are finite numbers > 0, and"
        ):
            _native.label_logit(*where, softcap=cap)
    with pytest.raises(ValueError, match="label_logit is 0, a softcap needs it"):
        _native.set_label(*where, softcap=3.0)
