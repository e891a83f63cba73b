"""The contract of ``row_measures`` and its gradient, for the backends that have them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from .backend import Array, Backend, logits_for, vectors_for
from .exact import PLAIN, Arithmetic, Readout, close
from .memory import Placed

NAMES = ("entropy", "log_sum_sq", "top1", "mean_logit")


@dataclass
class View:
    """What each row has of its own; None where it has not."""

    row_scale: Array | None = None
    keep_mask: Array | None = None
    keep_above: Array | None = None

    @property
    def options(self) -> dict[str, Array | None]:
        return vars(self)

    @property
    def given(self) -> dict[str, Array]:
        return {name: x for name, x in self.options.items() if x is not None}


@dataclass
class Slopes:
    a: Array
    b: Array | None
    c: Array
    d: Array | None
    e: Array | None


class Expected:
    """z of every row and what follows from it in float64, with how far float32 may be off."""

    def __init__(self, x: Array, view: View, readout: Readout, rounds: Arithmetic) -> None:
        self.rounds, self.readout = rounds, readout
        q = readout.q(x)
        scale = np.ones(x.shape[:-1]) if view.row_scale is None else np.float64(view.row_scale)
        z = q * scale[..., None]
        if view.keep_mask is not None:
            z = np.where(view.keep_mask, z, -np.inf)
        if view.keep_above is not None:
            z = np.where(q < view.keep_above[..., None], -np.inf, z)
        self.z, self.gone = z, np.isneginf(z)
        self.empty = self.gone.all(-1)
        self.kept = (~self.gone).sum(-1)
        self.row_max = z.max(-1)
        origin = np.where(self.empty, 0.0, self.row_max)[..., None]
        centred = np.where(self.gone, -np.inf, z - origin)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.logsum = np.log(np.exp(centred).sum(-1))
            self.logp = np.where(self.gone, 0.0, centred - self.logsum[..., None])
            self.p = np.where(self.gone, 0.0, np.exp(self.logp))
            self.entropy = -(self.p * self.logp).sum(-1)
            self.log_sum_sq = np.log((self.p**2).sum(-1))
            total = np.where(self.gone, 0.0, z).sum(-1)
            self.mean_logit = np.where(self.empty, -np.inf, total / self.kept)
        self.slope = readout.slope(x) * scale[..., None]
        size = np.where(self.gone, 0.0, np.abs(z)).max(-1, initial=0.0)
        self.z_error = (12 if readout.softcap else 4) * rounds.eps * size

    @property
    def chain(self) -> float:
        return self.rounds.chain(self.z.shape[-1])

    def error(self, name: str) -> Array:
        if name == "row_max":
            return self.z_error
        eps, sums = self.rounds.eps, np.where(self.empty, 0.0, self.logsum + self.entropy)
        if name == "mean_logit":
            return self.z_error * (1 + self.chain)
        own = eps * (40 + 2 * self.chain + (4 + self.chain) * sums)
        error = own + 2 * self.z_error * (1 + np.abs(self.logp).max(-1))
        return 4 * error if name == "log_sum_sq" else error

    def gradient(self, ids: Array, slopes: Slopes) -> tuple[Array, Array]:
        """And its error."""
        none, eps = np.zeros(self.row_max.shape), self.rounds.eps
        a, b, d, e = (
            (none if x is None else np.float64(x))[..., None]
            for x in (slopes.a, slopes.b, slopes.d, slopes.e)
        )
        hit = np.arange(self.z.shape[-1]) == ids[..., None]
        at = (hit * np.float64(slopes.c)[..., None]).sum(-2)
        found = self.p * (a + b * self.logp + d * self.p) + e + at
        reach = np.abs(self.logp)
        log_sum = np.where(self.empty, 0.0, self.logsum)[..., None]
        relative = eps * (self.rounds.reach * reach + (2 + self.chain) * log_sum + 24 + self.chain)
        relative = relative + 3 * self.z_error[..., None]
        size = np.abs(a) + np.abs(b) * (1 + reach) + 2 * np.abs(d) * self.p
        others = np.abs(e) + (hit * np.abs(slopes.c)[..., None]).sum(-2)
        error = 2 * self.p * size * relative + 8 * eps * (self.p * size + others)
        bent = (self.p * size + others) * self.readout.slope_error(eps)
        error = error * np.abs(self.slope) + bent * np.abs(self.slope).max()
        error = error + self.rounds.step * 8 * (1 + size)
        with np.errstate(invalid="ignore"):
            wanted = np.where(self.gone, 0.0, found * self.slope)
        return wanted, np.where(self.gone, 0.0, error)


def ids_for(seed: int, sizes: tuple[int, ...], vocab: int, dtype: Any) -> Array:
    """Good ones, one of them twice, none, and bad ones."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (*sizes, 6))
    ids[..., 3] = ids[..., 0]
    ids[..., 4], ids[..., 5] = -1, rng.choice([vocab, np.iinfo(dtype).max, 0], sizes)
    return ids.astype(dtype)


def view_for(seed: int, x: Array, readout: Readout) -> View:
    """Temperatures, masks that leave nothing of one row, and thresholds that are not in doubt."""
    rng, sizes = np.random.default_rng(seed), x.shape[:-1]
    mask = rng.random(x.shape) < 0.7
    mask.reshape(-1, x.shape[-1])[-1] = False
    q = np.sort(readout.q(x), -1)
    place = rng.integers(0, x.shape[-1], sizes)[..., None]
    above = np.take_along_axis(q, place, -1)[..., 0]
    if readout != PLAIN:  # q is rounded, and may fall on either side
        below = np.take_along_axis(q, np.maximum(place - 1, 0), -1)[..., 0]
        with np.errstate(invalid="ignore"):
            above = np.where(above - below > 1e-3, (above + below) / 2, -np.inf)
    scale = rng.uniform(0.3, 3.0, sizes)
    return View(np.float32(scale), mask, np.float32(above))


def check_measures(
    kernels: Backend, q: Placed, y: Placed, ids: Array, view: View, readout: Readout, seed: int
) -> None:
    expected = Expected(q.values, view, readout, kernels.rounds)
    wide = np.float64 if q.dtype == "float64" else np.float32
    for wanted in (("log_sum_sq",), NAMES):
        found = kernels.row_measures(q, ids, wanted, view, readout)
        for name in ("row_max", "logsum", *NAMES):
            x = getattr(found, name)
            assert (x is not None) == (name in ("row_max", "logsum", *wanted)), name
            if x is None or name == "top1":
                continue
            assert x.dtype == wide and x.shape == q.sizes, name
            exact = np.where(expected.empty & (name == "entropy"), 0.0, getattr(expected, name))
            with np.errstate(invalid="ignore"):
                near = np.abs(x - exact) <= expected.error(name)
            assert (near | (x == exact)).all(), (name, x, exact)
        hit = np.take_along_axis(expected.z, np.clip(ids, 0, q.vocab - 1), -1)
        hit = np.where(ids < 0, 0.0, np.where(ids >= q.vocab, np.nan, hit))
        with np.errstate(invalid="ignore"):
            near = np.abs(found.picked - hit) <= expected.z_error[..., None]
        assert (near | (found.picked == hit) | (np.isnan(found.picked) & np.isnan(hit))).all()
        there = (ids >= 0) & (ids < q.vocab)
        assert (found.picked <= found.row_max[..., None])[there].all()
        assert (found.logsum[~expected.empty] >= 0).all()
        most = np.log(q.vocab) * (1 + 2.0**-22)  # float32 has no log V
        if found.entropy is not None:
            assert ((found.entropy >= 0) & (found.entropy <= most)).all()
        if found.log_sum_sq is not None:
            assert (found.log_sum_sq <= 0).all()
        if found.top1 is not None:
            best = np.take_along_axis(expected.z, found.top1[..., None], -1)[..., 0]
            assert (best >= expected.row_max - 2 * expected.z_error)[~expected.empty].all()
        if found.mean_logit is not None:
            np.testing.assert_array_equal(found.kept, expected.kept)

    a, b, d = vectors_for(seed, q.sizes)
    e = np.float32(np.random.default_rng(seed).standard_normal(q.sizes))
    e.flat[::2] = 0
    c = np.float32(np.random.default_rng(seed).standard_normal(ids.shape))
    row_max, logsum = found.row_max, found.logsum
    for slopes in (
        Slopes(a, b, c, d, e),
        Slopes(a, None, c, None, None),
        Slopes(0 * a, b, c, d, None),
    ):
        y.poison()
        kernels.row_measures_grad(q, ids, row_max, logsum, slopes, y, view, readout)
        close(y.rows, y.dtype, *expected.gradient(ids, slopes))
        assert not y.values[expected.gone].any()
        assert y.untouched_outside() and q.untouched_outside()


class MeasuresKernels:
    """What backends have to do that have ``row_measures``; beside ``RowKernels``."""

    measure_vocabs: ClassVar[Sequence[int]] = (1, 2, 17, 331)
    measure_views: ClassVar[Sequence[bool]] = (False, True)
    moving_vocab: ClassVar[int] = 331
    measure_readouts: ClassVar[Sequence[Readout]] = (PLAIN, Readout(0.5, 8.0), Readout(1.5))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "measuring" in metafunc.fixturenames:
            numbers = metafunc.function.__name__ == "test_measures_match_float64"
            chosen = self.measure_forms("numbers" if numbers else "edges")
            values = [(self.forms[form], dtype) for form, dtype in chosen]
            ids = ["-".join(given) for given in chosen]
            metafunc.parametrize(["measuring", "dtype"], values, ids=ids)
        else:
            super().pytest_generate_tests(metafunc)

    def measure_forms(self, part: str) -> list[tuple[str, str]]:
        """What is tested, on numbers and at edges; few where each is compiled."""
        return self.edge_forms()

    def test_measures_match_float64(self, measuring: Backend, dtype: str) -> None:
        for vocab, with_view in itertools.product(self.measure_vocabs, self.measure_views):
            for seed, readout in enumerate(self.measure_readouts):
                q = Placed(dtype, (2, 3), vocab, start=3, gap=5)
                q.holding(logits_for(vocab + seed, (2, 3), vocab, scale=4.0))
                y = Placed(dtype, (2, 3), vocab, start=1, gap=2, transposed=True)
                view = view_for(seed, q.values, readout) if with_view else View()
                ids = ids_for(seed, (2, 3), vocab, measuring.label_dtypes[0])
                check_measures(measuring, q, y, ids, view, readout, seed)

    def test_measures_while_the_maximum_moves(self, measuring: Backend, dtype: str) -> None:
        """Sums that were taken about another maximum, and in several parts of a row."""
        vocab = self.moving_vocab
        q, y = (Placed(dtype, (3,), vocab, start=1) for _ in range(2))
        rise = 8 * np.linspace(0, 1, vocab)
        x = logits_for(0, (3,), vocab, 0.5)
        q.holding(x + np.stack([rise, -rise, rise // 2.5 * 2.5]))
        ids = ids_for(0, (3,), vocab, measuring.label_dtypes[0])
        check_measures(measuring, q, y, ids, View(), PLAIN, 0)

    def test_measures_in_place_and_of_silent_rows(self, measuring: Backend, dtype: str) -> None:
        """A gradient over its logits; and rows of NaN whose coefficients are 0."""
        vocab = 331
        q, y = (Placed(dtype, (4,), vocab) for _ in range(2))
        x = logits_for(0, (4,), vocab, 3.0)
        q.holding(x)
        ids = ids_for(1, (4,), vocab, measuring.label_dtypes[0])
        view = View(keep_mask=np.random.default_rng(0).random((4, vocab)) < 0.5)
        one = np.ones(4, np.float32)
        slopes = Slopes(one, one, np.ones(ids.shape, np.float32), one, one)
        found = measuring.row_measures(q, ids, (), view, PLAIN)
        measuring.row_measures_grad(q, ids, found.row_max, found.logsum, slopes, y, view, PLAIN)
        measuring.row_measures_grad(q, ids, found.row_max, found.logsum, slopes, q, view, PLAIN)
        np.testing.assert_array_equal(q.rows, y.rows)

        x[1] = np.nan
        q.holding(x)
        quiet = np.float32([1, 0, 1, 1])
        c = np.ones(ids.shape, np.float32) * quiet[:, None]
        slopes = Slopes(quiet, quiet, c, quiet, quiet)
        found = measuring.row_measures(q, ids, NAMES, View(), PLAIN)
        assert np.isnan(found.row_max + found.logsum)[1] and np.isnan(found.entropy[1])
        assert 0 <= found.top1[1] < vocab
        measuring.row_measures_grad(q, ids, found.row_max, found.logsum, slopes, y, View(), PLAIN)
        assert not y.values[1].any() and np.isfinite(y.values).all()

    def test_the_first_of_equals_is_the_top(self, measuring: Backend, dtype: str) -> None:
        """And strongly negative logits are nothing special, -inf alone is."""
        vocab = 331
        q = Placed(dtype, (4,), vocab)
        x = np.full((4, vocab), -60000.0)  # of every dtype
        x[1, [300, 40]], x[2], x[3, 5] = 3.0, -np.inf, -1.0
        q.holding(x)
        ids = np.array([[0], [40], [1], [5]], measuring.label_dtypes[0])
        found = measuring.row_measures(q, ids, NAMES, View(), PLAIN)
        np.testing.assert_array_equal(found.top1, [0, 40, 0, 5])
        uniform = np.log(vocab)
        np.testing.assert_allclose(found.entropy, [uniform, np.log(2), 0, 0], atol=1e-5)
        np.testing.assert_allclose(found.log_sum_sq[:2], [-uniform, -np.log(2)], atol=1e-5)
        assert found.log_sum_sq[2] == found.mean_logit[2] == -np.inf and found.kept[2] == 0
        assert found.log_sum_sq[3] == 0
