"""inplace=True: the gradient takes the logits' storage, where nobody else needs it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

import irl_ops.torch as irl

from ..cases import Case, cases, check

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
V = 33
LABELS = torch.randint(V, (2, 4), generator=torch.Generator().manual_seed(1))


def linear(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight, and the logits that they make."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 4, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, 8, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, hidden @ weight.mT


@given(case=cases())
@settings(max_examples=100)
def test_loss_and_gradients(backend: str, case: Case) -> None:
    if case.options["reduction"] == "none":
        case.options["reduction"], case.upstream = "sum", 0.5
    if case.logits.stride(-1) != 1:
        case.leaf, case.view = case.logits.contiguous(), lambda x: x
    view = case.view
    case.view = lambda leaf: view(leaf.clone())

    def function(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        version = logits._version
        loss = getattr(irl, case.name)(logits, labels, **options, inplace=True, backend=backend)
        at_once = logits.dtype != torch.float16  # whose gradient waits for the backward pass
        assert logits._version > version or logits.numel() == 0 or not at_once
        return loss

    check(function, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["iqlearn_loss", "mle_loss", "online_iqlearn_loss"])
def test_same_bits_in_the_same_storage(backend: str, name: str, dtype: torch.dtype) -> None:
    more = (torch.tensor([True, False]),) if name == "online_iqlearn_loss" else ()
    options = dict(entropy_coef=0.1, return_metrics=True, backend=backend)
    hidden, weight, logits = linear(dtype)
    loss, metrics = getattr(irl, name)(logits, LABELS, *more, **options)
    expected = torch.autograd.grad(loss, (hidden, weight, logits))

    hidden, weight, logits = linear(dtype)
    storage = logits.data_ptr()
    same, same_metrics = getattr(irl, name)(logits, LABELS, *more, **options, inplace=True)
    gradients = torch.autograd.grad(same, (hidden, weight, logits))
    assert_close((loss, metrics), (same, same_metrics))  # float16 takes two ways, with other sums
    assert all(map(torch.equal, gradients, expected))
    assert gradients[2].data_ptr() == storage
    assert logits.isnan().all()  # whoever reads them later notices


def test_a_float16_gradient_is_scaled_before_it_is_rounded(backend: str) -> None:
    """It waits for the backward pass, and so for the factor of a GradScaler, here as well."""
    _, _, logits = linear(torch.float16)
    loss = irl.iqlearn_loss(logits, LABELS, inplace=True, backend=backend)
    (scaled,) = torch.autograd.grad(64 * loss, logits)
    _, _, exact = linear(torch.float16)
    expected = torch.autograd.grad(64 * irl.iqlearn_loss(exact, LABELS, backend=backend), exact)[0]
    assert torch.equal(scaled, expected)


def refused(logits: Tensor, message: str, **options: Any) -> None:
    before, version = logits.detach().clone(), logits._version
    with pytest.raises(ValueError, match=f"inplace=True with .*{message}"):
        irl.iqlearn_loss(logits, LABELS, inplace=True, **options)
    assert torch.equal(logits, before) and logits._version == version


def test_leaves_are_refused(backend: str) -> None:
    leaf = torch.randn(2, 4, V, requires_grad=True)
    refused(leaf, "a leaf", backend=backend)
    refused(leaf.view(8, V).view(2, 4, V), "a leaf", backend=backend)
    larger = torch.randn(2, 5, V, requires_grad=True)
    refused(larger[:, 1:], "a leaf", backend=backend)
    buffer = torch.randn(2, 5, V)
    refused(buffer[:, 1:].requires_grad_(), "a leaf", backend=backend)  # a leaf that is a view
    refused(larger.detach()[:, 1:].requires_grad_(), "a leaf", backend=backend)


def test_overlapping_views_are_refused(backend: str) -> None:
    computed = 2 * torch.randn(2, 4, V, requires_grad=True)
    refused(computed[:, :1].expand(2, 4, V), "overlap", backend=backend)
    refused(computed[:1].expand(2, 4, V), "overlap", backend=backend)
    refused(computed.as_strided((2, 4, V), (4, 1, 1)), "overlap", backend=backend)
    refused(computed.as_strided((2, 4, V), (4 * V, V - 1, 1)), "overlap", backend=backend)
    refused(computed[..., :1].expand(2, 4, V), "strides", backend=backend)


def test_copied_logits_are_refused(backend: str) -> None:
    computed = 2 * torch.randn(2, V, 4, requires_grad=True)
    refused(computed.mT, "strides", backend=backend)
    refused(2 * torch.randn(2, 4, V, requires_grad=True), "reduction", reduction="none")


def test_views_of_computed_logits_are_served(backend: str) -> None:
    """[T, B, V] seen as [B, T, V], and a slice, whose other elements stay as they are."""
    computed = 2 * torch.randn(5, 2, V + 3, requires_grad=True)
    before = computed.detach().clone()
    logits = computed.movedim(0, 1)[:, 1:, 1:-2]
    expected = logits.detach().clone().requires_grad_()
    irl.iqlearn_loss(expected, LABELS, backend=backend).backward()
    loss = irl.iqlearn_loss(logits, LABELS, inplace=True, backend=backend)
    (gradient,) = torch.autograd.grad(loss, computed)
    # kernels may add up in an order that depends on where a row starts in memory
    torch.testing.assert_close(
        gradient.movedim(0, 1)[:, 1:, 1:-2], expected.grad, rtol=1e-5, atol=1e-7
    )
    inside = computed.detach().movedim(0, 1)[:, 1:, 1:-2]
    assert torch.equal(gradient.movedim(0, 1)[:, 1:, 1:-2], inside)
    assert torch.equal(computed[0], before[0])
    assert torch.equal(computed[..., :1], before[..., :1])
    assert torch.equal(computed[..., -2:], before[..., -2:])


@pytest.mark.parametrize(
    "produce",
    [
        lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1),
        lambda x: x.tanh(),
        lambda x: x.exp(),
        lambda x: x.sigmoid(),
    ],
    ids=["softmax", "log_softmax", "tanh", "exp", "sigmoid"],
)
def test_producers_that_need_their_output_fail_loudly(backend: str, produce: Any) -> None:
    leaf = torch.randn(2, 4, V, requires_grad=True)
    loss = irl.iqlearn_loss(produce(leaf), LABELS, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_others_that_saved_the_logits_fail_loudly(backend: str) -> None:
    _, _, logits = linear()
    penalty = logits.square().sum()
    loss = irl.iqlearn_loss(logits, LABELS, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


def test_without_a_gradient_nothing_is_overwritten(backend: str) -> None:
    _, _, logits = linear()
    for q, enabled in ((logits, False), (logits.detach(), True), (torch.zeros(2, 4, V), True)):
        before, version = q.detach().clone(), q._version
        with torch.set_grad_enabled(enabled):
            loss = irl.iqlearn_loss(q, LABELS, inplace=True, backend=backend)
        assert torch.equal(q, before) and q._version == version
        assert_close(loss, irl.iqlearn_loss(q, LABELS, backend=backend))  # summed in other orders


def test_values_beside_the_logits(backend: str) -> None:
    """A value head in a column of its own of the same tensor."""
    results = []
    for inplace in (False, True):
        leaf = torch.randn(2, 4, V + 1, generator=torch.Generator().manual_seed(3))
        leaf.requires_grad_()
        both = 2 * leaf
        loss = irl.iqlearn_loss(
            both[..., :V], LABELS, values=both[..., V], inplace=inplace, backend=backend
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *results))
