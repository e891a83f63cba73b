"""Edges of float32 and float16: confident rows, gradients that overflow, labels of -inf."""

import math
from functools import partial
from typing import Any

import pytest
import torch

import irl_ops.torch as irl

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_large_float16_gradient_is_finite(backend: str, inplace: bool) -> None:
    """p A = -89999 overflows float16; the label's element, p A + C = -40000, does not.

    The rows are certain of their labels, whose logits are x = 95, 70, 25, so that V = x. With
    u_t = 2 lam delta_t = 50000, 90000, 50000 the elements are u_t - u_{t-1}.
    """
    leaf = torch.tensor([[95.0, 0.0], [70.0, 0.0], [25.0, -20.0]]).half().requires_grad_()
    options = dict(lam=1000.0, gamma=1.0, reduction="sum", inplace=inplace, backend=backend)
    irl.iqlearn_loss(leaf * 1, torch.zeros(3, dtype=torch.long), **options).backward()
    expected = torch.tensor([[50000.0, 0.0], [40000.0, 0.0], [-40000.0, 0.0]])
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=2**-10, atol=1e-10)


@pytest.mark.parametrize("gap", [8.0, 12.0, 17.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_confident_row_keeps_its_gradient(backend: str, dtype: torch.dtype, gap: float) -> None:
    """p - 1 = -2 exp(-gap) is no difference of numbers near 1: -8.28e-8 for a gap of 17, not 0."""
    leaf = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype).requires_grad_()
    irl.mle_loss(leaf, torch.tensor([0]), backend=backend).backward()
    rest = 2 * math.exp(-gap) / (1 + 2 * math.exp(-gap))
    # eight float32 roundings of an exponential, whose argument is rounded as well
    relative = (8 + gap) * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0.0)
    # on GPUs the sum of exponentials, 1 and more, is rounded to float32
    rounding = 2.0**-23 if backend == "triton" else 0.0
    assert leaf.grad[0, 0].item() == pytest.approx(-rest, rel=relative, abs=rounding)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("detach_next", [False, True])
def test_a_label_of_minus_infinity(backend: str, detach_next: bool, inplace: bool) -> None:
    """The loss is inf, and the gradient holds what the formulas give; the rest stays finite.

    log pi_t = delta_t = -inf. At the label itself p = 0, and C_t = -m + u_t = -inf is all; the
    other elements of its row are m p_j. Row t + 1, where V' is differentiated, has A = m - gamma
    u_t = +inf, and so are all of its elements.
    """
    base = torch.tensor(
        [[-math.inf, 1.0, 0.5], [0.3, 0.1, -0.2], [0.5, 1.0, 2.0]], requires_grad=True
    )
    labels = torch.tensor([0, 1, 2])
    loss = irl.iqlearn_loss(
        base * 1, labels, lam=0.1, gamma=0.9, detach_next=detach_next, inplace=inplace,
        backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss == math.inf
    first, second, third = base.grad
    torch.testing.assert_close(first[1:], base.detach()[0].softmax(-1)[1:] / 3, rtol=1e-5, atol=0)
    assert first[0] == -math.inf
    assert third.isfinite().all()
    if detach_next:
        assert second.isfinite().all()
    else:
        assert (second == math.inf).all()


@pytest.mark.parametrize("function", [irl.mle_loss, partial(irl.iqlearn_loss, lam=0.0)])
def test_a_label_of_minus_infinity_without_a_td_term(backend: str, function: Any) -> None:
    """Cross-entropy: inf, and the gradient p - 1 is finite everywhere, -1 at the label."""
    leaf = torch.tensor([[-math.inf, 1.0, 0.5], [0.3, 0.1, -0.2]], requires_grad=True)
    loss = function(leaf, torch.tensor([0, 1]), reduction="sum", backend=backend)
    loss.backward()
    expected = leaf.detach().double().softmax(-1)
    expected[0, 0] -= 1
    expected[1, 1] -= 1
    assert loss == math.inf
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=0, atol=8 * 2.0**-24)
