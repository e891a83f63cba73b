"""Rows put together from their shards, against the whole rows; NumPy in float64 and float32."""

import itertools
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irl_ops import algebra
from irl_ops.algebra import BAD_LABEL, NO_LABEL, RowStatistics
from irl_ops.kernels import reference as kernels
from irl_ops.kernels.reference.measures import RowMeasures, row_measures

V = 12


@st.composite
def rows(draw: Any) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Logits [n, V] with rows of all kinds, labels, and where the columns are cut."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1.0, 8.0, 60.0]))
    q = draw(st.sampled_from([0.0, 1e4])) + scale * generator.standard_normal((7, V))
    q[generator.random(q.shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = -np.inf
    q[1] = -np.inf  # a row without mass
    labels = generator.integers(0, V, 7)
    labels[2], labels[3] = NO_LABEL, BAD_LABEL
    ends = sorted(draw(st.lists(st.integers(0, V), max_size=3)))
    return q, labels, [0, *ends, V]


def shards(q: np.ndarray, labels: np.ndarray, cuts: list[int], entropy: bool) -> RowStatistics:
    found = []
    for start, end in itertools.pairwise(cuts):
        mine = algebra.labels_here(xp, labels, start, end - start)
        if start == end:
            assert (mine == NO_LABEL).all()
            found.append(algebra.no_columns(xp, q[:, 0], entropy))
        else:
            found.append(RowStatistics(*kernels.row_stats(q[:, start:end], mine, entropy)))
    return RowStatistics(*(None if x[0] is None else np.stack(x) for x in zip(*found, strict=True)))


@given(batch=rows(), entropy=st.booleans())
def test_merged_statistics_are_those_of_whole_rows(batch: Any, entropy: bool) -> None:
    q, labels, cuts = batch
    with np.errstate(all="ignore"):
        merged = algebra.merge(xp, labels, shards(q, labels, cuts, entropy), V)
        whole = RowStatistics(*kernels.row_stats(q, labels, entropy))
    assert np.array_equal(merged.row_max, whole.row_max)
    assert np.array_equal(merged.label_logit, whole.label_logit, equal_nan=True)
    assert np.isnan(merged.label_logit[3])
    # relative to logsum itself: what a confident row has beside its largest logit is not lost;
    # a distance of several hundred between two shards is rounded before it is an exponent
    np.testing.assert_allclose(merged.logsum, whole.logsum, rtol=1e-10)
    assert merged.logsum[1] == -np.inf
    assert (merged.entropy is None) == (not entropy)
    if entropy:
        np.testing.assert_allclose(merged.entropy, whole.entropy, rtol=1e-10, atol=1e-13)


NAMES = ("entropy", "log_sum_sq", "top1", "mean_logit")


def measures(
    q: np.ndarray, ids: np.ndarray, cuts: list[int], wanted: tuple[str, ...]
) -> RowMeasures:
    """Of shards, each on axis 0."""
    found = []
    for start, end in itertools.pairwise(cuts):
        if start == end:
            nothing, zero = np.full(len(q), -np.inf), np.zeros(len(q))
            empty = [nothing, nothing, np.zeros(ids.shape), zero, nothing]
            empty += [np.full(len(q), algebra.NO_COLUMN), nothing, zero]
            names = {"row_max", "logsum", "picked", *wanted}
            names |= {"kept"} if "mean_logit" in wanted else set()
            one = RowMeasures(
                *(
                    x if n in names else None
                    for n, x in zip(RowMeasures._fields, empty, strict=True)
                )
            )
        else:
            mine = algebra.labels_here(xp, ids, start, end - start)
            one = row_measures(q[:, start:end], mine, wanted)
            one = one if one.top1 is None else one._replace(top1=one.top1 + start)
        found.append(one)
    return RowMeasures(*(None if x[0] is None else np.stack(x) for x in zip(*found, strict=True)))


@given(batch=rows(), count=st.integers(0, 4))
def test_merged_measures_are_those_of_whole_rows(batch: Any, count: int) -> None:
    """Ids of other shards, ties between shards, rows of which a shard has no mass."""
    q, labels, cuts = batch
    q[4] = np.round(q[4] / 8)  # with ties
    ids = np.stack([labels, labels[::-1]], -1)
    with np.errstate(all="ignore"):
        merged = algebra.merge_measures(xp, ids, measures(q, ids, cuts, NAMES[:count]), V)
        whole = row_measures(q, np.where(ids == BAD_LABEL, V, ids), NAMES[:count])
    for name, x in whole._asdict().items():
        y = getattr(merged, name)
        assert (x is None) == (y is None), name
        if name in ("row_max", "picked", "top1", "kept") and x is not None:
            assert np.array_equal(x, y, equal_nan=name == "picked"), (name, x, y)
        elif x is not None:  # logits of 1e4, and their distances, are rounded
            np.testing.assert_allclose(y, x, rtol=1e-9, atol=1e-11, err_msg=name)
    if count > 1:
        assert (merged.log_sum_sq <= 0).all()


@given(batch=rows())
def test_gradients_of_shards_are_those_of_whole_rows(batch: Any) -> None:
    """With the whole row's statistics the row kernel writes each shard's columns."""
    q, labels, cuts = batch
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(len(q)) for _ in range(3))
    with np.errstate(all="ignore"):
        merged = algebra.merge(xp, labels, shards(q, labels, cuts, False), V)
        row_max, logsum, *_ = kernels.row_stats(q, labels)
        expected = kernels.row_grad(q, labels, row_max, logsum, a, b, c)
        parts = [
            kernels.row_grad(
                q[:, start:end], algebra.labels_here(xp, labels, start, end - start),
                merged.row_max, merged.logsum, a, b, c,
            )
            for start, end in itertools.pairwise(cuts)
            if end > start
        ]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(parts, -1), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_one_bad_shard_spoils_the_row_and_no_other(garbage: float) -> None:
    q = np.random.default_rng(0).standard_normal((3, V))
    q[1, 7] = garbage
    labels = np.array([0, 3, 11])
    with np.errstate(all="ignore"):
        found = algebra.merge(xp, labels, shards(q, labels, [0, 4, 8, V], True), V)
    value = found.row_max + found.logsum
    assert np.isnan(value).tolist() == [False, True, False]


def test_all_devices_merge_to_the_same_bits() -> None:
    q = np.random.default_rng(0).standard_normal((5, V)).astype(np.float32)
    labels = np.arange(5)
    parts = shards(q, labels, [0, 3, 8, V], True)
    first, second = (algebra.merge(xp, labels, parts, V) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    assert first.logsum.dtype == np.float32


@given(st.integers(0, 2**32), st.booleans())
def test_rows_in_the_order_of_the_sequence_and_back(seed: int, each: bool) -> None:
    generator = np.random.default_rng(seed)
    whole = generator.standard_normal((2, 3, 8))
    order = np.argsort(generator.random((2, 3, 8) if each else 8), axis=-1)
    index = np.broadcast_to(order, whole.shape)
    came = np.take_along_axis(whole, index, -1)
    assert np.array_equal(algebra.in_order(xp, came, order), whole)
    assert algebra.in_order(xp, came, None) is came
    own = algebra.rows_at(xp, whole, order[..., 2:5])
    assert np.array_equal(own, came[..., 2:5])
