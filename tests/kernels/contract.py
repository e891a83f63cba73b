"""The contract of the row kernels: one suite, which every backend's tests inherit.

A backend is the five kernels on NumPy arrays, in one or several forms: an instruction set, a way to
launch, whoever calls. What its kernels compute is compared with ``exact.py``, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .backend import Array, Backend, Case, cases, check, labels_for, logits_for, vectors_for
from .exact import PLAIN, Readout
from .memory import Placed, decode, encode


def parametrize(
    tests: RowKernels, metafunc: pytest.Metafunc, last: str, chosen: list[tuple[Any, ...]]
) -> None:
    """By form, dtype and perhaps one more."""
    names = ["kernels", "dtype", *filter(None, [last])]
    values = [(tests.forms[form], *rest) for form, *rest in chosen]
    metafunc.parametrize(names, values, ids=["-".join(map(str, given)) for given in chosen])


class RowKernels:
    """What every backend has to do, whatever the rows hold."""

    forms: ClassVar[Mapping[str, Backend]]
    # V: one element; two; odd and even vocabularies of real models.
    cases: ClassVar[Sequence[Case]] = cases(1, 2, 17, 1000, 50257, 151936)
    wide: ClassVar[int] = 331  # of rows with edges: several blocks, and a last one that is not full
    tiled: ClassVar[Case] = Case((2, 48), 384)  # rows that are made of whole tiles
    # Of random batches; a backend that compiles for each shape draws from few.
    shapes: ClassVar[st.SearchStrategy[Case]] = st.builds(
        Case, st.lists(st.integers(1, 3), max_size=3).map(tuple), st.integers(1, 200)
    )
    random_forms: ClassVar[Sequence[str] | None] = None  # all
    random_readouts: ClassVar[Sequence[Readout]] = (PLAIN,)

    def __init_subclass__(cls, examples: int = 50) -> None:
        """A property test of its own for each class: Hypothesis notes examples by the function."""

        @settings(max_examples=examples)
        @given(data=st.data())
        def test_random_batches(self: RowKernels, data: st.DataObject) -> None:
            self.check_random_batch(data.draw)

        cls.test_random_batches = test_random_batches  # type: ignore[attr-defined]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = set(metafunc.fixturenames)
        if "case" in names:
            parametrize(self, metafunc, "case", self.numbers())
        elif "kernels" in names and not {"readout", "cap"} & names:
            parametrize(self, metafunc, "", [(*chosen,) for chosen in self.edge_forms()])

    def all_forms(self) -> list[tuple[str, str]]:
        """With each dtype."""
        return [(form, d) for form, kernels in self.forms.items() for d in kernels.dtypes]

    def numbers(self) -> list[tuple[str, str, Case]]:
        """Which rows each form is tested on; not all where that takes long."""
        return [(form, dtype, case) for form, dtype in self.all_forms() for case in self.cases]

    def edge_forms(self) -> list[tuple[str, str]]:
        """Of the other tests; not all where they take long, but each form and each dtype."""
        return self.all_forms()

    # --- Numbers ---

    def test_kernels_match_float64(self, kernels: Backend, dtype: str, case: Case) -> None:
        q = Placed(dtype, *case, start=3, gap=5)
        q.holding(logits_for(case.vocab, *case, scale=4.0))
        y = Placed(dtype, *case, start=1, gap=2, transposed=True)
        label_dtype = kernels.label_dtypes[case.vocab % len(kernels.label_dtypes)]
        check(kernels, q, y, labels_for(case.vocab, *case, label_dtype), case.vocab)

    def check_random_batch(self, draw: Any) -> None:
        """Random shapes, strides, alignments, spreads and offsets."""
        form = draw(st.sampled_from(sorted(self.random_forms or self.forms)))
        kernels = self.forms[form]
        dtype = draw(st.sampled_from(kernels.dtypes))
        case = draw(self.shapes)
        place = st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans())
        at = draw(place)
        # the gradient's rows start as far from a boundary, or they do not
        alike = draw(st.booleans())
        q, y = Placed(dtype, *case, *at), Placed(dtype, *case, *(at if alike else draw(place)))
        seed = draw(st.integers(0, 2**32 - 1))
        # A spread of 60 reaches probabilities that are subnormal, and 0.
        scale = draw(st.sampled_from([0.0, 1.0, 60.0]))
        q.holding(logits_for(seed, *case, scale, draw(st.sampled_from([0.0, -300.0, 1e4]))))
        labels = labels_for(seed, *case, draw(st.sampled_from(kernels.label_dtypes)))
        check(kernels, q, y, labels, seed, draw(st.sampled_from(self.random_readouts)))

    def test_the_running_maximum_may_move(self, kernels: Backend, dtype: str) -> None:
        """In every block, in the first only, and by a factor beyond float32."""
        ramp = np.linspace(-50, 50, self.wide)
        peak = np.where(np.arange(self.wide) == self.wide - 2, 150.0, np.sin(ramp))
        q, y = (Placed(dtype, (9,), self.wide) for _ in range(2))
        q.holding(np.stack([ramp, ramp[::-1], peak] * 3))
        check(kernels, q, y, np.zeros(9, kernels.label_dtypes[0]), 0)

    def test_an_offset_loses_nothing(self, kernels: Backend, dtype: str) -> None:
        """value = row_max + logsum is kept as two numbers, so logsum ignores a common offset."""
        near, far, y = (Placed(dtype, (9,), self.wide) for _ in range(3))
        far.holding(logits_for(1, (9,), self.wide, scale=50.0, offset=1e4))
        near.holding(far.values - 1e4)
        np.testing.assert_array_equal(near.values, far.values - 1e4)
        one, labels = np.ones(9, np.float32), np.full(9, -1, kernels.label_dtypes[0])
        found = []
        for q in (near, far):
            _, logsum, _, entropy = kernels.row_stats(q, labels)
            fused = [logsum, entropy]
            for weight in (None, one):
                out = kernels.row_stats_grad(q, one, 0 * one, weight, y)
                fused += [*filter(lambda x: x is not None, out[1:]), y.rows.copy()]
            found.append(fused)
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_in_place_is_the_same(self, kernels: Backend, dtype: str) -> None:
        q, y = (Placed(dtype, (9,), self.wide, start=7, gap=3) for _ in range(2))
        x = logits_for(self.wide, (9,), self.wide, 3.0)
        a, b, c = vectors_for(self.wide, (9,))
        labels = labels_for(0, (9,), self.wide, kernels.label_dtypes[0])
        for weight in (None, b):
            q.holding(x)
            apart = kernels.row_stats_grad(q, a, c, weight, y)
            within = kernels.row_stats_grad(q, a, c, weight, q)
            for one, other in zip(apart, within, strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(q.rows, y.rows)
        row_max, logsum, *_ = kernels.row_stats(q.holding(x), labels)
        kernels.row_grad(q, labels, row_max, logsum, a, b, c, y)
        kernels.row_grad(q, labels, row_max, logsum, a, b, c, q)
        np.testing.assert_array_equal(q.rows, y.rows)
        assert q.untouched_outside()

    def test_elements_are_rounded_once(self, kernels: Backend, dtype: str) -> None:
        """Beyond the largest, ties, and what is subnormal in 16 bits."""
        rng = np.random.default_rng(0)
        sizes, vocab = self.tiled
        y = Placed(dtype, sizes, vocab, start=5, gap=4)
        rows = np.arange(np.prod(sizes)).reshape(sizes)
        special = [0.0, np.inf, -np.inf, np.nan, 65519.99, 65520, 2.0**-25, 2.0**-24, -0.0]
        ties = (np.arange(0x7C00, dtype="u2").view("f2").astype("f8") * 1.00048828125)[::317]
        for _ in range(4):
            y.holding(rng.standard_normal(y.rows.shape))
            elements = 2.0 ** rng.uniform(-100, 127.9, sizes) * rng.choice([-1, 1], sizes)
            elements.flat[: len(special)] = special
            elements.flat[len(special) : rows.size // 2] = rng.choice(ties, rows.size)[
                len(special) : rows.size // 2
            ]
            elements = elements.astype(np.float32)
            labels = (rows + rng.integers(vocab)) % vocab  # rows that share a tile, each its own
            wanted = y.values
            rounded = decode(encode(elements, dtype), dtype)
            np.put_along_axis(wanted, labels[..., None], rounded[..., None], -1)
            kernels.set_label(y, labels.astype(kernels.label_dtypes[0]), elements)
            np.testing.assert_array_equal(y.values, wanted)
            assert y.untouched_outside()
            picked = kernels.label_logit(y, labels.astype(kernels.label_dtypes[0]))
            np.testing.assert_array_equal(picked, rounded)

    @pytest.mark.parametrize("sizes", [(0,), (3, 0)], ids=str)
    def test_no_rows(self, kernels: Backend, dtype: str, sizes: tuple[int, ...]) -> None:
        q, y = (Placed(dtype, sizes, 5) for _ in range(2))
        none, labels = np.zeros(sizes, np.float32), np.zeros(sizes, kernels.label_dtypes[0])
        row_max, logsum, picked, entropy = kernels.row_stats(q, labels)
        assert row_max.shape == logsum.shape == picked.shape == entropy.shape == sizes
        kernels.row_grad(q, labels, row_max, logsum, none, none, none, y)
        for weight in (None, none):
            assert kernels.row_stats_grad(q, none, none, weight, y)[0].shape == sizes
        assert kernels.label_logit(q, labels).shape == sizes
        kernels.set_label(y, labels, none)

    # --- Rows that are no distributions ---

    def edges(self, dtype: str) -> Placed:
        """All alike; one finite logit; none; an inf; a NaN; all NaN; all inf; and two as usual."""
        x = logits_for(5, (9,), self.wide, 3.0)
        x[0], x[1:3], x[3:5] = 0.5, -np.inf, 0.0
        x[1, self.wide // 2], x[3, 5], x[4, -1], x[5], x[6] = 2.0, np.inf, np.nan, np.nan, np.inf
        return Placed(dtype, (9,), self.wide).holding(x)

    def labels(self, kernels: Backend) -> Array:
        """Of these: none, good, one at -inf, and so on."""
        some = [-1, self.wide // 2, 5, 5, self.wide - 1, 5, -1, self.wide, 3]
        return np.array(some, kernels.label_dtypes[0])

    def test_statistics_at_the_edges(self, kernels: Backend, dtype: str) -> None:
        q, labels = self.edges(dtype), self.labels(kernels)
        one, y = np.ones(9, np.float32), Placed(dtype, (9,), self.wide)
        row_max, logsum, picked, entropy = kernels.row_stats(q, labels)
        fused = kernels.row_stats_grad(q, one, one, one, y)
        wanted = [0.0, 2.0, -np.inf, np.inf, np.nan, np.nan, 0.0, np.nan]
        np.testing.assert_array_equal(picked[:8], wanted)
        np.testing.assert_array_equal(kernels.label_logit(q, labels), picked)
        for top, log, h in ((row_max, logsum, entropy), fused):
            assert top[:3].tolist() == [0.5, 2.0, -np.inf]
            assert log[1:3].tolist() == [0.0, -np.inf] and h[1:3].tolist() == [0.0, 0.0]
            assert np.isnan(top + log)[3:7].all() and np.isnan(h)[3:7].all()
            assert np.isfinite([top[7:], log[7:], h[7:]]).all()

    @pytest.mark.parametrize("with_entropy", [False, True])
    def test_gradients_at_the_edges(self, kernels: Backend, dtype: str, with_entropy: bool) -> None:
        """NaN where a row holds one, 0 where it has no mass, and the other rows as ever."""
        q, y, labels = self.edges(dtype), Placed(dtype, (9,), self.wide), self.labels(kernels)
        one = np.ones(9, np.float32)
        kernels.row_stats_grad(q, one, 0 * one, one if with_entropy else None, y)
        found = y.values
        assert np.isfinite(found[:3]).all() and np.isfinite(found[7:]).all()
        hot = np.arange(self.wide) == self.wide // 2
        np.testing.assert_array_equal(found[1], hot)
        assert not found[2].any() and found[0].all() and found[7:].any(-1).all()
        assert np.isnan(found[3, 5]) and np.isnan(found[4:7]).all()

        row_max, logsum, *_ = kernels.row_stats(q, labels)
        kernels.row_grad(q, labels, row_max, logsum, one, one * with_entropy, 2 * one, y)
        found = y.values
        np.testing.assert_array_equal(found[1], 3 * hot)
        np.testing.assert_array_equal(found[2], 2 * (np.arange(self.wide) == 5))
        assert np.isnan(found[3, 5]) and np.isnan(found[4:7]).all()
        assert np.isfinite(found[[0, 7, 8]]).all() and found[[0, 7, 8]].any(-1).all()

    def test_a_coefficient_of_0_silences(self, kernels: Backend, dtype: str) -> None:
        """Bits of 0 whatever the rows and the statistics hold; and C where the label is good."""
        q, y, labels = self.edges(dtype), Placed(dtype, (9,), self.wide), self.labels(kernels)
        zero, c = np.zeros(9, np.float32), np.arange(1, 10, dtype=np.float32)
        bits = y.rows.view(np.uint16)
        for weight in (None, zero):
            y.poison()
            kernels.row_stats_grad(q, zero, zero, weight, y)
            assert not bits.any()
        row_max, logsum, *_ = kernels.row_stats(q, labels)
        wanted = (np.arange(self.wide) == labels[:, None]) * c[:, None]
        for statistics in ((row_max, logsum), (zero * np.nan, zero * np.nan)):
            y.poison()
            kernels.row_grad(q, labels, *statistics, zero, zero, c, y)
            np.testing.assert_array_equal(y.values, wanted)
            y.poison()
            kernels.row_grad(q, labels, *statistics, zero, zero, zero, y)
            assert not bits.any()

    @pytest.mark.parametrize("with_entropy", [False, True])
    def test_rows_that_nobody_needs(self, kernels: Backend, dtype: str, with_entropy: bool) -> None:
        """alpha = -inf: everything is 0 whatever the row holds; the other rows are as ever."""
        q, y, usual = self.edges(dtype), *(Placed(dtype, (9,), self.wide) for _ in range(2))
        one = np.ones(9, np.float32)
        weight = one if with_entropy else None
        expected = kernels.row_stats_grad(q, one, one, weight, usual)
        for unread in (np.ones(9, bool), np.arange(9) % 2 == 0):
            alpha = np.where(unread, -np.inf, 1).astype(np.float32)
            y.poison()
            found = kernels.row_stats_grad(q, alpha, one, weight, y)
            for some, all_read in zip(found, expected, strict=True):
                if some is not None:
                    np.testing.assert_array_equal(some, np.where(unread, 0, all_read))
            np.testing.assert_array_equal(y.values, np.where(unread[:, None], 0, usual.values))

    def test_a_nan_anywhere_is_seen(self, kernels: Backend, dtype: str) -> None:
        places = np.array([0, 15, 63, 64, 99, self.wide - 1])
        x = np.zeros((9, self.wide))
        x[range(6), places] = np.nan
        q, y = Placed(dtype, (9,), self.wide).holding(x), Placed(dtype, (9,), self.wide)
        one, labels = np.ones(9, np.float32), np.ones(9, kernels.label_dtypes[0])
        row_max, logsum, picked, entropy = kernels.row_stats(q, labels)
        assert np.isnan(row_max + logsum)[:6].all() and np.isnan(entropy)[:6].all()
        assert np.isfinite([row_max[6:], logsum[6:], entropy[6:]]).all() and not picked.any()
        for gradient in (
            lambda: kernels.row_stats_grad(q, one, 0 * one, None, y),
            lambda: kernels.row_stats_grad(q, one, one, one, y),
            lambda: kernels.row_grad(q, labels, row_max, logsum, one, one, one, y),
        ):
            gradient()
            assert np.isnan(y.values[:6]).all() and np.isfinite(y.values[6:]).all()
