"""The Triton row kernels, interpreted: the contract for each form, and what is theirs alone."""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.kernels.triton import dispatch
from irl_ops.torch import triton as backend

from .backend import Backend, Case, cases, logits_for
from .exact import PLAIN, Arithmetic, Exact, Readout
from .measures_contract import MeasuresKernels
from .memory import Placed, decode, encode
from .readout_contract import ReadoutKernels

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of kernels that a test calls by itself
]
DTYPES = Backend.dtypes
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
def formed(form: str, block: int = 128) -> Iterator[None]:
    """The heavy kernel in this form, the statistics in tiles as small, and blocks as small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "row_stats_grad", lambda vocab, *_, **__: FORMS[form](vocab))
        patch.setattr(dispatch, "row_stats", lambda vocab, _: FORMS["two passes"](vocab))
        patch.setattr(dispatch, "row_measures", lambda vocab, *_: FORMS["two passes"](vocab))
        for name in ("row_grad", "row_measures_grad"):
            patch.setattr(dispatch, name, lambda _: dispatch.Block(block, 4))
        yield


def tensor(rows: Placed | np.ndarray) -> Tensor:
    """The same memory."""
    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows)
    if rows.dtype == "bfloat16":
        return torch.from_numpy(rows.rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows.rows)


class Triton(Backend):
    label_dtypes = (np.int64, np.int32)
    rounds = Arithmetic(reach=4)  # exp(x) is exp2(x log2 e), with a constant that is rounded

    def __init__(self, form: str) -> None:
        self.form = form

    def call(self, kernel: str, q: Placed, *given: Any, readout: Readout) -> Any:
        moved = [x if x is None or isinstance(x, bool) else tensor(x) for x in given]
        with formed(self.form, 128 if q.vocab < 5000 else 4096):
            out = getattr(backend, kernel)(tensor(q), *moved, **readout.options)
        return [None if x is None else x.numpy() for x in out] if isinstance(out, tuple) else out

    def row_stats(self, q, labels, entropy=True, readout=PLAIN):
        return self.call("row_stats", q, labels, entropy, readout=readout)

    def row_grad(self, q, labels, row_max, logsum, a, b, c, y, readout=PLAIN):
        self.call("row_grad", q, labels, row_max, logsum, a, b, c, y, readout=readout)

    def row_stats_grad(self, q, alpha, beta, weight, y, readout=PLAIN):
        return self.call("row_stats_grad", q, alpha, beta, weight, y, readout=readout)

    def row_measures(self, q, ids, wanted, view, readout=PLAIN):
        options = {n: None if x is None else tensor(x) for n, x in view.options.items()}
        with formed(self.form):
            found = backend.row_measures(
                tensor(q), tensor(ids), wanted, **options, **readout.options
            )
        return RowMeasures(*(None if x is None else x.numpy() for x in found))

    def row_measures_grad(self, q, ids, row_max, logsum, slopes, y, view, readout=PLAIN):
        options = {n: None if x is None else tensor(x) for n, x in view.options.items()}
        given = Slopes(*(None if x is None else tensor(x) for x in vars(slopes).values()))
        with formed(self.form):
            backend.row_measures_grad(
                tensor(q), tensor(ids), tensor(row_max), tensor(logsum), given, tensor(y),
                **options, **readout.options,
            )  # fmt: skip

    def label_logit(self, q, labels, readout=PLAIN):
        return self.call("label_logit", q, labels, readout=readout).numpy()

    def set_label(self, y, labels, elements, readout=PLAIN, label_logit=None):
        self.call("set_label_", y, labels, elements, label_logit, readout=readout)


class TestTriton(MeasuresKernels, ReadoutKernels, examples=40):
    forms: ClassVar = {form: Triton(form) for form in FORMS}
    cases = (*cases(1, 2, 8, 17, 64, 1000), Case((2,), 50257), Case((2,), 151936))
    readouts = (PLAIN, Readout(1.0, 30.0), Readout(0.25, 5.0), Readout(1.5))
    random_readouts = readouts
    tiled = Case((3, 7), 64)
    certain_batches = 1
    measure_vocabs = (67,)
    measure_readouts = (PLAIN, Readout(0.5, 8.0))
    shapes = st.builds(
        Case,
        st.lists(st.integers(1, 3), max_size=3).map(tuple),
        st.integers(1, 200) | st.sampled_from([128, 256]),
    )

    def numbers(self) -> list[tuple[str, str, Case]]:
        """Of long rows one dtype: the loops over tiles see only float32."""
        few = {50257: "bfloat16", 151936: "float16"}
        return [x for x in super().numbers() if x[1] == few.get(x[2].vocab, x[1])]

    def edge_forms(self) -> list[tuple[str, str]]:
        """Random batches have all of them, and all readouts."""
        return list(zip(self.forms, DTYPES, strict=True))


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
    q.holding(logits_for(0, (4,), 101, 2.0))
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
def test_scale(dtype: str) -> None:
    """Rounds once, and returns at once where the factor is 1."""
    y = Placed(dtype, (2, 3), 37, start=5, gap=4)
    y.holding(logits_for(0, (2, 3), 37, 2.0))
    before = y.rows.copy()
    backend.scale_(tensor(y), torch.tensor(1.0))
    np.testing.assert_array_equal(y.rows, before)
    backend.scale_(tensor(y), torch.tensor(0.3333))
    scaled = encode(decode(before, dtype).astype(np.float32) * np.float32(0.3333), dtype)
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
