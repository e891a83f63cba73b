"""The C++ row kernels through raw addresses, against float64 NumPy; no framework is needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irl_ops import _native

from .native_rows import (
    CANARY,
    DTYPES,
    EPS,
    ISAS,
    STORAGE,
    VOCABS,
    Exact,
    Placed,
    close,
    decode,
    encode,
    logits_for,
    run_grad,
    run_stats,
    run_stats_grad,
)


def check_all(q: Placed, y: Placed, labels: np.ndarray, isa: str, seed: int = 0) -> None:
    """Every kernel on these logits against float64."""
    rng = np.random.default_rng(seed)
    values = decode(q.rows, q.dtype)
    exact = Exact.of(values)
    tolerance = exact.statistics_tolerance()

    row_max, logsum, picked, entropy = run_stats(q, labels, isa=isa)
    np.testing.assert_array_equal(row_max, exact.row_max)
    assert (np.abs(logsum - exact.logsum) <= tolerance).all()
    assert (np.abs(entropy - exact.entropy) <= tolerance).all()
    wanted = np.take_along_axis(values, np.clip(labels, 0, q.vocab - 1)[..., None], -1)[..., 0]
    wanted = np.where(labels < 0, 0.0, np.where(labels >= q.vocab, np.nan, wanted))
    np.testing.assert_array_equal(picked, wanted)

    # Coefficients with zeros among them: no A, no B, neither.
    a, b, c = (rng.standard_normal(q.sizes).astype(np.float32) for _ in range(3))
    a.flat[::3], b.flat[::2], a.flat[4:5], b.flat[4:5] = 0, 0, 0, 0
    run_grad(q, labels, [row_max, logsum], [a, b, c], y, isa=isa)
    at_label = (np.arange(q.vocab) == labels[..., None]) * c[..., None]
    bound = exact.gradient_tolerance(a, b, np.zeros(q.sizes))
    close(y.rows, y.dtype, exact.gradient(a, b) + at_label, bound + EPS * np.abs(at_label))
    assert y.untouched_outside() and q.untouched_outside()

    for weight in (None, b):
        y.rows.view(np.uint8)[...] = CANARY
        out = run_stats_grad(q, a, c, weight, y, isa=isa)
        np.testing.assert_array_equal(out[0], exact.row_max)
        assert (np.abs(out[1] - exact.logsum) <= tolerance).all()
        assert (np.abs(out[2] - exact.entropy) <= tolerance).all()
        w = np.zeros(q.sizes) if weight is None else weight.astype(np.float64)
        total = a + c * (exact.row_max + exact.logsum) + w * exact.entropy
        a_error = tolerance * (np.abs(c) + np.abs(w)) + 2 * EPS * np.abs(total)
        bound = exact.gradient_tolerance(total, w, a_error)
        close(y.rows, y.dtype, exact.gradient(total, w), bound)
        assert (decode(y.rows, y.dtype)[np.isneginf(values)] == 0).all()
        assert y.untouched_outside() and q.untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_kernels_match_float64(vocab: int, isa: str, dtype: str) -> None:
    sizes = (2, 3) if vocab < 10_000 else (3,)
    q = Placed(dtype, sizes, vocab, start=3, gap=5)
    q.rows[...] = logits_for(vocab, sizes, vocab, dtype, scale=4.0)
    labels = np.random.default_rng(vocab).integers(0, vocab, sizes)
    labels.flat[:2] = [-100, vocab]
    check_all(q, Placed(dtype, sizes, vocab, start=1, gap=2), labels, isa)


@given(data=st.data())
def test_kernels_match_float64_anywhere(data: st.DataObject) -> None:
    """Random shapes, strides, alignments, spreads and offsets."""
    draw = data.draw
    dtype, isa = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ISAS))
    sizes = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    vocab = draw(st.integers(1, 200) | st.integers(2000, 4200))
    q = Placed(dtype, sizes, vocab, draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    y = Placed(dtype, sizes, vocab, draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    seed = draw(st.integers(0, 2**32 - 1))
    # A spread of 60 reaches probabilities that are subnormal, and 0.
    q.rows[...] = logits_for(
        seed, sizes, vocab, dtype, draw(st.sampled_from([0.0, 1.0, 60.0])),
        draw(st.sampled_from([0.0, -300.0, 1e4])),
    )  # fmt: skip
    labels = np.random.default_rng(seed).integers(-2, vocab + 2, sizes)
    check_all(q, y, labels, isa, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["ascending", "descending", "one peak late"])
def test_the_running_maximum_may_move(order: str, isa: str) -> None:
    """The maximum moves in every block, in the first only, and by a factor beyond float32."""
    vocab = 20_000
    q = Placed("float32", (1,), vocab)
    ramp = np.linspace(-50, 50, vocab)
    peak = np.where(np.arange(vocab) == 19_998, 150.0, np.sin(ramp))
    rows = {"ascending": ramp, "descending": ramp[::-1], "one peak late": peak}
    q.rows[...] = encode(rows[order], "float32")
    check_all(q, Placed("float32", (1,), vocab), np.zeros(1, np.int64), isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_an_offset_loses_nothing(isa: str, dtype: str) -> None:
    """value = row_max + logsum is kept as two numbers, so logsum ignores a common offset."""
    q = Placed(dtype, (4,), 3000)
    q.rows[...] = logits_for(1, (4,), 3000, dtype, scale=50.0, offset=1e4)
    shifted = Placed("float32", (4,), 3000)
    shifted.rows[...] = decode(q.rows, dtype) - 1e4
    labels = np.zeros(4, np.int64)
    moved, still = run_stats(q, labels, isa=isa), run_stats(shifted, labels, isa=isa)
    np.testing.assert_array_equal(moved[1], still[1])
    np.testing.assert_array_equal(moved[3], still[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [17, 4099])
def test_in_place_is_the_same(vocab: int, isa: str, dtype: str) -> None:
    rng = np.random.default_rng(vocab)
    alpha, beta, weight = (rng.standard_normal(5).astype(np.float32) for _ in range(3))
    labels = rng.integers(0, vocab, 5)
    for w in (None, weight):
        q, y = (Placed(dtype, (5,), vocab, start=7, gap=3) for _ in range(2))
        q.rows[...] = logits_for(vocab, (5,), vocab, dtype, 3.0)
        apart = run_stats_grad(q, alpha, beta, w, y, isa=isa)
        within = run_stats_grad(q, alpha, beta, w, q, isa=isa)
        np.testing.assert_array_equal(np.stack(within), np.stack(apart))
        np.testing.assert_array_equal(q.rows, y.rows)
        assert q.untouched_outside()
    q.rows[...] = logits_for(vocab, (5,), vocab, dtype, 3.0)
    stats = run_stats(q, labels, isa=isa)[:2]
    run_grad(q, labels, stats, [alpha, beta, weight], y, isa=isa)
    run_grad(q, labels, stats, [alpha, beta, weight], q, isa=isa)
    np.testing.assert_array_equal(q.rows, y.rows)


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
        stats = run_stats(q, labels, threads=threads, isa=isa)
        run_grad(q, labels, stats[:2], [a, a, a], y, threads=threads, isa=isa)
        grad = y.rows.copy()
        fused = run_stats_grad(q, a, a, a, y, threads=threads, isa=isa)
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
    values = decode(q[:3], dtype)
    exact = Exact.of(values)
    total = a[:3] * (1 + exact.row_max + exact.logsum)
    error = np.abs(a[:3]) * exact.statistics_tolerance() + 4 * EPS * np.abs(a[:3])
    bound = exact.gradient_tolerance(total, 0 * total, error)
    close(got[0][:3], dtype, exact.gradient(total, 0 * total), bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_nobody_needs(isa: str, dtype: str) -> None:
    q, y = Placed(dtype, (3,), 100), Placed(dtype, (3,), 100)
    q.rows[...] = encode(np.full((3, 100), np.nan), dtype)
    one = np.ones(3, np.float32)
    statistics = run_stats_grad(q, np.float32(-np.inf) * one, one, one, y, isa=isa)
    assert not np.any(statistics) and not np.any(y.rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_coefficients_are_zero_whatever_they_hold(isa: str, dtype: str) -> None:
    vocab = 100
    q, y = Placed(dtype, (3,), vocab), Placed(dtype, (3,), vocab, start=1)
    q.rows[...] = encode(np.full((3, vocab), np.nan), dtype)
    q.rows[1] = encode(np.full(vocab, np.inf), dtype)
    zero = np.zeros(3, np.float32)
    row_max, logsum, entropy = run_stats_grad(q, zero, zero, zero, y, isa=isa)
    assert (y.rows.view(np.uint16) == 0).all()
    assert np.isnan(row_max + logsum).all() and np.isnan(entropy).all()

    y.rows.view(np.uint8)[...] = CANARY
    labels, c = np.array([5, -1, vocab]), np.array([2, 3, 4], np.float32)
    run_grad(q, labels, [row_max, logsum], [zero, zero, c], y, isa=isa)
    wanted = np.zeros((3, vocab))
    wanted[0, 5] = 2
    np.testing.assert_array_equal(decode(y.rows, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("place", [0, 15, 63, 64, 99, 2100])
def test_nan_propagates(place: int, isa: str, dtype: str) -> None:
    vocab = 2101
    q, y = Placed(dtype, (2,), vocab), Placed(dtype, (2,), vocab)
    q.rows[...] = encode(np.zeros((2, vocab)), dtype)
    q.rows[0, place] = encode(np.float32(np.nan), dtype)
    labels, one = np.zeros(2, np.int64), np.ones(2, np.float32)
    stats = run_stats(q, labels, isa=isa)
    assert np.isnan(stats[0][0] + stats[1][0]) and np.isnan(stats[3][0])
    assert np.isfinite([s[1] for s in stats]).all()
    for grad in (
        lambda: run_stats_grad(q, one, 0 * one, None, y, isa=isa),
        lambda: run_stats_grad(q, one, one, one, y, isa=isa),
        lambda: run_grad(q, labels, stats[:2], [one, one, one], y, isa=isa),
    ):
        grad()
        assert np.isnan(decode(y.rows[0], dtype)).all()
        assert np.isfinite(decode(y.rows[1], dtype)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_no_mass_and_no_columns(isa: str) -> None:
    """All -inf, or V = 0: row_max = logsum = -inf, entropy 0, gradient 0."""
    one, labels = np.ones(2, np.float32), np.full(2, -1)
    for vocab in (0, 70):
        q, y = Placed("float32", (2,), vocab), Placed("float32", (2,), vocab)
        q.rows[...] = -np.inf
        row_max, logsum, picked, entropy = run_stats(q, labels, isa=isa)
        assert (row_max == -np.inf).all() and (logsum == -np.inf).all()
        assert (picked == 0).all() and (entropy == 0).all()
        run_stats_grad(q, one, one, one, y, isa=isa)
        assert (y.rows == 0).all()
        run_grad(q, labels, [row_max, logsum], [one, one, one], y, isa=isa)
        assert (y.rows == 0).all()


def test_no_rows() -> None:
    for sizes in ((0,), (3, 0)):
        q = Placed("float32", sizes, 5)
        stats = run_stats(q, np.zeros(sizes, np.int64))
        empty = np.zeros(sizes, np.float32)
        run_stats_grad(q, empty, empty, None, q)
        run_grad(q, np.zeros(sizes, np.int64), stats[:2], [empty] * 3, q)


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
    run_grad(q, np.ones(n, np.int64), [zero, zero], [zero, zero, c], y, isa=isa)
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
