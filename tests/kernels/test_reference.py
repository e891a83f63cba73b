"""The row kernels of the reference against the contract, and the contract's numbers by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from irl_ops.kernels import reference
from irl_ops.kernels.reference import measures

from .backend import Array, Backend, Case
from .exact import PLAIN, Arithmetic, Exact, Readout
from .measures_contract import MeasuresKernels
from .memory import Placed
from .readout_contract import ReadoutKernels


class Reference(Backend):
    """On arrays of one library: what makes them of NumPy's, and back."""

    label_dtypes = (np.int64, np.int32)

    def __init__(
        self,
        dtypes: tuple[str, ...],
        eps: float,
        to: Callable[[Any], Any],
        back: Callable[[Any], Any],
    ) -> None:
        self.dtypes, self.to, self.back = dtypes, to, back
        # sums are NumPy's or torch's: 128 numbers one after the other in one of 8 lanes
        self.rounds = Arithmetic(eps, more=40)

    def call(self, kernel: str, q: Placed, *given: Any, **options: Any) -> Any:
        moved = [self.vector(q, x) if isinstance(x, np.ndarray) else x for x in given]
        with np.errstate(all="ignore"):
            out = getattr(reference, kernel)(self.to(q), *moved, **options)
        return [None if x is None else self.back(x) for x in out] if type(out) is tuple else out

    def vector(self, q: Placed, x: Array) -> Any:
        return self.to(x.astype(np.float64) if (q.dtype, x.dtype) == ("float64", np.float32) else x)

    def row_stats(self, q, labels, entropy=True, readout=PLAIN):
        return self.call("row_stats", q, labels, entropy, **readout.options)

    def row_grad(self, q, labels, row_max, logsum, a, b, c, y, readout=PLAIN):
        given = (labels, row_max, logsum, a, b, c)
        y.rows[...] = self.back(self.call("row_grad", q, *given, **readout.options))

    def row_stats_grad(self, q, alpha, beta, weight, y, readout=PLAIN):
        *out, dlogits = self.call("row_stats_grad", q, alpha, beta, weight, **readout.options)
        y.rows[...] = dlogits
        return tuple(out)

    def label_logit(self, q, labels, readout=PLAIN):
        return self.back(self.call("label_logit", q, labels, **readout.options))

    def set_label(self, y, labels, elements, readout=PLAIN, label_logit=None):
        options = {**readout.options, "label_logit": None}
        if label_logit is not None:
            options["label_logit"] = self.to(label_logit)
        y.rows[...] = self.back(self.call("set_label", y, labels, elements, **options))

    def row_measures(self, q, ids, wanted, view, readout=PLAIN):
        options = {n: None if x is None else self.vector(q, x) for n, x in view.options.items()}
        with np.errstate(all="ignore"):
            found = measures.row_measures(
                self.to(q), self.to(ids), wanted, **options, **readout.options
            )
        return measures.RowMeasures(*(None if x is None else self.back(x) for x in found))

    def row_measures_grad(self, q, ids, row_max, logsum, slopes, y, view, readout=PLAIN):
        options = {n: None if x is None else self.vector(q, x) for n, x in view.options.items()}
        given = measures.Slopes(
            *(None if x is None else self.vector(q, x) for x in vars(slopes).values())
        )
        with np.errstate(all="ignore"):
            y.rows[...] = self.back(
                measures.row_measures_grad(
                    self.to(q), self.to(ids), self.to(row_max), self.to(logsum), given,
                    **options, **readout.options,
                )
            )  # fmt: skip


def to_torch(x: Placed | Array) -> torch.Tensor:
    """The same memory."""
    rows = x.rows if isinstance(x, Placed) else x
    if rows.dtype == np.uint16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def from_torch(x: torch.Tensor) -> Array:
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def to_numpy(x: Placed | Array) -> Array:
    return x.rows if isinstance(x, Placed) else x


class TestReference(MeasuresKernels, ReadoutKernels, examples=50):
    forms: ClassVar = {
        "numpy": Reference(("float32", "float16"), 2.0**-24, to_numpy, np.asarray),
        "torch": Reference(("float32", "bfloat16", "float16"), 2.0**-24, to_torch, from_torch),
        # in float64 throughout, where the expectation rounds as well
        "float64": Reference(("float64",), 2.0**-51, to_torch, from_torch),
    }
    cases = (Case((2, 3), 1), Case((2, 3), 2), Case((), 17), Case((3,), 5000))
    certain_batches = 1
    random_readouts = ReadoutKernels.readouts


def test_a_soft_cap_needs_the_labels_logits() -> None:
    zero = np.zeros((2, 3))
    with pytest.raises(ValueError, match="softcap needs label_logit"):
        reference.set_label(zero, np.zeros(2, int), np.zeros(2), softcap=3.0)


@pytest.mark.parametrize("readout", TestReference.readouts, ids=str)
def test_the_numbers_of_the_contract_by_autograd(readout: Readout) -> None:
    """p (a + b log p) is the gradient of (a - b H) V - b H with that first H held."""
    masked = [0, 3, 70]
    kept = [j for j in range(71) if j not in masked]
    spread = torch.tensor([0.1, 1.0, 10.0, 40.0])[:, None]
    given = torch.randn(4, 71, dtype=torch.float64) * spread
    given[:, masked] = -torch.inf
    exact = Exact.of(given.numpy(), readout)
    a, b = torch.randn(2, 4, dtype=torch.float64)

    x = given.clone().requires_grad_()
    scale, cap = readout.logit_scale, readout.softcap
    q = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
    log_p, value = q[:, kept].log_softmax(-1), q[:, kept].logsumexp(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = ((a - b * entropy.detach()) * value - b * entropy).sum()
    (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
    (slope,) = torch.autograd.grad(q.sum(), x)

    near = dict(rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(exact.row_max + exact.logsum, value.detach(), **near)
    np.testing.assert_allclose(exact.entropy, entropy.detach(), **near)
    np.testing.assert_allclose(exact.slope[:, kept], slope[:, kept], **near)
    assert (exact.slope[:, masked] == (scale if cap is None else 0)).all()
    found = exact.gradient(a.numpy(), b.numpy())
    np.testing.assert_allclose(found[:, kept], gradient[:, kept], **near)
    assert not found[:, masked].any() and np.isneginf(exact.q[:, masked]).all()
