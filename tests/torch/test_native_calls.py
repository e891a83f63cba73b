"""A whole call in C++: what the random batches of the losses do not reach."""

import pytest
import torch

import irl_ops.torch as irl
from irl_ops import _native
from irl_ops.algebra import Heads, Sequence, Terms, Weighting
from irl_ops.call import Call
from irl_ops.torch import forward, native


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


class Crossings:
    """Stands for the extension, and keeps the names of the functions that are called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str):
        found = getattr(_native, name)
        if isinstance(found, type):
            return found

        def call(*given, **named):
            self.names.append(name)
            return found(*given, **named)

        return call


@pytest.mark.parametrize(
    ("run", "forward_names", "backward_names"),
    [
        (lambda q, y: irl.iqlearn_loss(q, y, lam=0.3, backend="native"), ["loss"], []),
        (lambda q, y: irl.mle_loss(q, y, where=y > 2, backend="native"), ["loss"], []),
        (
            lambda q, y: irl.iqlearn_loss(q, y, reduction="none", backend="native").sum(),
            ["loss"],
            ["loss_grad"],
        ),
        (
            lambda q, y: irl.token_stats(q, y, backend="native").reward.sum(),
            ["token_stats"],
            ["token_stats_grad"],
        ),
    ],
)
def test_a_call_crosses_into_cpp_once(run, forward_names, backward_names, monkeypatch):
    """What keeps small batches cheap: no array algebra on the way, and no scaling by 1."""
    seen = Crossings()
    monkeypatch.setattr(native, "_native", seen)
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    with torch.no_grad():
        run(logits, labels)
    assert seen.names == forward_names
    seen.names.clear()
    run(logits.requires_grad_(), labels).backward()
    assert seen.names == forward_names + backward_names
