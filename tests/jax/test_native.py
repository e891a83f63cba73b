"""The C++ row kernels in JAX programs on a CPU, against the reference kernels in float64 NumPy."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from irl_ops import _native
from irl_ops.jax import callback, native, private
from irl_ops.kernels import reference

from ..kernels.native_rows import DTYPES, EPS, Exact, close, decode, encode, logits_for

ROOT = Path(__file__).resolve().parents[2]
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
    """bfloat16 as the bits that native_rows carries."""
    array = np.asarray(x)
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def kernels(q: Any, labels: Any, a: Any, b: Any, c: Any) -> dict[str, tuple[Any, ...]]:
    """Every kernel on these arrays, in one program."""
    row_max, logsum, picked, entropy = native.row_stats(q, labels, entropy=True)
    return {
        "row_stats": (row_max, logsum, picked, entropy),
        "row_stats without entropy": native.row_stats(q, labels)[:3],
        "row_grad": (native.row_grad(q, labels, row_max, logsum, a, b, c),),
        "row_stats_grad": native.row_stats_grad(q, a, c, b),
        "row_stats_grad without entropy": native.row_stats_grad(q, a, c),
        "label_logit": (native.label_logit(q, labels),),
        "set_label": (native.set_label(q, labels, c),),
    }


def compiled(function: Callable[..., Any], *given: Any) -> Any:
    """The results of a new program: what calls the kernels is decided when it is lowered."""
    return jax.jit(lambda *x: function(*x))(*given)


def wide_integers(dtype: Any) -> AbstractContextManager[Any]:
    # the oldest JAX that is supported has it among its experiments
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    return home.enable_x64(True) if dtype == np.int64 else nullcontext()


def vectors(sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Coefficients a, b, c with zeros among them: no A, no B, neither."""
    rng = np.random.default_rng(seed)
    a, b, c = (np.array(rng.standard_normal(sizes), np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0
    return [a, b, c]


@np.errstate(invalid="ignore")  # the reference multiplies 0 by inf, and then selects
def check(stored: np.ndarray, dtype: str, labels: np.ndarray) -> None:
    """Every kernel on logits whose rows have mass."""
    sizes, vocab = stored.shape[:-1], stored.shape[-1]
    a, b, c = vectors(sizes, vocab)
    with wide_integers(labels.dtype):
        got = compiled(kernels, to_jax(stored), labels, a, b, c)
    values = decode(stored, dtype)
    exact = Exact.of(values)
    tolerance = exact.statistics_tolerance()
    wide = [x.astype(np.float64) for x in (a, b, c)]

    wanted = reference.row_stats(values, labels, entropy=True)
    for name, count in (("row_stats", 4), ("row_stats without entropy", 3)):
        bounds = [0 * tolerance, tolerance, 0 * tolerance, tolerance]
        for x, y, bound in zip(got[name], wanted[:count], bounds[:count], strict=True):
            assert x.dtype == np.float32 and x.shape == sizes
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y))  # of bad labels
            assert (np.nan_to_num(np.abs(x - y)) <= bound).all()
    np.testing.assert_array_equal(got["label_logit"][0], wanted[2])

    (dlogits,) = got["row_grad"]
    gradient = reference.row_grad(values, labels, exact.row_max, exact.logsum, *wide)
    bound = exact.gradient_tolerance(a, b, np.zeros(sizes))
    at_label = (np.arange(vocab) == labels[..., None]) * np.abs(c[..., None])
    assert dlogits.dtype == to_jax(stored).dtype
    close(from_jax(dlogits), dtype, gradient, bound + EPS * at_label)

    for name, weight in (("row_stats_grad", b), ("row_stats_grad without entropy", None)):
        row_max, logsum, entropy, dlogits = got[name]
        np.testing.assert_array_equal(row_max, wanted[0])
        assert (np.abs(logsum - wanted[1]) <= tolerance).all()
        assert (entropy is None) == (weight is None)
        if weight is not None:
            assert (np.abs(entropy - wanted[3]) <= tolerance).all()
        w = np.zeros(sizes) if weight is None else wide[1]
        gradient = reference.row_stats_grad(
            values, wide[0], wide[2], None if weight is None else w
        )[3]
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        a_error = tolerance * (np.abs(c) + np.abs(w)) + 2 * EPS * np.abs(total)
        close(from_jax(dlogits), dtype, gradient, exact.gradient_tolerance(total, w, a_error))

    written = stored.copy()
    good = (labels >= 0) & (labels < vocab)
    at = np.clip(labels, 0, vocab - 1)[..., None]
    kept = np.take_along_axis(written, at, -1)
    np.put_along_axis(written, at, np.where(good[..., None], encode(c, dtype)[..., None], kept), -1)
    assert from_jax(got["set_label"][0]).tobytes() == written.tobytes()


@pytest.mark.parametrize("labels_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 50257])
def test_kernels_match_float64(vocab: int, dtype: str, labels_dtype: Any, caller: str) -> None:
    sizes = (2, 3) if vocab < 10_000 else (3,)
    labels = np.random.default_rng(vocab).integers(0, vocab, sizes).astype(labels_dtype)
    labels.flat[:2] = [-100, vocab]
    check(logits_for(vocab, sizes, vocab, dtype, scale=4.0), dtype, labels)


@pytest.mark.parametrize("sizes", [(), (1,), (4, 1), (2, 3, 2)])
def test_any_leading_axes(sizes: tuple[int, ...], caller: str) -> None:
    labels = np.random.default_rng(0).integers(0, 70, sizes, np.int32)
    check(logits_for(1, sizes, 70, "float32", scale=4.0), "float32", np.asarray(labels))


@pytest.mark.parametrize("sizes", [(0,), (2, 0)])
def test_no_rows(sizes: tuple[int, ...], caller: str) -> None:
    empty, labels = np.zeros(sizes, np.float32), np.zeros(sizes, np.int32)
    got = compiled(kernels, np.zeros((*sizes, 5), np.float32), labels, empty, empty, empty)
    assert all(x.shape[: len(sizes)] == sizes for x in jax.tree.leaves(got))


def test_labels_beyond_32_bits_are_bad(caller: str) -> None:
    """Cut to 32 bits, 2^32 + 3 would be a good label."""
    labels = np.array([2**32 + 3, -(2**32) + 3], np.int64)
    check(logits_for(0, (2,), 70, "float32", scale=1.0), "float32", labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_mass(dtype: str, caller: str) -> None:
    stored = encode(np.full((2, 70), -np.inf), dtype)
    one, labels = np.ones(2, np.float32), np.array([-1, 5], np.int32)
    got = compiled(kernels, to_jax(stored), labels, one, one, one)
    for name in ("row_stats", "row_stats_grad"):
        assert (np.stack(got[name][:2]) == -np.inf).all()
    np.testing.assert_array_equal(got["row_stats"][2], [0, -np.inf])
    assert (got["row_stats"][3] == 0).all() and (got["row_stats_grad"][2] == 0).all()
    for name in ("row_stats_grad", "row_stats_grad without entropy"):
        assert (decode(from_jax(got[name][3]), dtype) == 0).all()
    gradient = np.zeros((2, 70))
    gradient[1, 5] = 1
    np.testing.assert_array_equal(decode(from_jax(got["row_grad"][0]), dtype), gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_nobody_needs(dtype: str, caller: str) -> None:
    """alpha = -inf: nothing of the row is read, and everything is 0; the next row is as ever."""
    stored = logits_for(0, (2, 100), 100, dtype, 3.0)[:2, 0].copy()
    stored[0] = encode(np.full(100, np.nan), dtype)
    alpha, one = np.array([-np.inf, 1], np.float32), np.ones(2, np.float32)
    for weight in ((), (one,)):
        row_max, logsum, entropy, dlogits = compiled(
            native.row_stats_grad, to_jax(stored), alpha, one, *weight
        )
        assert row_max[0] == 0 and logsum[0] == 0 and (entropy is None or entropy[0] == 0)
        gradient = decode(from_jax(dlogits), dtype)
        assert not gradient[0].any() and np.isfinite(gradient[1]).all() and gradient[1].any()


def test_nan_propagates_in_rows_that_are_read(caller: str) -> None:
    stored = np.zeros((2, 2101), np.float32)
    stored[0, 2100] = np.nan
    one, labels = np.ones(2, np.float32), np.zeros(2, np.int32)
    got = compiled(kernels, stored, labels, one, one, one)
    assert np.isnan(got["row_stats"][0][0] + got["row_stats"][1][0])
    for name in ("row_grad", "row_stats_grad", "row_stats_grad without entropy"):
        gradient = got[name][-1]
        assert np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_callers_and_threads_change_no_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 7 threads get a part each only above 7 * 2^17 elements; XLA brings as many as there are cores
    stored = encode(np.random.default_rng(0).standard_normal((30, 32_003)) * 3, dtype)
    given = (to_jax(stored), np.arange(30, dtype=np.int32) * 1000, *vectors((30,), 0))
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
    return jax.block_until_ready([program(q, labels) for _ in range(4)])


with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(dispatch, range(8)))
assert all(np.array_equal(x, wanted) for results in found for x in results)
print("done")
"""


@pytest.mark.parametrize(("caller", "threads"), [("xla", "1"), ("xla", "2"), ("python", "2")])
def test_many_programs_at_once_finish(
    caller: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 executions of 32 calls each. In a process of its own, so that a deadlock can be ended.

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
    stored = logits_for(0, (4,), 2049, "float32", 3.0)
    q, labels, (a, b, c) = jnp.asarray(stored), np.arange(4, dtype=np.int32), vectors((4,), 0)

    def run(q: Any) -> Any:
        return kernels(q, labels, a, b, c)[kernel][-1]

    eager, (within, later) = run(q), compiled(lambda q: (run(q), q + 0), q)
    assert np.asarray(q).tobytes() == np.asarray(later).tobytes() == stored.tobytes()
    assert np.asarray(eager).tobytes() == np.asarray(within).tobytes() != stored.tobytes()


def test_dead_logits_give_their_memory_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    let_call("xla", monkeypatch)
    q = jnp.asarray(logits_for(0, (4,), 2049, "float32", 3.0)) + 0
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
