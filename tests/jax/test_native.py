"""The C++ row kernels in JAX programs on a CPU: the contract, and who calls them."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.experimental
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from irl_ops import _native
from irl_ops.jax import callback, native, private
from irl_ops.kernels.reference.measures import RowMeasures, Slopes

from ..kernels.backend import Backend, Case, cases, logits_for, vectors_for
from ..kernels.exact import PLAIN, Arithmetic, Readout
from ..kernels.measures_contract import MeasuresKernels
from ..kernels.memory import Placed, encode
from ..kernels.readout_contract import ReadoutKernels

ROOT = Path(__file__).resolve().parents[2]
DTYPES = Backend.dtypes
CALLERS = ["xla", "python"]


@pytest.fixture(params=CALLERS)
def caller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who calls the kernels in the test: XLA itself, or a callback."""
    let_call(request.param, monkeypatch)
    return str(request.param)


def let_call(caller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if caller == "python":
        monkeypatch.setattr(native, "called_by_xla", lambda: False)
    elif not native.called_by_xla():
        pytest.skip("needs a build with XLA's headers: pip install, or set IRL_OPS_XLA_INCLUDE")


def to_jax(stored: np.ndarray) -> np.ndarray:
    return stored.view(ml_dtypes.bfloat16) if stored.dtype == np.uint16 else stored


def from_jax(x: Any) -> np.ndarray:
    """bfloat16 as the bits that NumPy carries."""
    array = np.asarray(x)
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


class Called(Backend):
    """By XLA itself, or by a callback; each program is compiled once."""

    label_dtypes = (np.int32, np.int64)
    rounds = Arithmetic(step=2.0**-126)  # XLA's threads flush what is subnormal to 0

    def __init__(self, caller: str) -> None:
        self.caller = caller

    @functools.cache  # noqa: B019, the few that there are live as long as the tests
    def program(self, kernel: str, readout: Readout, **options: bool) -> Any:
        if readout != PLAIN:
            options |= readout.options
        return jax.jit(functools.partial(getattr(native, kernel), **options))

    def call(
        self, kernel: str, readout: Readout, q: Placed, *given: Any,
        named: dict[str, np.ndarray] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        # who calls is decided when a program is lowered
        wide = any(x.dtype == np.int64 for x in given if isinstance(x, np.ndarray))
        with pytest.MonkeyPatch.context() as patch, wide_integers(np.int64 if wide else None):
            let_call(self.caller, patch)
            run = self.program(kernel, readout, **options)
            out = run(to_jax(np.ascontiguousarray(q.rows)), *given, **(named or {}))
        results = out if isinstance(out, tuple) else (out,)
        return [None if x is None else from_jax(x) for x in results]

    def row_stats(self, q, labels, entropy=True, readout=PLAIN):
        return self.call("row_stats", readout, q, labels, entropy=entropy)

    def row_grad(self, q, labels, row_max, logsum, a, b, c, y, readout=PLAIN):
        vectors = (labels, row_max, logsum, a, b, c)
        (y.rows[...],) = self.call("row_grad", readout, q, *vectors)

    def row_stats_grad(self, q, alpha, beta, weight, y, readout=PLAIN):
        given = (alpha, beta, weight)[: 2 + (weight is not None)]
        *out, y.rows[...] = self.call("row_stats_grad", readout, q, *given)
        return out

    def row_measures(self, q, ids, wanted, view, readout=PLAIN):
        found = self.call("row_measures", readout, q, ids, named=view.given, wanted=wanted)
        return RowMeasures(*found)

    def row_measures_grad(self, q, ids, row_max, logsum, slopes, y, view, readout=PLAIN):
        given = (ids, row_max, logsum, Slopes(**vars(slopes)))
        (y.rows[...],) = self.call("row_measures_grad", readout, q, *given, named=view.given)

    def label_logit(self, q, labels, readout=PLAIN):
        return self.call("label_logit", readout, q, labels)[0]

    def set_label(self, y, labels, elements, readout=PLAIN, label_logit=None):
        given = (labels, elements, label_logit)[: 2 + (label_logit is not None)]
        (y.rows[...],) = self.call("set_label", readout, y, *given)


class TestCalledByJax(MeasuresKernels, ReadoutKernels, examples=20):
    forms: ClassVar = {caller: Called(caller) for caller in CALLERS}
    # V, and any leading axes
    cases = (
        *cases(1, 2, 17, 50257),
        Case((), 70),
        Case((1,), 70),
        Case((4, 1), 70),
        Case((2, 3, 2), 70),
    )
    wide = 2101
    shapes = st.sampled_from(cases[2:-1])  # compiled already
    readouts = (Readout(0.5, 8.0), Readout(3.0))
    certain_batches = 1
    measure_vocabs = (331,)
    measure_readouts = (readouts[0],)

    def measure_forms(self, part: str) -> list[tuple[str, str]]:
        """Each caller and each dtype: what the kernels compute is tested without JAX."""
        return [("xla", "float32"), ("xla", "bfloat16"), ("python", "float16")]

    def readout_forms(self) -> list[tuple[str, str, Readout]]:
        """The numbers reach the kernels: what those make of them is tested without JAX."""
        capped, scaled = self.readouts
        given = [(form, "float32", capped) for form in self.forms]
        return [*given, ("xla", "bfloat16", capped), ("python", "float16", scaled)]


def kernels(q: Any, labels: Any, a: Any, b: Any, c: Any) -> dict[str, tuple[Any, ...]]:
    """Every kernel on these arrays, in one program."""
    row_max, logsum, picked, entropy = native.row_stats(q, labels, entropy=True)
    return {
        "row_stats": (row_max, logsum, picked, entropy),
        "row_grad": (native.row_grad(q, labels, row_max, logsum, a, b, c),),
        "row_stats_grad": native.row_stats_grad(q, a, c, b),
        "set_label": (native.set_label(q, labels, c),),
    }


def compiled(function: Callable[..., Any], *given: Any) -> Any:
    """The results of a new program: what calls the kernels is decided when it is lowered."""
    return jax.jit(lambda *x: function(*x))(*given)


def wide_integers(dtype: Any) -> AbstractContextManager[Any]:
    # the oldest JAX that is supported has it among its experiments
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    return home.enable_x64(True) if dtype == np.int64 else nullcontext()


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_callers_and_threads_change_no_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 7 threads get a part each only above 7 * 2^17 elements; XLA brings as many as there are cores
    stored = encode(np.random.default_rng(0).standard_normal((30, 32_003)) * 3, dtype)
    given = (to_jax(stored), np.arange(30, dtype=np.int32) * 1000, *vectors_for(0, (30,)))
    results = []
    for caller, threads in (("python", 1), ("python", 7), ("xla", None)):
        with monkeypatch.context() as patched:
            patched.setattr(callback, "_threads", lambda threads=threads: threads)
            let_call(caller, patched)
            results.append(bits(compiled(kernels, *given)))
    assert results[0] == results[1] == results[2]


BUSY = """
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from irl_ops.jax import native

if sys.argv[1] == "python":
    native.called_by_xla = lambda: False


@jax.jit
def program(q, labels):
    total = 0.0
    for shift in range(16):  # of each other independent: XLA runs some on its pool
        row_max, logsum, picked, entropy = native.row_stats(q + shift, labels, entropy=True)
        dlogits = native.row_stats_grad(q + shift, picked, logsum, entropy)[3]
        total = total + row_max + logsum + picked + entropy + dlogits.sum(-1)
    return total


# enough elements for 4 threads
q = jnp.asarray(np.random.default_rng(0).standard_normal((16, 32_771)), jnp.float32)
labels = jnp.arange(16)
wanted = np.asarray(program(q, labels))


def dispatch(_):
    return jax.block_until_ready([program(q, labels) for _ in range(2)])


with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(dispatch, range(8)))
assert all(np.array_equal(x, wanted) for results in found for x in results)
print("done")
"""


@pytest.mark.parametrize(("caller", "threads"), [("xla", "1"), ("xla", "2"), ("python", "2")])
def test_many_programs_at_once_finish(
    caller: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 executions of 32 calls each. In a process of its own, so that a deadlock can be ended.

    A call that waited for tasks of its own on XLA's pool would end this at two threads.
    """
    let_call(caller, monkeypatch)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", BUSY, caller],
        env={**os.environ, "PYTHONPATH": search, "NPROC": threads},  # the size of XLA's pool
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["done"], done.stderr


@pytest.mark.parametrize("kernel", ["row_grad", "row_stats_grad", "set_label"])
def test_logits_that_live_on_stay_as_they_are(kernel: str, caller: str) -> None:
    stored = encode(logits_for(0, (4,), 2049, 3.0), "float32")
    q, labels, (a, b, c) = jnp.asarray(stored), np.arange(4, dtype=np.int32), vectors_for(0, (4,))

    def run(q: Any) -> Any:
        return kernels(q, labels, a, b, c)[kernel][-1]

    eager, (within, later) = run(q), compiled(lambda q: (run(q), q + 0), q)
    assert np.asarray(q).tobytes() == np.asarray(later).tobytes() == stored.tobytes()
    assert np.asarray(eager).tobytes() == np.asarray(within).tobytes() != stored.tobytes()


def test_dead_logits_give_their_memory_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    let_call("xla", monkeypatch)
    q = jnp.asarray(encode(logits_for(0, (4,), 2049, 3.0), "float32")) + 0
    one, address = jnp.ones(4), q.unsafe_buffer_pointer()
    wanted = np.asarray(native.row_stats_grad(q, one, one)[3])
    step = jax.jit(lambda q: native.row_stats_grad(q, one, one)[3], donate_argnums=0)
    within = step(q)
    assert within.unsafe_buffer_pointer() == address
    assert np.asarray(within).tobytes() == wanted.tobytes()


def zeros(text: str) -> np.ndarray:
    """Of float32[2,3], say."""
    dtype, sizes = text[:-1].split("[")
    return np.zeros([int(n) for n in sizes.split(",") if n], dtype)


@pytest.mark.parametrize(
    ("kernel", "given", "out", "message"),
    [
        (
            "row_stats",
            "float32[2,3,7] int32[2]",
            "float32[2,3] float32[2,3] float32[2,3]",
            r"labels is S32\[2\], accepted is S32\[2,3\] or S64",
        ),
        ("label_logit", "float32[3,7] float32[3]", "float32[3]", r"labels is F32\[3\]"),
        ("label_logit", "int32[3,7] int32[3]", "float32[3]", r"logits is S32.*F32, BF16 or F16"),
        ("label_logit", "float32[] int32[]", "float32[]", r"logits is F32\[\], accepted is \[...,"),
        ("label_logit", "float32[3,7] int32[3]", "float32[1,3]", r"label_logit is F32\[1,3\]"),
        ("label_logit", "float32[3,7] int32[3]", "float16[3]", r"label_logit is F16\[3\]"),
        (
            "row_stats_grad",
            "float32[2,7] float32[2] float32[3]",
            "float32[2] float32[2] float32[2,7]",
            r"beta is F32\[3\], accepted is F32\[2\]",
        ),
        (
            "row_stats_grad",
            "float32[2,7] float32[2] float32[2]",
            "float32[2] float32[2] float16[2,7]",
            r"dlogits is F16\[2,7\], accepted is F32\[2,7\]",
        ),
        (
            "set_label",
            "float32[2,7] int32[2] float32[2]",
            "float32[2,7]",
            "dlogits has to be the memory of the result",
        ),
    ],
)
def test_what_does_not_fit_is_refused(kernel, given, out, message, monkeypatch):
    let_call("xla", monkeypatch)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(zeros, out.split())]
    call = jax.jit(jax.ffi.ffi_call(f"irl_ops_{kernel}", types))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*map(zeros, given.split())))


@pytest.mark.parametrize(
    ("ids", "more", "given", "wanted", "message"),
    [
        (
            "float32[2,1]",
            "",
            "",
            "",
            r"ids is F32\[2,1\], accepted is S32\[2\] or S64 with one axis",
        ),
        ("int32[2,1]", "float32[2,7]", "keep_mask", "", r"keep_mask is F32.*, accepted is PRED"),
        (
            "int32[2,1]",
            "float32[3]",
            "row_scale",
            "",
            r"row_scale is F32\[3\], accepted is F32",
        ),
        ("int32[2,1]", "float32[2]", "temperature", "", "given names temperature"),
        ("int32[2,1]", "float32[2]", "row_scale keep_above", "", "given has 2 names for 1 arrays"),
        ("int32[2,3]", "", "", "", r"picked is F32\[2,1\], accepted is F32 of the sizes of ids"),
        ("int32[2,1]", "", "", "top1", r"top1 is F32\[2\], accepted is S32\[2\]"),
        ("int32[2,1]", "", "", "mean_logit", "one of mean_logit and kept, accepted are both"),
    ],
)
def test_measures_that_do_not_fit_are_refused(ids, more, given, wanted, message, monkeypatch):
    let_call("xla", monkeypatch)
    out = [np.zeros(2, np.float32)] * (2 + bool(wanted))
    out.insert(2, np.zeros((2, 1), np.float32))
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out]
    call = jax.ffi.ffi_call("irl_ops_row_measures", types)
    arrays = [zeros("float32[2,7]"), zeros(ids), *map(zeros, more.split())]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(functools.partial(call, given=given, wanted=wanted))(*arrays))


def test_what_it_serves_is_said(monkeypatch):
    assert native.unavailable("cpu") is None
    assert "run on the CPU" in native.unavailable("tpu")
    monkeypatch.setattr(native, "_import_error", ImportError("no such file"))
    assert "pip install ." in native.unavailable("cpu")


@pytest.mark.parametrize("api", [None, (0, 10_000), (10_000, 0)])
def test_targets_that_xla_would_refuse_are_not_registered(api, monkeypatch):
    monkeypatch.setattr(_native, "xla_api", api)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: pytest.fail("registered"))
    assert not native.called_by_xla.__wrapped__()
    assert native._running_api() >= (0, 1)


def test_a_callback_is_not_partitioned(monkeypatch):
    let_call("python", monkeypatch)
    monkeypatch.setattr(private, "partitions", lambda _: 2)
    with pytest.raises(NotImplementedError, match="shard_map"):
        compiled(native.row_stats, np.zeros((2, 3), np.float32), np.zeros(2, np.int32))


def test_torch_is_not_needed():
    code = "import sys, irl_ops.jax.native; print('torch' in sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False"]
