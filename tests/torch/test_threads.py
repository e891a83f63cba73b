"""The threads of the native kernels: torch's own where it has an OpenMP runtime, else our own."""

import sys

import pytest
import torch

import irl_ops.torch as irl
from irl_ops import _native
from irl_ops.torch import native


def gradient(logits, labels):
    leaf = logits.clone().requires_grad_()
    loss = irl.iqlearn_loss(leaf, labels, backend="native")
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.fixture
def restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _native.use_openmp(native._torch_openmp())


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux: GOMP_parallel is looked for there"
)
def test_torch_openmp_is_found():
    assert ("OpenMP" in torch.__config__.show()) == (native._torch_openmp() != 0)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_same_bits_on_borrowed_and_own_threads(threads, restored):
    generator = torch.Generator().manual_seed(0)
    # More than 16 x 2^17 elements, below which fewer threads would be started.
    logits = torch.randn(3, 47, 16001, generator=generator)
    labels = torch.randint(16001, (3, 47), generator=generator)
    torch.set_num_threads(1)
    loss, dlogits = gradient(logits, labels)
    for entry in (native._torch_openmp(), 0):
        _native.use_openmp(entry)
        torch.set_num_threads(threads)
        again = gradient(logits, labels)
        assert again[0] == loss
        assert torch.equal(again[1], dlogits)
