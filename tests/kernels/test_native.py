"""The C++ row kernels through raw addresses: the contract, and what is theirs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from irl_ops import _native
from irl_ops.kernels.reference.measures import RowMeasures

from .backend import Backend, Case, cases, logits_for
from .exact import PLAIN, Exact, Readout, close
from .measures_contract import MeasuresKernels, View
from .memory import CANARY, STORAGE, Placed, decode, encode
from .readout_contract import ReadoutKernels

DTYPES = Backend.dtypes


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


def numbers(readout: Readout) -> tuple[float, float]:
    return readout.logit_scale, readout.softcap or 0.0


@dataclass(frozen=True)
class Native(Backend):
    """One set of instructions, on so many threads; everything it reads and writes is watched."""

    isa: str = ""
    threads: int = 1

    def row_stats(self, q, labels, entropy=True, readout=PLAIN):
        out = [poisoned(q.sizes) for _ in range(3 + entropy)]
        self.call("row_stats", q, [Vector(labels)], padded(out, 4), readout)
        return padded([v.values for v in out], 4)

    def row_grad(self, q, labels, row_max, logsum, a, b, c, y, readout=PLAIN):
        given = [Vector(v) for v in (labels, row_max, logsum, a, b, c)]
        self.call("row_grad", q, given, [], readout, y)

    def row_stats_grad(self, q, alpha, beta, weight, y, readout=PLAIN):
        given = [Vector(v) for v in (alpha, beta, weight) if v is not None]
        out = [poisoned(q.sizes) for _ in given]
        self.call("row_stats_grad", q, padded(given, 3), padded(out, 3), readout, y)
        return padded([v.values for v in out], 3)

    def call(
        self, kernel: str, q: Placed, given: Sequence[Vector | None], out: Sequence[Vector | None],
        readout: Readout, *y: Placed,
    ) -> None:  # fmt: skip
        addresses = [v.address if v else 0 for v in (*given, *out)]
        gradient = [x for rows in y for x in (rows.address, rows.strides)]
        getattr(_native, kernel)(
            *where(q), *addresses, *gradient, self.threads, self.isa, *numbers(readout)
        )
        assert all(v.untouched_outside() for v in (*given, *out) if v)

    def row_measures(self, q, ids, wanted, view, readout=PLAIN):
        asked = ["row_max", "logsum", "picked", *wanted, *["kept"] * ("mean_logit" in wanted)]
        shapes = {"picked": ids.shape}
        out = {name: poisoned(shapes.get(name, q.sizes)) for name in asked}
        if "top1" in wanted:
            out["top1"] = Vector(np.full(q.sizes, -7, np.int64))
        given, seen = Vector(ids), Seen(view)
        at = tuple(out[n].address if n in out else 0 for n in RowMeasures._fields)
        _native.row_measures(
            *where(q), given.address, ids.shape[-1], at, seen.addresses, self.threads, self.isa,
            *numbers(readout),
        )  # fmt: skip
        assert all(v.untouched_outside() for v in (given, *out.values(), *seen.kept))
        return RowMeasures(*(out[n].values if n in out else None for n in RowMeasures._fields))

    def row_measures_grad(self, q, ids, row_max, logsum, slopes, y, view, readout=PLAIN):
        given = [Vector(v) for v in (ids, row_max, logsum)]
        coefficients = [None if v is None else Vector(v) for v in vars(slopes).values()]
        seen = Seen(view)
        at = tuple(v.address if v else 0 for v in coefficients)
        _native.row_measures_grad(
            *where(q), given[0].address, ids.shape[-1], given[1].address, given[2].address, at,
            y.address, y.strides, seen.addresses, self.threads, self.isa, *numbers(readout),
        )  # fmt: skip
        assert all(v.untouched_outside() for v in (*given, *filter(None, coefficients)))

    def label_logit(self, q, labels, readout=PLAIN):
        out, given = poisoned(q.sizes), Vector(labels)
        _native.label_logit(*where(q), given.address, out.address, self.isa, *numbers(readout))
        assert out.untouched_outside()
        return out.values

    def set_label(self, y, labels, elements, readout=PLAIN, label_logit=None):
        given = padded([Vector(v) for v in (labels, elements, label_logit) if v is not None], 3)
        _native.set_label(*where(y), *(v.address if v else 0 for v in given), *numbers(readout))


class Seen:
    """What each row has of its own, in vectors that live as long."""

    def __init__(self, view: View) -> None:
        scale, mask, above = (None if x is None else Vector(x) for x in view.options.values())
        self.kept = [v for v in (scale, mask, above) if v]
        strides = () if mask is None else np.array(mask.values.strides[:-1]).tolist()
        self.addresses = (
            scale.address if scale else 0,
            mask.address if mask else 0,
            strides,
            above.address if above else 0,
        )


def padded(given: Sequence[Any], count: int) -> tuple[Any, ...]:
    """None for what is left out at the end."""
    return (*given, *[None] * (count - len(given)))


def where(q: Placed) -> tuple[int, str, tuple[int, ...], list[int], int]:
    return q.address, q.dtype, q.sizes, q.strides, q.vocab


ISAS = {isa: Native(isa) for isa in _native.isas()}


class TestNative(MeasuresKernels, ReadoutKernels):
    forms = ISAS
    measure_vocabs = (1, 2, 17, 64, 331, 4129)
    moving_vocab = 5000
    # Below, at and above one vector and one unrolled step; above one block of the kernels (2048).
    cases = cases(1, 2, 17, 63, 64, 65, 1000, 2049, 50257, 151936)
    wide = 4129
    readout_vocabs = (1, 33, 1000, 4129)
    shapes = st.builds(
        Case,
        st.lists(st.integers(1, 3), max_size=3).map(tuple),
        st.integers(1, 200) | st.integers(2000, 4200),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa: str, dtype: str) -> None:
    # 7 threads get a part each only above 7 * 2^17 elements.
    sizes, vocab = (30,), 32_003
    q = Placed(dtype, sizes, vocab)
    q.rows[...] = encode(np.random.default_rng(0).standard_normal((*sizes, vocab)) * 3, dtype)
    labels = np.arange(30) * 1000
    a = np.linspace(-1, 1, 30).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 7):
        y = Placed(dtype, sizes, vocab, start=threads)
        kernels = Native(isa, threads)
        stats = kernels.row_stats(q, labels)
        kernels.row_grad(q, labels, *stats[:2], a, a, a, y)
        grad = y.rows.copy()
        fused = kernels.row_stats_grad(q, a, a, a, y)
        results.append([np.stack(stats), grad, np.stack(fused), y.rows.copy()])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_and_mapped_outputs_get_the_same_bits(dtype: str, isa: str) -> None:
    """Above 8 MiB the stores of a mapped output are streamed, those of a fresh one cached."""
    rows, vocab = 100 if dtype == "float32" else 200, 26_001
    q = np.random.default_rng(0).standard_normal((rows, vocab), np.float32)
    q = np.ascontiguousarray(encode(q, dtype))
    a = np.linspace(-1, 1, rows).astype(np.float32)
    out = [np.zeros(rows, np.float32) for _ in range(2)]
    got = []
    for y in (np.empty_like(q), np.ones_like(q)):
        _native.row_stats_grad(
            q.ctypes.data, dtype, [rows], [vocab], vocab, a.ctypes.data, a.ctypes.data, 0,
            out[0].ctypes.data, out[1].ctypes.data, 0, y.ctypes.data, [vocab], 2, isa,
        )  # fmt: skip
        got.append(y)
    assert got[0].tobytes() == got[1].tobytes()
    first, exact = a[:3], Exact.of(decode(q[:3], dtype))
    total, none = exact.total(first, first, 0 * first), 0 * first
    bound = exact.gradient_error(total, none, exact.total_error(first, first, none))
    close(got[0][:3], dtype, exact.gradient(total, none), bound)


@pytest.mark.parametrize("isa", ISAS)
def test_no_columns(isa: str) -> None:
    """V = 0, an empty shard: row_max = logsum = -inf, entropy 0."""
    kernels, one, labels = ISAS[isa], np.ones(2, np.float32), np.full(2, -1)
    q = Placed("float32", (2,), 0)
    row_max, logsum, picked, entropy = kernels.row_stats(q, labels)
    assert (row_max == -np.inf).all() and (logsum == -np.inf).all()
    assert (picked == 0).all() and (entropy == 0).all()
    kernels.row_stats_grad(q, one, one, one, q)
    kernels.row_grad(q, labels, row_max, logsum, one, one, one, q)
    assert q.untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_statistics_have_one_arithmetic(isa: str, dtype: str) -> None:
    """Both kernels give the same bits; and a float32 copy gives those of 16 bits."""
    kernels, one, labels = ISAS[isa], np.ones(4, np.float32), np.zeros(4, np.int64)
    q, y = (Placed(dtype, (4,), 3000) for _ in range(2))
    q.holding(logits_for(1, (4,), 3000, 50.0, offset=1e4))
    shifted = Placed("float32", (4,), 3000).holding(q.values - 1e4)
    for readout in TestNative.readouts:
        row_max, logsum, _, entropy = kernels.row_stats(q, labels, readout=readout)
        for weight in (None, one):
            fused = kernels.row_stats_grad(q, one, one, weight, y, readout)
            np.testing.assert_array_equal(fused[:2], (row_max, logsum))
            assert weight is None or (fused[2] == entropy).all()
        if readout == PLAIN:
            _, of_shifted, _, entropy_of_shifted = kernels.row_stats(shifted, labels)
            np.testing.assert_array_equal(logsum, of_shifted)
            np.testing.assert_array_equal(entropy, entropy_of_shifted)


def test_negative_and_zero_strides() -> None:
    """Rows read backwards, and one row read many times."""
    rows = np.random.default_rng(0).standard_normal((4, 33), np.float32)
    labels, out = np.zeros(4, np.int64), np.zeros((3, 4), np.float32)
    for stride, view in ((-33, rows[::-1]), (0, np.broadcast_to(rows[3], (4, 33)))):
        addresses = [out[k].ctypes.data for k in range(3)]
        _native.row_stats(
            rows[3].ctypes.data, "float32", [4], [stride], 33, labels.ctypes.data, *addresses, 0, 1
        )
        np.testing.assert_array_equal(out[0], view.max(-1))
        np.testing.assert_array_equal(out[2], view[:, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_is_read_and_rounded_right(dtype: str, isa: str) -> None:
    """All 65536 patterns times a few factors: the float32 product rounded to nearest even."""
    patterns = np.arange(65536, dtype=np.uint16).view(STORAGE[dtype])
    with np.errstate(invalid="ignore"):
        values = decode(patterns, dtype).astype(np.float32)
    # From subnormal results over ties to overflow; inf and 0 make NaNs.
    for factor in (0.5, 1.0039063, 0.33333334, 3e-5, 2.0**-120, 1e4, -1e-8, np.inf, 0.0):
        y = Placed(dtype, (2,), 32768, start=1)
        y.rows[...] = patterns.reshape(2, -1)
        _native.scale(y.address, dtype, [2], y.strides, 32768, factor, 1, isa)
        with np.errstate(all="ignore"):
            wanted = encode(values * np.float32(factor), dtype)
        got, nan = y.rows.reshape(-1), np.isnan(decode(wanted, dtype))
        np.testing.assert_array_equal(got.view(np.uint16)[~nan], wanted.view(np.uint16)[~nan])
        assert np.isnan(decode(got, dtype)[nan]).all()
        assert y.untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_elements_are_rounded_as_rows_are(dtype: str, isa: str) -> None:
    """row_grad with a = b = 0 writes c at the label, by its own conversion."""
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-150, 127.9, 20_000)
    c = np.concatenate([
        (2.0**exponents * rng.choice([-1, 1], exponents.size)).astype(np.float32),
        np.arange(0x7C00, dtype="u2").view("f2").astype("f4") * np.float32(1.0005),
        np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520, 2.0**-25, 2.0**-24], "f4"),
    ])  # fmt: skip
    n = c.size
    q, y = Placed(dtype, (n,), 2), Placed(dtype, (n,), 2)
    zero = np.zeros(n, np.float32)
    ISAS[isa].row_grad(q, np.ones(n, np.int64), zero, zero, zero, zero, c, y)
    wanted, got = encode(c, dtype), np.ascontiguousarray(y.rows[:, 1])
    nan = np.isnan(c)
    np.testing.assert_array_equal(decode(got, dtype)[~nan], decode(wanted, dtype)[~nan])
    assert np.isnan(decode(got, dtype)[nan]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_scale_by_one_touches_nothing(isa: str) -> None:
    """1.0 returns at once: a null address is never followed."""
    _native.scale(0, "float32", [1000], [1000], 1000, 1.0, 2, isa)


def test_bad_arguments_are_named() -> None:
    def call(**changes: object) -> None:
        arguments = dict(
            dlogits=0, dtype="float32", sizes=[2], strides=[3], vocab=3, factor=1.0, threads=1
        )
        _native.scale(**(arguments | changes))

    call()
    with pytest.raises(ValueError, match=r"dtype is 'float64', accepted are float32"):
        call(dtype="float64")
    with pytest.raises(ValueError, match=r"strides has 2 entries, sizes has 1"):
        call(strides=[3, 1])
    with pytest.raises(ValueError, match=r"sizes holds -2, accepted are >= 0"):
        call(sizes=[-2])
    with pytest.raises(ValueError, match=r"vocab is -1, accepted are >= 0"):
        call(vocab=-1)
    with pytest.raises(ValueError, match=r"threads is 0, accepted are >= 1"):
        call(threads=0)
    with pytest.raises(ValueError, match=r"isa is 'sse9', this CPU accepts .*baseline"):
        call(isa="sse9")


def test_numbers_are_checked() -> None:
    x = Placed("float32", (2,), 8).holding(np.zeros(8))
    labels, out = Vector(np.zeros(2, np.int64)), poisoned((2,))
    where_from = (*where(x), labels.address, out.address)
    for scale in (0.0, -1.0, np.inf, np.nan, 1e39):
        with pytest.raises(ValueError, match=r"logit_scale is .*, accepted are finite numbers > 0"):
            _native.label_logit(*where_from, logit_scale=scale)
    for cap in (-1.0, np.inf, np.nan):
        with pytest.raises(
            ValueError, match=r"softcap is .*, accepted are finite numbers > 0, and"
        ):
            _native.label_logit(*where_from, softcap=cap)
    with pytest.raises(ValueError, match="label_logit is 0, a softcap needs it"):
        _native.set_label(*where_from, softcap=3.0)
