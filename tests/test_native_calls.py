"""A whole call in C++: what the random batches of the losses do not reach."""

import pytest
import torch

import irl_ops.torch as irl
from irl_ops import _native, algebra
from irl_ops.torch import native_loss
from irl_ops.torch.call import Call


def gradient(labels: torch.Tensor, backend: str, **options) -> torch.Tensor:
    logits = torch.randn(*labels.shape, 9, generator=torch.Generator().manual_seed(0))
    leaf = logits.requires_grad_()
    irl.iqlearn_loss(leaf, labels, backend=backend, **options).backward()
    return leaf.grad


@pytest.mark.parametrize("ends", [[0, 5], [0, 0, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5], [3, 5]])
@pytest.mark.parametrize("shift", [False, True])
def test_ends_of_segments(ends, shift):
    """Empty segments among them, and a first one that is not named."""
    labels, options = torch.tensor([1, 2, 3, 4, 5]), dict(cu_seqlens=torch.tensor(ends))
    both = [gradient(labels, name, shift=shift, **options) for name in ("native", "reference")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)  # float32 beside double


@pytest.mark.parametrize("rows", [63, 64, 65, 200])
def test_labels_are_fetched_ahead_and_not_beyond_the_end(rows):
    labels = torch.arange(rows) % 9
    both = [gradient(labels, name) for name in ("native", "reference")]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)  # float32 beside double


def test_without_rows():
    assert not gradient(torch.zeros(2, 0, dtype=torch.long), "native").numel()


def test_another_objective_is_left_to_the_algebra():
    def td_alone(xp, kind, token_weights, **rest):
        loss = algebra.iqlearn_objective(xp, kind, token_weights, **rest)
        return loss._replace(mle=xp.zeros_like(loss.mle))

    call = Call(
        td_alone, torch.zeros(2, dtype=torch.long), {}, {}, 0.0, None, None, "mean", False, None,
        None, False,
    )  # fmt: skip
    logits = torch.zeros(2, 3)
    assert native_loss.loss_and_grad(call, logits, torch.empty_like(logits)) is None


def test_a_call_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="boundary is 'end', accepted are terminal"):
        _native.Call().boundary = "end"
