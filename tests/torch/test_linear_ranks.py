"""The linear loss of a model under DDP and FSDP2: two ranks on gloo have the gradient of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import irl_ops.torch as irl

from .. import naive
from ..launch import launch

D, V, B, T = 8, 31, 4, 7
OPTIONS = dict(lam=0.1, gamma=0.9)


class Model(nn.Module):
    """A body, a head, and the loss inside ``forward``: what a wrapper has gathered is there."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor, labels: Tensor, num_items: float) -> Tensor:
        hidden = torch.tanh(self.body(x))
        loss: Tensor = irl.linear_iqlearn_loss(
            hidden, self.head.weight, labels, bias=self.head.bias, chunk_size=3,
            num_items=num_items, **OPTIONS,
        )  # fmt: skip
        return loss


def batch(dtype: torch.dtype) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Model().to(dtype), torch.randn(B, T, D).to(dtype)
    labels = torch.randint(V, (B, T))
    labels[0, :5], labels[3, 6] = -100, -100  # unequal numbers of labels on the ranks
    return model, x, labels


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for dtype in (torch.float32, torch.float64):
        for kind in ("ddp", "fsdp"):
            model, x, labels = batch(dtype)
            wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
            mine = slice(rank * B // ranks, (rank + 1) * B // ranks)
            # both wrappers average over ranks; num_items is everybody's
            items = (labels >= 0).sum().item() / ranks
            wrapped(x[mine], labels[mine], items).backward()
            for name, p in model.named_parameters():
                gradient = p.grad if kind == "ddp" else p.grad.full_tensor()
                found[f"{kind} {dtype} {name}"] = gradient
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    launch(__file__, tmp_path, ranks=2)
    found = torch.load(tmp_path / "found.pt")
    model, x, labels = batch(torch.float64)
    q = model.head(torch.tanh(model.body(x)))
    naive.loss("iqlearn_loss", q, labels, **OPTIONS)[0].backward()
    assert len(found) == 2 * 2 * 4
    for name, p in model.named_parameters():
        for kind in ("ddp", "fsdp"):
            # float32: sums of a few dozen numbers, and parameters rounded alike in both dtypes
            for dtype, within in (("float32", 1e-5), ("float64", 1e-12)):
                actual = found[f"{kind} torch.{dtype} {name}"].double()
                torch.testing.assert_close(actual, p.grad, rtol=within, atol=within)
