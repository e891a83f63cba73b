"""The Pallas row kernels in interpret mode, against float64 NumPy. Nothing here needs a TPU.

Interpretation computes what the kernels say on blocks filled up with NaN, so that a mask that lets
the filling through is seen. It says nothing about the TPU's own exp, log and rounding.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from irl_ops.kernels.pallas import labels as label_kernels
from irl_ops.kernels.pallas.generations import (
    GENERATIONS,
    SMALLEST,
    Generation,
    generation,
    in_whole_tiles,
    resident_rows,
)
from irl_ops.kernels.pallas.row_grad import row_grad, row_grad_in_xla
from irl_ops.kernels.pallas.row_stats import row_stats
from irl_ops.kernels.pallas.row_stats_grad import row_stats_grad

DTYPES = ["float32", "bfloat16"]
EPS = 2.0**-24
BY_NAME = {g.name: g for g in GENERATIONS}
# Blocks of one tile, so that small logits have many, and whole rows never fit.
TINY = SMALLEST._replace(rows=16, columns=128, vmem=2**16)


class Exact:
    """Row statistics in float64, from the textbook formulae."""

    def __init__(self, q: np.ndarray) -> None:
        self.row_max = q.max(-1)
        self.logsum = np.log(np.exp(q - self.row_max[..., None]).sum(-1))
        logp = (q - self.row_max[..., None]) - self.logsum[..., None]
        self.p = np.exp(logp)
        self.logp = np.where(np.isneginf(q), 0.0, logp)
        self.entropy = -(self.p * self.logp).sum(-1)
        # A lane adds V/128 numbers one after the other, each addition rounding once; exp, log and
        # moving to another maximum cost a few roundings more.
        self.error = EPS * (20 + q.shape[-1] / 128) * (1 + self.logsum + self.entropy)

    def gradient(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.p * (a[..., None] + b[..., None] * self.logp)

    def close(
        self, got: jax.Array, wanted: np.ndarray, a: np.ndarray, b: np.ndarray, a_error: np.ndarray
    ) -> None:
        """Log p inherits the error of logsum and two roundings, and p inherits that relatively."""
        logp_error = self.error[..., None] + 2 * EPS * np.abs(self.logp) + 8 * EPS
        size = np.abs(a)[..., None] + np.abs(b[..., None] * self.logp)
        inner = a_error[..., None] + np.abs(b)[..., None] * logp_error + 4 * EPS * size
        bound = self.p * (size * logp_error + inner) + 2.0**-126 * (1 + size)  # XLA flushes to 0
        bound += (2.0**-8 if got.dtype == jnp.bfloat16 else EPS) * (np.abs(wanted) + bound)
        error = np.abs(np.asarray(got, np.float64) - wanted)
        assert (error <= bound).all(), (error - bound).max()


@functools.cache
def kernels(of: Generation, interpret: bool | pltpu.InterpretParams = True) -> tuple:
    """Compiled once a shape."""
    return tuple(
        jax.jit(functools.partial(kernel, of=of, interpret=interpret), static_argnames="entropy")
        if kernel is row_stats
        else jax.jit(functools.partial(kernel, of=of, interpret=interpret))
        for kernel in (row_stats, row_grad, row_stats_grad)
    )


def check(
    q: jax.Array, of: Generation, seed: int, interpret: bool | pltpu.InterpretParams = True
) -> None:
    """Every kernel on these logits."""
    lead, vocab = q.shape[:-1], q.shape[-1]
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(lead).astype(np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0
    labels = rng.integers(-1, vocab, lead)
    labels.flat[1::7] = 2**31 - 1
    values = np.asarray(q, np.float64)
    exact, (stats, grad, both) = Exact(values), kernels(of, interpret)

    row_max, logsum, picked, entropy = stats(q, jnp.asarray(labels), entropy=True)
    np.testing.assert_array_equal(row_max, exact.row_max)
    assert (np.abs(logsum - exact.logsum) <= exact.error).all()
    assert (np.abs(entropy - exact.entropy) <= exact.error).all()
    at = np.take_along_axis(values, np.clip(labels, 0, vocab - 1)[..., None], -1)[..., 0]
    at = np.where(labels < 0, 0.0, np.where(labels >= vocab, np.nan, at))
    np.testing.assert_array_equal(picked, at)

    got = grad(q, jnp.asarray(labels), row_max, logsum, a, b, c)
    assert got.dtype == q.dtype
    hit = (np.arange(vocab) == labels[..., None]) * c[..., None].astype(np.float64)
    slack = 2 * EPS * np.abs(c)  # of adding C
    exact.close(got, exact.gradient(a, b) + hit, np.abs(a) + slack, b, slack)

    for weight in (None, b):
        row_max, logsum, entropy, got = both(q, a, c, weight)
        np.testing.assert_array_equal(row_max, exact.row_max)
        assert (np.abs(logsum - exact.logsum) <= exact.error).all()
        w = np.zeros(lead) if weight is None else weight.astype(np.float64)
        if weight is not None:
            assert (np.abs(entropy - exact.entropy) <= exact.error).all()
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        a_error = exact.error * (np.abs(c) + np.abs(w)) + 2 * EPS * np.abs(total)
        a_error += 2 * EPS * np.abs(c * (exact.row_max + exact.logsum))  # V is rounded
        exact.close(got, exact.gradient(total, w), total, w, a_error)
        assert (np.asarray(got, np.float32)[np.isneginf(values)] == 0).all()


def logits_of(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 4.0) -> jax.Array:
    """Normal logits, with -inf in every fifth column."""
    q = np.random.default_rng(seed).standard_normal(shape) * scale
    q[..., 1::5] = -np.inf
    return jnp.asarray(q, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "vocab", "name"),
    [
        ((1,), 1, "v4"),
        ((37,), 2, "v5e"),
        ((5,), 17, "v4"),
        ((2, 37), 300, "v7x"),
        ((2, 16), 300, "v4"),
        ((5,), 50257, "v5e"),
        ((5,), 151936, "v4"),  # whole rows do not fit
    ],
)
def test_kernels_match_float64(lead, vocab, name, dtype):
    check(logits_of(vocab, (*lead, vocab), dtype), BY_NAME[name], vocab)


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(1, 700), (17, 129), (2, 16, 256)]),  # each is a compilation
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 60.0]),
    offset=st.sampled_from([0.0, -300.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_many_blocks_match_float64(shape, dtype, scale, offset, seed):
    q = logits_of(seed, shape, "float32", scale) + offset
    check(q.astype(dtype), TINY, seed)


@pytest.mark.parametrize("of", [TINY, BY_NAME["v5e"]], ids=["in two", "resident"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype, of):
    """Rows: silenced NaN, silenced inf, no mass, NaN, unread NaN, plain."""
    stats, grad, both = kernels(of)
    q = np.zeros((6, 300), np.float32)
    q[0], q[1, 7], q[2], q[3, 299], q[4] = np.nan, np.inf, -np.inf, np.nan, np.nan
    q = jnp.asarray(q, dtype)
    labels = jnp.asarray([5, 5, 5, 5, -1, 300])
    a = jnp.asarray([0, 0, 1, 1, 0, 1], jnp.float32)
    c = jnp.asarray([2, 3, 4, 5, 6, 7], jnp.float32)
    row_max, logsum, picked, h = (np.asarray(x) for x in stats(q, labels, entropy=True))
    assert np.isnan(row_max + logsum)[[0, 1, 3, 4]].all() and np.isnan(h)[[0, 1, 3, 4]].all()
    assert row_max[2] == logsum[2] == -np.inf and h[2] == 0
    np.testing.assert_array_equal(picked[1:], [0, -np.inf, 0, 0, np.nan])

    got = np.asarray(grad(q, labels, row_max, logsum, a, a, c), np.float32)
    wanted = np.zeros((3, 300))
    wanted[[0, 1, 2], 5] = [2, 3, 4]
    np.testing.assert_array_equal(got[:3], wanted)
    assert np.isnan(got[3]).all() and (got[4] == 0).all() and np.isfinite(got[5]).all()

    for weight in (None, a):
        alpha = a.at[4].set(-jnp.inf)
        row_max, logsum, h, got = both(q, alpha, 0 * a, weight)
        got = np.asarray(got, np.float32)
        assert (got[[0, 1, 2, 4]] == 0).all() and np.isnan(got[3]).all()
        assert row_max[4] == logsum[4] == 0 and (h is None or h[4] == 0)
        assert np.isfinite(got[5]).all() and (got[5] != 0).all()


@pytest.mark.parametrize(
    ("of", "dtype", "logit_scale", "softcap"),
    [
        (TINY, "float32", 0.25, 30.0),
        (BY_NAME["v5e"], "float32", 2.0, 0.5),
        (BY_NAME["v7x"], "bfloat16", 0.25, 30.0),
        (BY_NAME["v5e"], "float32", 3.0, None),
    ],
)
def test_softcap(of, dtype, logit_scale, softcap):
    """q = softcap tanh(logit_scale x / softcap), its statistics, and the gradient by x."""
    cap = dict(logit_scale=logit_scale, softcap=softcap)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 17, 300)) * 20, dtype).at[..., 5::7].set(-jnp.inf)
    labels = rng.integers(-1, 300, (2, 17))
    a, b, c = (rng.standard_normal((2, 17)).astype(np.float32) for _ in range(3))
    values = np.asarray(x, np.float64)
    bound = np.inf if softcap is None else softcap
    q = values * logit_scale if softcap is None else softcap * np.tanh(values * logit_scale / bound)
    slope = logit_scale * (1 - (q / bound) ** 2) if softcap else np.full_like(q, logit_scale)
    q = np.where(values == -np.inf, values, q)
    slope = slope if softcap is None else np.where(values == -np.inf, 0.0, slope)
    exact = Exact(q)
    # A few roundings of tanh and of its argument, which tanh scales by at most 1; the row's
    # statistics inherit the largest, and log p both its own and theirs.
    q_error = 10 * EPS * np.abs(q[np.isfinite(q)]).max()
    error = exact.error + 2 * q_error * (1 + np.abs(exact.logsum))

    def close(got, wanted, a, b, c):
        size = (np.abs(a) + np.abs(b) * (1 + np.abs(exact.logp).max()) + np.abs(c))[..., None]
        tolerance = size * 40 * (q_error + EPS * 10) * abs(logit_scale)
        tolerance = tolerance + (2.0**-8 if dtype == "bfloat16" else 0) * np.abs(wanted)
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= tolerance).all()

    run = functools.partial(row_stats, of=of, interpret=True, entropy=True, **cap)
    row_max, logsum, picked, entropy = jax.jit(run)(x, jnp.asarray(labels))
    assert (np.abs(row_max - exact.row_max) <= q_error).all()
    assert (np.abs(logsum - exact.logsum) <= error).all()
    assert (np.abs(entropy - exact.entropy) <= error * 10).all()  # sums |c| e^c, c to about 8
    at = np.take_along_axis(q, np.clip(labels, 0, 299)[..., None], -1)[..., 0]
    at = np.where(labels < 0, 0.0, at)
    assert np.isclose(picked, at, rtol=0, atol=q_error).all()  # -inf is close to itself

    hit = (np.arange(300) == labels[..., None]) * c[..., None]
    grads = (functools.partial(row_grad, of=of, interpret=True), row_grad_in_xla)
    for grad, with_b in itertools.product(grads, (True, False)):
        given = (b,) if with_b else (None,)
        got = jax.jit(functools.partial(grad, **cap))(
            x, jnp.asarray(labels), row_max, logsum, a, *given, c
        )
        bb = b if with_b else 0 * b
        close(got, slope * (exact.gradient(a, bb) + hit), a, bb, c)
    for weight in (None, b):
        run = functools.partial(row_stats_grad, of=of, interpret=True, **cap)
        *stats, entropy, got = jax.jit(run)(x, a, c, weight)
        assert (np.abs(stats[1] - exact.logsum) <= error).all()
        w = np.zeros_like(b) if weight is None else b
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        close(got, slope * exact.gradient(total, w), total, w, c)


def test_softcap_keeps_silent_rows_silent():
    """Zero coefficients give zero gradients of NaN logits, and lanes behind the row stay out."""
    x = jnp.full((16, 200), jnp.nan).at[8:].set(-100.0).at[12:].set(-jnp.inf)
    zero, cap = jnp.zeros(16), dict(logit_scale=1.0, softcap=5.0)
    labels = jnp.zeros(16, jnp.int32)
    for of in (TINY, BY_NAME["v5e"]):
        *_, got = row_stats_grad(x, zero, zero, zero, of=of, interpret=True, **cap)
        assert (got == 0).all()
        got = row_grad(x, labels, *[zero] * 5, of=of, interpret=True, **cap)
        assert (got == 0).all()
        row_max, logsum, *_ = row_stats(x, labels, of=of, interpret=True, **cap)
        # every one of 200 is -softcap; lanes 200 to 255 hold NaN in the interpreter
        np.testing.assert_allclose(row_max[8:12], -5.0, rtol=1e-6)
        np.testing.assert_allclose(logsum[8:12], np.log(200), rtol=1e-6)
        assert (row_max[12:] == -jnp.inf).all() and (logsum[12:] == -jnp.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_kernels(dtype):
    """Rows that share a tile, rows without a label, bad labels."""
    rng = np.random.default_rng(0)
    q = logits_of(0, (2, 48, 384), dtype)
    labels = rng.integers(-2, 400, (2, 48))
    labels[0, :9] = np.arange(9)
    elements = rng.standard_normal((2, 48)).astype(np.float32)
    good = (labels >= 0) & (labels < 384)
    at = np.clip(labels, 0, 383)[..., None]
    wanted = np.take_along_axis(np.asarray(q, np.float32), at, -1)[..., 0]
    wanted = np.where(good, wanted, np.where(labels < 0, 0, np.nan))
    assert in_whole_tiles(q.shape)
    picked = label_kernels.label_logit(q, jnp.asarray(labels), interpret=True)
    np.testing.assert_array_equal(picked, wanted)

    replaced = np.array(q, np.float32)
    rounded = np.asarray(jnp.asarray(elements, dtype), np.float32)
    for b, t in zip(*np.nonzero(good), strict=True):
        replaced[b, t, labels[b, t]] = rounded[b, t]
    got = label_kernels.set_label(q, jnp.asarray(labels), jnp.asarray(elements), interpret=True)
    np.testing.assert_array_equal(np.asarray(got, np.float32), replaced)

    cap = dict(logit_scale=0.5, softcap=3.0)
    exact = np.where(wanted == -np.inf, wanted, 3 * np.tanh(wanted / 6))
    picked = label_kernels.label_logit(q, jnp.asarray(labels), **cap, interpret=True)
    np.testing.assert_allclose(picked, exact, rtol=8 * EPS)
    slope = np.where(exact == -np.inf, 0.0, 0.5 * (1 - (exact / 3) ** 2))
    got = label_kernels.set_label(q, jnp.asarray(labels), elements, picked, **cap, interpret=True)
    got = np.take_along_axis(np.asarray(got, np.float32), at, -1)[..., 0]
    near = dict(rtol=2.0**-8 if dtype == "bfloat16" else 0, atol=20 * EPS)  # of 1 - tanh^2
    np.testing.assert_allclose(got[good], (elements * slope)[good], **near)


def test_no_races():
    """Two cores, each with clocks of its own; memory that was never written holds NaN.

    On whole blocks: the detector does not follow aliased outputs through ragged ones.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(logits_of(0, (32, 384), "float32"), TINY, 0, params)
    check(logits_of(0, (16, 256), "float32"), BY_NAME["v5e"], 0, params)
    assert not interpreter.races.races_found


@given(st.integers(1, 300_000), st.sampled_from(DTYPES), st.sampled_from(GENERATIONS))
def test_resident_rows_fit(vocab, dtype, of):
    """Two buffers for logits and two for gradients, in whole tiles; 0 where one group would not."""
    dtype = jnp.dtype(dtype)
    rows = resident_rows(dtype, vocab, of)
    assert rows % (32 // dtype.itemsize) == 0
    padded = -(-vocab // 128) * 128
    assert 4 * rows * padded * dtype.itemsize < of.vmem
    assert rows > 0 or of.name == "v4"


def test_device_kinds():
    for kind, name in {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU7x": "v7x"}.items():
        assert generation(kind).name == name
    assert generation("TPU v99") is SMALLEST
