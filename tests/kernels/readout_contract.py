"""The contract of row kernels that scale and cap the logits they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from .backend import Array, Backend, check, labels_for
from .contract import RowKernels, parametrize
from .exact import PLAIN, Exact, Readout
from .memory import Placed


class ReadoutKernels(RowKernels):
    """What backends have to do that take a Readout, beside the rest of the contract."""

    readouts: ClassVar[Sequence[Readout]] = (
        PLAIN,
        Readout(0.0625),
        Readout(3.0),
        Readout(1.0, 30.0),
        Readout(0.5, 8.0),
        Readout(2.0, 1e4),
    )
    readout_vocabs: ClassVar[Sequence[int]] = (331,)
    certain_batches: ClassVar[int] = 5

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        chosen = self.readout_forms()
        if "readout" in metafunc.fixturenames:
            parametrize(self, metafunc, "readout", chosen)
        if "cap" in metafunc.fixturenames:
            parametrize(self, metafunc, "cap", [given for given in chosen if given[2].softcap])

    def readout_forms(self) -> list[tuple[str, str, Readout]]:
        return [(*chosen, readout) for chosen in self.edge_forms() for readout in self.readouts]

    def spread(self, vocab: int) -> Array:
        """From 0 to beyond what saturates each of the caps; some columns are masked."""
        scales = np.array([0.01, 0.1, 1, 1, 5, 10, 20, 40, 200])[:, None]
        x = np.random.default_rng(vocab).standard_normal((9, vocab)) * scales
        if vocab > 3:
            x[:, [0, 3, vocab - 1]] = -np.inf
        return x

    def test_scaled_and_capped(self, kernels: Backend, dtype: str, readout: Readout) -> None:
        for vocab in self.readout_vocabs:
            q, y = Placed(dtype, (9,), vocab, 3, 5), Placed(dtype, (9,), vocab, 1, 2)
            q.holding(self.spread(vocab))
            labels = labels_for(0, (9,), vocab, kernels.label_dtypes[0])
            labels[5:] = [min(3, vocab - 1), 0, vocab // 2, vocab // 3]  # the first two masked
            check(kernels, q, y, labels, vocab, readout)
            x = q.values  # of which a scale below 0 makes the smallest the largest
            best = np.where(np.isneginf(x), x, x * np.sign(readout.logit_scale)).argmax(-1)
            best = best.astype(labels.dtype)
            row_max, _, picked, _ = kernels.row_stats(q, best, readout=readout)
            np.testing.assert_array_equal(picked, row_max)

    def test_a_certain_label_has_no_positive_log_likelihood(
        self, kernels: Backend, dtype: str, readout: Readout
    ) -> None:
        """One logit far above the others: logsum >= 0 whatever the rounding of q."""
        sizes, vocab = self.tiled
        q, rng = Placed(dtype, sizes, vocab), np.random.default_rng(0)
        for _ in range(self.certain_batches):
            x = rng.standard_normal(q.rows.shape) - 100
            x[..., 7] = rng.uniform(1, 90, sizes)
            labels = np.full(sizes, 7, kernels.label_dtypes[0])
            row_max, logsum, picked, _ = kernels.row_stats(q.holding(x), labels, readout=readout)
            assert (logsum >= 0).all()
            np.testing.assert_array_equal(picked, row_max)

    def test_ends_of_a_cap(self, kernels: Backend, dtype: str, cap: Readout) -> None:
        """+inf becomes the cap and gets no gradient, -inf stays -inf, and a NaN stays one."""
        (vocab, *_) = self.readout_vocabs[-1:]
        q, y = Placed(dtype, (9,), vocab), Placed(dtype, (9,), vocab)
        x = np.ones((9, vocab))
        x[0, 3], x[1, 3], x[2, 3], x[3] = np.inf, np.nan, -np.inf, -np.inf
        q.holding(x)
        ones, labels = np.ones(9, np.float32), np.full(9, 3, kernels.label_dtypes[0])
        row_max, logsum, picked, entropy = kernels.row_stats(q, labels, readout=cap)
        usual = [0, 2, *range(4, 9)]
        exact = Exact.of(x[usual], cap, kernels.rounds)
        assert (np.abs(row_max[usual] - exact.row_max) <= exact.max_error).all()
        for found, wanted in ((logsum, exact.logsum), (entropy, exact.entropy)):
            assert (np.abs(found[usual] - wanted) <= exact.statistics_error).all()
        assert abs(picked[0] - cap.softcap) <= 8 * kernels.rounds.eps * cap.softcap
        assert np.isnan(picked[1]) and np.isnan(logsum[1] + row_max[1]) and np.isnan(entropy[1])

        def check_gradient() -> None:
            # 1 - tanh^2, where tanh has rounded to 1, or just not
            assert abs(y.values[0, 3]) <= 2.0**-19 * cap.logit_scale
            assert np.isnan(y.values[1]).all() and np.isfinite(y.values[usual]).all()
            assert y.values[2, 3] == 0 and not y.values[3].any()

        assert picked[2] == picked[3] == row_max[3] == logsum[3] == -np.inf and entropy[3] == 0
        for weight in (None, ones):
            kernels.row_stats_grad(q, ones, ones, weight, y, cap)
            check_gradient()
        kernels.row_grad(q, labels, row_max, logsum, ones, ones, ones, y, cap)
        check_gradient()
        kernels.set_label(y, labels, ones, cap, picked)
        assert abs(y.values[0, 3]) <= 2.0**-19 * cap.logit_scale and np.isnan(y.values[1, 3])

        zero = 0 * ones  # which silence what is NaN
        for weight in (None, zero):
            kernels.row_stats_grad(q, zero, zero, weight, y, cap)
            assert not y.values.any()
        for statistics in ((row_max, logsum), (zero * np.nan, zero * np.nan)):
            kernels.row_grad(q, labels, *statistics, zero, zero, zero, y, cap)
            assert not y.values.any()
