"""The Pallas row kernels in interpret mode: the contract, and what is theirs. No TPU is needed.

Interpretation computes what the kernels say on blocks filled up with NaN, so that a mask that lets
the filling through is seen. It says nothing about the TPU's own exp, log and rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from irl_ops.jax import pallas as backend
from irl_ops.kernels import reference
from irl_ops.kernels.pallas import labels as label_kernels
from irl_ops.kernels.pallas.generations import (
    GENERATIONS,
    MOST_IDS,
    SMALLEST,
    Generation,
    generation,
    in_whole_tiles,
    resident_rows,
)
from irl_ops.kernels.pallas.row_grad import row_grad, row_grad_in_xla
from irl_ops.kernels.pallas.row_measures import row_measures
from irl_ops.kernels.pallas.row_measures_grad import row_measures_grad
from irl_ops.kernels.pallas.row_stats import row_stats
from irl_ops.kernels.pallas.row_stats_grad import row_stats_grad
from irl_ops.kernels.reference.measures import RowMeasures, Slopes

from .backend import Backend, Case, check, labels_for, logits_for, vectors_for
from .exact import PLAIN, Arithmetic, Exact, Readout, close
from .measures_contract import NAMES, Expected, MeasuresKernels, ids_for, view_for
from .measures_contract import Slopes as MeasureSlopes
from .memory import Placed
from .readout_contract import ReadoutKernels

DTYPES = ("float32", "bfloat16")
BY_NAME = {g.name: g for g in GENERATIONS}
# Blocks of one tile, so that small logits have many, and whole rows never fit.
TINY = SMALLEST._replace(rows=16, columns=128, vmem=2**16)


def to_jax(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x)


def from_jax(x: jax.Array) -> np.ndarray:
    array = np.asarray(x)
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


class Pallas(Backend):
    """As compiled for one generation; each program once."""

    dtypes = DTYPES
    label_dtypes = (np.int32,)
    # A lane adds V/128 numbers one after the other; exp, log and moving to another maximum cost a
    # few roundings more. XLA flushes what is subnormal to 0.
    rounds = Arithmetic(lanes=128, more=18, step=2.0**-126)

    def __init__(self, of: Generation, interpret: bool | pltpu.InterpretParams = True) -> None:
        self.of, self.interpret = of, interpret

    @functools.cache  # noqa: B019, the few that there are live as long as the tests
    def program(self, kernel: Callable[..., Any], readout: Readout, **options: bool) -> Any:
        return jax.jit(functools.partial(kernel, **options, **readout.options))

    def call(self, kernel: Any, readout: Readout, q: Placed, *given: Any, **options: bool) -> Any:
        options |= dict(of=self.of, interpret=self.interpret)
        moved = [None if x is None else to_jax(x) for x in given]
        return self.program(kernel, readout, **options)(to_jax(q.rows), *moved)

    def row_stats(self, q, labels, entropy=True, readout=PLAIN):
        out = self.call(row_stats, readout, q, labels, entropy=entropy)
        return [None if x is None else np.asarray(x) for x in out]

    def row_grad(self, q, labels, row_max, logsum, a, b, c, y, readout=PLAIN):
        dlogits = self.call(row_grad, readout, q, labels, row_max, logsum, a, b, c)
        assert dlogits.dtype == q.dtype
        y.rows[...] = from_jax(dlogits)

    def row_stats_grad(self, q, alpha, beta, weight, y, readout=PLAIN):
        *out, dlogits = self.call(row_stats_grad, readout, q, alpha, beta, weight)
        assert dlogits.dtype == q.dtype
        y.rows[...] = from_jax(dlogits)
        return [None if x is None else np.asarray(x) for x in out]

    def row_measures(self, q, ids, wanted, view, readout=PLAIN):
        options = dict(of=self.of, interpret=self.interpret, wanted=wanted)
        run = self.program(row_measures, readout, **options)
        found = run(to_jax(q.rows), ids, **view.given)
        return RowMeasures(*(None if x is None else np.asarray(x) for x in found))

    def row_measures_grad(self, q, ids, row_max, logsum, slopes, y, view, readout=PLAIN):
        run = self.program(row_measures_grad, readout, of=self.of, interpret=self.interpret)
        given = (ids, row_max, logsum, Slopes(**vars(slopes)))
        dlogits = run(to_jax(q.rows), *given, **view.given)
        assert dlogits.dtype == q.dtype
        y.rows[...] = from_jax(dlogits)

    def label_logit(self, q, labels, readout=PLAIN):
        return np.asarray(self.element("label_logit", readout, q, labels))

    def set_label(self, y, labels, elements, readout=PLAIN, label_logit=None):
        y.rows[...] = from_jax(self.element("set_label", readout, y, labels, elements, label_logit))

    def element(self, name: str, readout: Readout, q: Placed, *given: np.ndarray | None) -> Any:
        """XLA's own code serves rows that are not made of whole tiles."""
        arrays = [None if x is None else to_jax(x) for x in (q.rows, *given)]
        if in_whole_tiles(q.rows.shape):
            options = readout.options | {"interpret": self.interpret}
            return compiled(getattr(label_kernels, name), **options)(*arrays)
        return compiled(getattr(reference, name), **readout.options)(*arrays)


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, **options))


class TestPallas(MeasuresKernels, ReadoutKernels, examples=12):
    forms: ClassVar = {"tiny": Pallas(TINY)} | {x: Pallas(BY_NAME[x]) for x in ("v4", "v5e", "v7x")}
    readouts = (Readout(0.25, 30.0), Readout(2.0, 0.5), Readout(3.0))
    readout_vocabs = (300,)
    certain_batches = 1
    wide = 300
    shapes = st.sampled_from([Case((17,), 129), Case((2, 16), 256)])  # each is a compilation
    random_forms = ("tiny",)

    measure_vocabs = (331,)
    measure_views = (True,)  # the edges have none
    measure_readouts = (Readout(0.5, 8.0),)

    def measure_forms(self, part: str) -> list[tuple[str, str]]:
        """In several blocks, and in one."""
        return [("tiny", "bfloat16") if part == "numbers" else ("v7x", "float32")]

    def numbers(self) -> list[tuple[str, str, Case]]:
        return [
            ("v4", "float32", Case((1,), 1)),
            ("v5e", "bfloat16", Case((37,), 2)),
            ("v4", "bfloat16", Case((5,), 17)),
            ("v7x", "float32", Case((2, 37), 300)),
            ("v4", "bfloat16", Case((2, 16), 300)),
            ("tiny", "float32", Case((1,), 700)),
            ("v5e", "bfloat16", Case((5,), 50257)),
            ("v4", "float32", Case((5,), 151936)),  # whole rows do not fit
        ]

    @pytest.mark.parametrize("sizes", [(0,), (3, 0)], ids=str)
    def test_no_rows(self, kernels: Backend, dtype: str, sizes: tuple[int, ...]) -> None:
        """For which no kernel is launched."""
        q, one, labels = jnp.ones((*sizes, 128), dtype), jnp.ones(sizes), jnp.ones(sizes, jnp.int32)
        row_max, logsum, picked, entropy = backend.row_stats(q, labels, True)
        assert row_max.shape == logsum.shape == picked.shape == entropy.shape == sizes
        for out in (
            backend.row_grad(q, labels, row_max, logsum, one, one, one),
            *(backend.row_stats_grad(q, one, one, weight)[-1] for weight in (None, one)),
            backend.set_label(q, labels, one),
        ):
            assert out.shape == q.shape and out.dtype == q.dtype
        assert backend.label_logit(q, labels).shape == sizes

    def edge_forms(self) -> list[tuple[str, str]]:
        """In two passes, and resident."""
        return [("tiny", "float32"), ("tiny", "bfloat16"), ("v5e", "float32"), ("v7x", "bfloat16")]

    def readout_forms(self) -> list[tuple[str, str, Readout]]:
        first, second, third = self.readouts
        return [
            ("tiny", "float32", first),
            ("v5e", "float32", second),
            ("v7x", "bfloat16", first),
            ("v5e", "float32", third),
        ]


def test_more_ids_than_a_kernel_takes_are_left_to_xla():
    q = jax.random.normal(jax.random.key(0), (4, 128))
    ids = jnp.broadcast_to(jnp.arange(MOST_IDS + 1), (4, MOST_IDS + 1))  # the last is bad
    found = backend.row_measures(q, ids)
    np.testing.assert_array_equal(found.picked[:, :-1], q)
    assert np.isnan(found.picked[:, -1]).all()
    slopes = Slopes(jnp.zeros(4), None, jnp.ones(ids.shape), None, None)
    dlogits = backend.row_measures_grad(q, ids, found.row_max, found.logsum, slopes)
    np.testing.assert_array_equal(dlogits, np.ones((4, 128)))


def test_the_gradient_in_xla():
    """The same formula without a kernel, as a matmul can absorb it; B may be left out, of both."""
    kernels, q, y = TestPallas.forms["v5e"], *(Placed("float32", (9,), 300) for _ in range(2))
    labels, (a, b, c) = labels_for(0, (9,), 300, np.int32), vectors_for(0, (9,))
    for readout in (PLAIN, *TestPallas.readouts):
        q.holding(TestPallas().spread(300))
        exact = Exact.of(q.values, readout, kernels.rounds)
        row_max, logsum, *_ = kernels.row_stats(q, labels, readout=readout)
        given = [to_jax(x) for x in (q.rows, labels, row_max, logsum, a)]
        for weight in (None, b):
            in_xla = compiled(row_grad_in_xla, **readout.options)
            y.rows[...] = in_xla(*given, None if weight is None else weight, c)
            w = 0 * a if weight is None else weight
            wanted = exact.gradient(a, w) + exact.at_label(labels, c)
            error = exact.gradient_error(a, w, 0 * a) + exact.at_label_error(labels, c)
            close(y.rows, "float32", wanted, error)
            if weight is None:
                kernels.row_grad(q, labels, row_max, logsum, a, None, c, y, readout)
                close(y.rows, "float32", wanted, error)


def test_nan_in_the_gradient_in_xla():
    """Of a row that nobody needs it is silenced; elsewhere the whole row says so."""
    q = jnp.zeros((4, 300)).at[3].set(-jnp.inf)
    q = q.at[:3, 7].set(jnp.array([jnp.nan, jnp.nan, jnp.inf]))
    row_max, labels, a = q.max(-1), jnp.zeros(4, jnp.int32), jnp.array([0.0, 1.0, 1.0, 1.0])
    logsum = (jax.nn.logsumexp(q, -1) - row_max).at[3].set(-jnp.inf)
    found = row_grad_in_xla(q, labels, row_max, logsum, a, None, 0.0 * a)
    assert not found[0].any() and not found[3].any()
    assert np.isnan(found[1:3]).all()


def test_lanes_behind_a_capped_row_stay_out():
    """Every one of 200 is -softcap; lanes 200 to 255 hold NaN in the interpreter."""
    x, labels = jnp.full((16, 200), -100.0), jnp.zeros(16, jnp.int32)
    for of in (TINY, BY_NAME["v5e"]):
        cap = dict(logit_scale=1.0, softcap=5.0)
        row_max, logsum, *_ = row_stats(x, labels, of=of, interpret=True, **cap)
        np.testing.assert_allclose(row_max, -5.0, rtol=1e-6)
        np.testing.assert_allclose(logsum, np.log(200), rtol=1e-6)


def test_no_races():
    """Two cores, each with clocks of its own; memory that was never written holds NaN.

    On whole blocks: the detector does not follow aliased outputs through ragged ones.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    for of, case in ((TINY, Case((32,), 384)), (BY_NAME["v5e"], Case((16,), 256))):
        q, y = Placed("float32", *case), Placed("float32", *case)
        q.holding(logits_for(0, *case, 4.0))
        check(Pallas(of, params), q, y, labels_for(0, *case, np.int32), 0)
        if of is not TINY:
            continue
        kernels, ids = Pallas(of, params), ids_for(0, *case, np.int32)[:, :3]
        view, one = view_for(0, q.values, PLAIN), np.ones(32, np.float32)
        found = kernels.row_measures(q, ids, NAMES, view)
        slopes = MeasureSlopes(one, one, np.ones(ids.shape, np.float32), one, one)
        kernels.row_measures_grad(q, ids, found.row_max, found.logsum, slopes, y, view)
        exact = Expected(q.values, view, PLAIN, kernels.rounds)
        close(y.rows, y.dtype, *exact.gradient(ids, slopes))
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
