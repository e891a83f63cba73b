"""Inputs off the beaten track: garbage, infinities, shared memory, scalars of any dtype."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import irl_ops.torch as irl

from ..plain_batch import ULP, V, batch, run

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def test_garbage_stays_in_its_row(backend: str) -> None:
    """NaN in an ignored row: no matter unless another row bootstraps from it."""
    logits, _ = batch(3)
    labels = torch.tensor([4, 5, -100])
    with torch.no_grad():
        logits[2] = math.nan
    for reduction in ("mean", "none"):
        loss, gradient = run(logits, labels, reduction=reduction, backend=backend)
        assert loss.isfinite().all()
        assert gradient[:2].isfinite().all() and gradient[2].eq(0).all()
    loss, _ = run(logits, labels, boundary="bootstrap", backend=backend)
    assert loss.isnan()
    for options in (dict(lam=0.0), dict(next_values=torch.zeros(3)), dict(values=torch.ones(3))):
        loss, gradient = run(logits, labels, boundary="bootstrap", backend=backend, **options)
        assert loss.isfinite() and gradient[2].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_a_labelled_row_shows(backend: str, garbage: float) -> None:
    logits, labels = batch(2, 4)
    labels[:] = 3
    with torch.no_grad():
        logits[1, 2, 5] = garbage
        assert irl.iqlearn_loss(logits, labels, backend=backend).isnan()
    assert run(logits, labels, backend=backend)[0].isnan()
    rows, _ = run(logits, labels, reduction="none", backend=backend)
    assert rows[0].isfinite().all() and rows[1, 2].isnan()


def test_expanded_logits(backend: str) -> None:
    """Rows that share their memory are read as they are, and their gradients add up."""
    row = torch.randn(V, requires_grad=True)
    labels = torch.randint(V, (2, 3))
    loss = irl.iqlearn_loss(row.expand(2, 3, V), labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, row)
    copied = row.detach().repeat(2, 3, 1).requires_grad_()
    expected, expected_gradient = run(copied, labels, lam=0.1, gamma=1.0, backend=backend)
    # how rows lie in memory decides how a kernel cuts them, and with that the order of its sums
    torch.testing.assert_close(loss, expected, rtol=4 * ULP, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.sum((0, 1)), rtol=0, atol=16 * ULP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_scalars_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    """A 0-d tensor promotes nothing: the loss and its metrics stay float32."""
    logits, labels = batch(2, 4)
    one = torch.tensor(1, dtype=dtype)
    expected, expected_gradient = run(logits, labels, lam=1.0, gamma=1.0, backend=backend)
    loss, gradient = run(logits, labels, lam=one, gamma=one, backend=backend)
    assert loss.dtype == torch.float32 and loss == expected
    assert torch.equal(gradient, expected_gradient)
    for reduction in ("mean", "none"):
        loss, metrics = irl.online_iqlearn_loss(
            logits,
            labels,
            torch.tensor([True, False]),
            lam=one,
            gamma=one,
            alpha=0 * one,
            entropy_coef=one,
            reduction=reduction,
            return_metrics=True,
            backend=backend,
        )
        assert loss.dtype == torch.float32
        assert all(metric.dtype == torch.float32 for metric in metrics.values())
    assert irl.token_stats(logits, labels, gamma=one).reward.dtype == torch.float32


def test_a_label_of_probability_zero(backend: str) -> None:
    """As cross-entropy has it: an infinite loss, and gradients that are not NaN."""
    logits, labels = batch(3)
    labels[:] = torch.tensor([4, 5, 6])
    with torch.no_grad():
        logits[1, 5] = -math.inf
    for reduction in ("mean", "none"):
        exact = logits.detach().clone().requires_grad_()
        F.cross_entropy(exact, labels, reduction=reduction).sum().backward()
        logits.grad = None
        loss = irl.mle_loss(logits, labels, reduction=reduction, backend=backend).sum()
        loss.backward()
        assert loss == math.inf
        torch.testing.assert_close(logits.grad, exact.grad, rtol=8 * ULP, atol=4 * ULP)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_columns_are_as_if_they_were_not_there(backend: str, reduction: str) -> None:
    logits, labels = batch(2, 5)
    padded = torch.cat([logits.detach(), torch.full((2, 5, 31), -math.inf)], -1).requires_grad_()
    options = dict(reduction=reduction, entropy_coef=0.2, backend=backend)
    loss, gradient = run(logits, labels, **options)
    other, other_gradient = run(padded, labels, **options)
    torch.testing.assert_close(other, loss, rtol=4 * ULP, atol=0)
    torch.testing.assert_close(other_gradient[..., :V], gradient, rtol=8 * ULP, atol=ULP)
    assert other_gradient[..., V:].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extremes_do_not_overflow(backend: str, reduction: str) -> None:
    """float32 logits of 1e4 and apart by as much: exp() of neither is a number."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, 50.0, 1e4]])
    labels = torch.tensor([0, 1, 0])
    logits.requires_grad_()
    options = dict(reduction=reduction, gamma=1.0, entropy_coef=0.5, backend=backend)
    loss, gradient = run(logits, labels, **options)
    assert loss.isfinite().all() and gradient.isfinite().all()
    stats = irl.token_stats(logits, labels, backend=backend)
    expected = torch.tensor([0.0, -math.log(3), -1e4])
    torch.testing.assert_close(stats.logprob.detach(), expected, rtol=ULP, atol=ULP)


def test_vmap_is_right(backend: str) -> None:
    logits, labels = batch(3, 5)
    for reduction in ("mean", "none"):
        options = dict(lam=0.3, gamma=0.9, reduction=reduction, backend=backend)
        rows = zip(logits, labels, strict=True)
        each = torch.stack([irl.iqlearn_loss(q, a, **options) for q, a in rows])
        (expected,) = torch.autograd.grad(each.sum(), logits)
        mapped = torch.vmap(partial(irl.iqlearn_loss, **options))(logits, labels)
        (gradient,) = torch.autograd.grad(mapped.sum(), logits)
        torch.testing.assert_close(mapped, each, rtol=8 * ULP, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=16 * ULP, atol=4 * ULP)
