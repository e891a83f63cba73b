"""A plain batch, and IQLearn on it with its gradient, for tests that state properties."""

from typing import Any

import torch
from torch import Tensor

import irl_ops.torch as irl

V = 33
ULP = 2.0**-23  # spacing of float32 numbers at 1


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17)
    logits = 3 * torch.randn(*shape, V, generator=generator)
    labels = torch.randint(V, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = -100
    return logits.requires_grad_(), labels


def run(logits: Tensor, labels: Tensor, upstream: Any = 1.0, **options: Any) -> tuple:
    logits.grad = None
    loss = irl.iqlearn_loss(logits, labels, **{"lam": 0.3, "gamma": 0.9, **options})
    (loss * upstream).sum().backward()
    return loss.detach(), logits.grad
