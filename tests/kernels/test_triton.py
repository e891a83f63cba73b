"""The Triton row kernels, interpreted, against float64 NumPy; both forms of the heavy one."""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irl_ops.kernels.triton import dispatch
from irl_ops.torch import triton as backend

from .native_rows import (
    CANARY,
    DTYPES,
    EPS,
    Exact,
    Placed,
    close,
    decode,
    encode,
    logits_for,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of kernels that a test calls by itself
]
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def several(vocab: int) -> dispatch.Resident:
    """In three to five parts where the row is long enough, else in two of which one is empty."""
    lanes = 1 << max(7, (vocab - 1).bit_length() - 2)
    return dispatch.Resident(lanes, max(2, -(-vocab // lanes)), 4)


FORMS: dict[str, Callable[[int], Any]] = {
    "one part": lambda vocab: dispatch.Resident(1 << max(7, (vocab - 1).bit_length()), 1, 4),
    "several parts": several,
    # small tiles, so that there are several, a last one, and rows shorter than one
    "two passes": lambda vocab: dispatch.Tiles(2, 32 if vocab < 5000 else 8192, 4),
}


@contextmanager
def formed(form: str, block: int = 64) -> Iterator[None]:
    """The heavy kernel in this form, the statistics in tiles as small, and blocks as small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "row_stats_grad", lambda vocab, *_, **__: FORMS[form](vocab))
        patch.setattr(dispatch, "row_stats", lambda vocab, _: FORMS["two passes"](vocab))
        patch.setattr(dispatch, "row_grad", lambda _: dispatch.Block(block, 4))
        yield


def tensor(placed: Placed) -> Tensor:
    """The same memory."""
    rows = placed.rows.view(np.int16) if placed.dtype == "bfloat16" else placed.rows
    found = torch.from_numpy(rows)
    return found.view(torch.bfloat16) if placed.dtype == "bfloat16" else found


def vectors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in arrays]


def check_all(q: Placed, y: Placed, labels: np.ndarray, form: str, seed: int = 0) -> None:
    """Every kernel on these logits against float64."""
    rng = np.random.default_rng(seed)
    values = decode(q.rows, q.dtype)
    exact = Exact.of(values)
    tolerance = exact.statistics_tolerance()
    logits, dlogits, of_rows = tensor(q), tensor(y), torch.from_numpy(labels)

    with formed(form):
        row_max, logsum, picked, entropy = backend.row_stats(logits, of_rows, True)
    np.testing.assert_array_equal(row_max, exact.row_max)
    assert (np.abs(logsum.numpy() - exact.logsum) <= tolerance).all()
    assert (np.abs(entropy.numpy() - exact.entropy) <= tolerance).all()
    wanted = np.take_along_axis(values, np.clip(labels, 0, q.vocab - 1)[..., None], -1)[..., 0]
    wanted = np.where(labels < 0, 0.0, np.where(labels >= q.vocab, np.nan, wanted))
    np.testing.assert_array_equal(picked, wanted)
    np.testing.assert_array_equal(backend.label_logit(logits, of_rows), wanted)

    # coefficients with zeros among them: no A, no B, neither
    a, b, c = (rng.standard_normal(q.sizes).astype(np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0
    with formed(form, block=64 if q.vocab < 5000 else 4096):
        backend.row_grad(logits, of_rows, row_max, logsum, *vectors(a, b, c), dlogits)
    at_label = (np.arange(q.vocab) == labels[..., None]) * c[..., None]
    bound = exact.gradient_tolerance(a, b, np.zeros(q.sizes))
    close(y.rows, y.dtype, exact.gradient(a, b) + at_label, bound + EPS * np.abs(at_label))
    assert y.untouched_outside() and q.untouched_outside()

    for weight in (None, b):
        y.rows.view(np.uint8)[...] = CANARY
        given = [*vectors(a, c), None if weight is None else vectors(weight)[0]]
        with formed(form):
            out = backend.row_stats_grad(logits, *given, dlogits)
        np.testing.assert_array_equal(out[0], exact.row_max)
        assert (np.abs(out[1].numpy() - exact.logsum) <= tolerance).all()
        w = np.zeros(q.sizes) if weight is None else weight.astype(np.float64)
        if weight is not None:
            assert (np.abs(out[2].numpy() - exact.entropy) <= tolerance).all()
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        a_error = tolerance * (np.abs(c) + np.abs(w)) + 2 * EPS * np.abs(total)
        bound = exact.gradient_tolerance(total, w, a_error)
        close(y.rows, y.dtype, exact.gradient(total, w), bound)
        assert (decode(y.rows, y.dtype)[np.isneginf(values)] == 0).all()
        assert y.untouched_outside() and q.untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [1, 2, 8, 17, 64, 1000, 50257, 151936])
def test_kernels_match_float64(vocab: int, form: str, dtype: str) -> None:
    sizes = (2, 3) if vocab < 10_000 else (2,)
    q = Placed(dtype, sizes, vocab, start=3, gap=5)
    q.rows[...] = logits_for(vocab, sizes, vocab, dtype, scale=4.0)
    labels = np.random.default_rng(vocab).integers(0, vocab, sizes)
    labels.flat[:2] = [-100, vocab]
    check_all(q, Placed(dtype, sizes, vocab, start=1, gap=2), labels, form)


@given(data=st.data())
@settings(max_examples=60)
def test_kernels_match_float64_anywhere(data: st.DataObject) -> None:
    """Random shapes, strides, alignments, spreads and offsets."""
    draw = data.draw
    dtype, form = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(sorted(FORMS)))
    sizes = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    vocab = draw(st.integers(1, 200) | st.sampled_from([128, 256]))
    start, gap = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    q = Placed(dtype, sizes, vocab, start, gap)
    alike = draw(st.booleans())  # the gradient's rows start as far from a boundary, or they do not
    start, gap = (start, gap) if alike else (draw(st.integers(0, 20)), draw(st.integers(0, 20)))
    y = Placed(dtype, sizes, vocab, start, gap)
    seed = draw(st.integers(0, 2**32 - 1))
    # a spread of 60 reaches probabilities that are subnormal, and 0
    q.rows[...] = logits_for(
        seed, sizes, vocab, dtype, draw(st.sampled_from([0.0, 1.0, 60.0])),
        draw(st.sampled_from([0.0, -300.0, 1e4])),
    )  # fmt: skip
    labels = np.random.default_rng(seed).integers(-2, vocab + 2, sizes)
    check_all(q, y, labels, form, seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["ascending", "descending", "one peak late"])
def test_the_running_maximum_may_move(order: str, form: str) -> None:
    """In every tile, in the first only, and by a factor beyond float32."""
    ramp = np.linspace(-50, 50, 999)
    peak = np.where(np.arange(999) == 997, 150.0, np.sin(ramp))
    q = Placed("float32", (1,), 999)
    q.rows[...] = {"ascending": ramp, "descending": ramp[::-1], "one peak late": peak}[order]
    check_all(q, Placed("float32", (1,), 999), np.zeros(1, np.int64), form)


@pytest.mark.parametrize("form", FORMS)
def test_an_offset_loses_nothing(form: str) -> None:
    """value = row_max + logsum is kept as two numbers, so logsum ignores a common offset."""
    near, far = Placed("float32", (2,), 300), Placed("float32", (2,), 300)
    far.rows[...] = logits_for(1, (2,), 300, "float32", scale=50.0, offset=1e4)
    near.rows[...] = far.rows - np.float32(1e4)  # exact
    one, y = torch.ones(2), torch.empty(2, 300)
    for entropy_weight in (None, one):
        gradients = []
        for q in (near, far):
            with formed(form):
                out = backend.row_stats_grad(tensor(q), one, 0 * one, entropy_weight, y)
            gradients.append([*out[1:], y.clone()])
        for a, b in zip(*gradients, strict=True):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 331])
def test_in_place_is_the_same(vocab: int, dtype: str, form: str) -> None:
    alpha, beta, weight = vectors(*np.random.default_rng(vocab).standard_normal((3, 4)))
    for w in (None, weight):
        q, y = (Placed(dtype, (4,), vocab, start=7, gap=3) for _ in range(2))
        q.rows[...] = logits_for(vocab, (4,), vocab, dtype, 3.0)
        with formed(form):
            apart = backend.row_stats_grad(tensor(q), alpha, beta, w, tensor(y))
            within = backend.row_stats_grad(tensor(q), alpha, beta, w, tensor(q))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(within, apart, strict=True))
        np.testing.assert_array_equal(q.rows, y.rows)
        assert q.untouched_outside()


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_no_distributions(form: str) -> None:
    """One finite logit; none at all; inf; NaN. Then the same with nothing to compute."""
    q = torch.full((5, 70), -torch.inf)
    q[0], q[1, 33], q[3, 5], q[4, 69] = 0.5, 2.0, torch.inf, torch.nan
    one, labels, y = torch.ones(5), torch.full((5,), -1), torch.empty(5, 70)
    with formed(form):
        row_max, logsum, _, entropy = backend.row_stats(q, labels, True)
        assert row_max[:3].tolist() == [0.5, 2.0, -torch.inf]
        assert logsum[1] == 0 and logsum[2] == -torch.inf
        assert entropy[1] == entropy[2] == 0
        broken = row_max + logsum
        assert broken[3:].isnan().all() and entropy[3:].isnan().all()
        for w in (None, one):
            backend.row_stats_grad(q, one, 0 * one, w, y)
            assert y[1, 33] == 1 and y[1].count_nonzero() == 1 and not y[2].any()
            assert y[4, 69].isnan() and y[3, 5].isnan()
            backend.row_stats_grad(q, 0 * one, 0 * one, None if w is None else 0 * w, y)
            assert not y.any()
            poisoned = torch.full((5,), torch.nan)  # NaN factors, silenced by coefficients of 0
            backend.row_stats_grad(q, 0 * one, 0 * one, None if w is None else 0 * w, y)
            assert not y.any()
        backend.row_grad(q, labels, poisoned, poisoned, 0 * one, 0 * one, one, y)
        assert not y.any()
        backend.row_grad(q, labels, row_max, logsum, one, one, one, y)
        assert not y[2].any() and y[1].count_nonzero() == 1


@contextmanager
def addresses_read() -> Iterator[set[int]]:
    """Every address that kernels read in the meantime."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: set[int] = set()
    load = InterpreterBuilder.create_masked_load

    def spy(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        seen.update(np.asarray(pointers.data)[np.asarray(mask.data, bool)].reshape(-1).tolist())
        return load(self, pointers, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", spy)
        yield seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_else_is_read(dtype: str, form: str) -> None:
    """Not a byte beside the rows; rows without a coefficient or a need not at all."""
    q = Placed(dtype, (4,), 101, start=3, gap=9)
    q.rows[...] = logits_for(0, (4,), 101, dtype, 2.0)
    logits, y, one = tensor(q), torch.empty(4, 101, dtype=TORCH[dtype]), torch.ones(4)
    itemsize, pitch = logits.itemsize, 110 * logits.itemsize
    buffer = range(q.buffer.ctypes.data, q.buffer.ctypes.data + q.buffer.nbytes)

    def rows_read(function: Callable[..., Any], *arguments: Any) -> list[int]:
        with formed(form), addresses_read() as seen:
            function(*arguments)
        offsets = np.array(sorted(seen & set(buffer))) - q.address
        assert ((0 <= offsets % pitch) & (offsets % pitch < 101 * itemsize)).all()
        assert ((0 <= offsets) & (offsets < 4 * pitch)).all()
        return sorted(set((offsets // pitch).tolist()))

    labels = torch.tensor([100, -1, 101, 2**40])
    assert rows_read(backend.label_logit, logits, labels) == [0]
    assert rows_read(backend.row_stats, logits, labels, True) == [0, 1, 2, 3]
    some = torch.tensor([1.0, 0.0, 1.0, 0.0])
    grad = (backend.row_grad, logits, labels, one, one)
    assert rows_read(*grad, some, 0 * one, one, y) == [0, 2]
    assert rows_read(*grad, 0 * one, some, one, y) == [0, 2]
    needed = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf])
    for w in (None, one):
        read = rows_read(backend.row_stats_grad, logits, needed, one, w, y)
        assert read == [1, 2]
    assert rows_read(backend.scale_, logits, torch.tensor(1.0)) == []
    assert rows_read(backend.scale_, logits, torch.tensor(0.5)) == [0, 1, 2, 3]
    assert q.untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_elements(dtype: str) -> None:
    """set_label_ rounds once, writes where labels are good and nowhere else; scale_ rounds once."""
    y = Placed(dtype, (2, 3), 37, start=5, gap=4)
    y.rows[...] = logits_for(0, (2, 3), 37, dtype, 2.0)
    before = y.rows.copy()
    labels = np.array([[0, 36, 37], [-1, 5, 2**31 - 1]])
    elements = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    backend.set_label_(tensor(y), torch.from_numpy(labels), torch.from_numpy(elements))
    wanted = before.copy()
    for place in ((0, 0), (0, 1), (1, 1)):
        wanted[*place, labels[place]] = encode(elements[place], dtype)
    np.testing.assert_array_equal(y.rows, wanted)
    backend.scale_(tensor(y), torch.tensor(1.0))
    np.testing.assert_array_equal(y.rows, wanted)
    backend.scale_(tensor(y), torch.tensor(0.3333))
    scaled = encode(decode(wanted, dtype).astype(np.float32) * np.float32(0.3333), dtype)
    np.testing.assert_array_equal(y.rows, scaled)
    assert y.untouched_outside()


def test_axes_in_any_order() -> None:
    """[T, B, V] seen as [B, T, V], and four axes that fold into no two."""
    given = torch.randn(3, 4, 2, 21)
    for logits in (given[0].transpose(0, 1), given.permute(2, 0, 1, 3), given[..., :13]):
        rows = logits.shape[:-1]
        labels, a, b = torch.zeros(rows, dtype=torch.long), torch.randn(rows), torch.randn(rows)
        row_max, logsum, picked, _ = backend.row_stats(logits, labels, False)
        exact = logits.double().logsumexp(-1)
        torch.testing.assert_close((row_max + logsum).double(), exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(picked, logits[..., 0])
        y = torch.empty_like(logits)
        backend.row_stats_grad(logits, a, b, None, y)
        p = logits.double().softmax(-1)
        wanted = p * (a + b * exact)[..., None]
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_32_bits(form: str) -> None:
    """Rows 2^30 elements apart, in memory that exists where it is touched."""
    stride, vocab, rows = 2**30 + 8, 40, 4
    before = 2**32  # bytes that an offset cut to 32 bits would lead into
    no_reserve = 0x4000  # of Linux; Python has no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, before + 2 * rows * stride, flags)
    space = np.ndarray((rows, vocab), np.float16, memory, before, (2 * stride, 2))
    q = np.random.default_rng(0).standard_normal((rows, vocab)).astype(np.float16)
    space[...] = q
    # a tensor of the first row alone: the interpreter copies whole storages
    first = torch.frombuffer(memory, dtype=torch.float16, count=vocab, offset=before)
    strides = (rows * stride, stride)
    row_max, logsum, picked = (torch.full((rows,), torch.nan) for _ in range(3))
    labels, one = torch.tensor([0, 5, 39, 7]), torch.ones(rows)
    shape = dict(ENTROPY=False, EDGES=True)
    backend._kernel("row_stats")[(rows,)](
        first, labels, vocab, rows, *strides, row_max, logsum, picked, None, R=2, L=32, **shape
    )
    assert picked.tolist() == [float(q[r, label]) for r, label in enumerate(labels)]
    exact = Exact.of(q.astype(np.float64))
    np.testing.assert_allclose(logsum, exact.logsum, rtol=1e-6)

    name = "two_pass" if form == "two passes" else "resident"
    meta = {k: v for k, v in FORMS[form](vocab).launch.items() if not k.startswith("num_")}
    backend._kernel(name, "row_stats_grad")[(rows,)](
        first, one, 0 * one, None, vocab, rows, *strides, *strides, row_max, logsum, None, first,
        **meta, **shape, MATCHED=True,
    )  # fmt: skip
    np.testing.assert_allclose(space, exact.p, rtol=2**-10, atol=2**-24)
    backend._kernel("labels", "set_label")[(1,)](
        labels, 3 * one, rows, vocab, rows, *strides, first, BLOCK=16
    )
    backend._kernel("scale")[(2,)](
        torch.tensor(2.0), rows, vocab, rows, *strides, first, BLOCK=16, EDGES=True
    )
    assert space[np.arange(rows), labels.numpy()].tolist() == [6.0] * rows
    backend._kernel("row_grad")[(rows, 1)](
        first, labels, row_max, logsum, 0 * one, 0 * one, one, vocab, rows, *strides, *strides,
        first, BLOCK=64, EDGES=True, MATCHED=True,
    )  # fmt: skip
    assert np.array_equal(space, np.arange(vocab) == labels.numpy()[:, None])
