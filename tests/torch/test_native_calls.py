"""A whole call in C++: what the random batches of the losses do not reach."""

import pytest
import torch

import irl_ops.torch as irl
from irl_ops import _native
from irl_ops.algebra import Heads, Sequence, Terms, Weighting
from irl_ops.call import Call
from irl_ops.torch import forward


def gradient(labels: torch.Tensor, backend: str, **options) -> torch.Tensor:
    logits = torch.randn(*labels.shape, 9, generator=torch.Generator().manual_seed(0))
    leaf = logits.requires_grad_()
    irl.iqlearn_loss(leaf, labels, backend=backend, **options).backward()
    return leaf.grad


@pytest.mark.parametrize("ends", [[0, 5], [0, 0, 2, 2, 5, 5], [0, 1, 2, 3, 4, 5], [0, 3, 5]])
@pytest.mark.parametrize("shift", [False, True])
def test_ends_of_segments(ends, shift):
    """Empty segments among them."""
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


@pytest.mark.parametrize("backend", irl.available_backends())
def test_a_loss_of_ones_own_takes_the_same_way(backend):
    """Weights that are arrays: the TD term alone, twice as heavy in the second row."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7, requires_grad=True), torch.randint(7, (2, 3))
    td = torch.tensor([1.0, 2.0, 1.0]).expand(2, 3)
    call = Call(
        Terms(mle=0.0, td=td, gamma=0.9), Sequence(), Weighting(reduction="sum"), Heads(),
        metrics=False, inplace=False, backend=backend,
    )  # fmt: skip
    loss = forward.loss_of(call, logits, labels)
    (actual,) = torch.autograd.grad(loss, logits)
    q = logits.double()
    value = torch.nn.functional.pad(q.logsumexp(-1)[:, 1:], (0, 1))
    picked = q.gather(-1, labels[..., None])[..., 0]
    plain = (td * (picked - 0.9 * value) ** 2).sum()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # float32


def test_a_call_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="boundary is 'end', accepted are terminal"):
        _native.Call().boundary = "end"
