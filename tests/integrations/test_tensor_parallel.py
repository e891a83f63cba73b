"""Two ranks on gloo, each with half of the columns: Megatron's and torchtitan's way."""

import types
from pathlib import Path

import pytest
import torch

from .. import naive
from ..launch import launch
from . import test_megatron as megatron
from .tiny_transformers import close_loss


def main(folder: Path) -> None:
    """Losses and the gradients of what this rank has, of both trainers."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    from irl_ops.integrations.torchtitan import IQLearnLoss

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    torch.manual_seed(0)
    model, made = megatron.GPTModel(tensor_model_parallel_size=2), megatron.documents()
    half = megatron.PADDED // 2  # padding is on the second rank alone
    weight = model.output_layer.weight.detach().split(half)[rank]
    model.output_layer = torch.nn.Linear(8, half, bias=False)
    model.output_layer.weight.data = weight.clone()
    model.pg_collection = types.SimpleNamespace(tp=mesh.get_group())
    megatron.apply_iqlearn(model, **megatron.OPTIONS)
    batch = megatron.one_row(made)
    total, count = megatron.loss_func(batch["loss_mask"], megatron.run(model, batch))
    (total / count).backward()
    gradients = [model.embedding.weight.grad, model.output_layer.weight.grad]

    labels = torch.where(batch["loss_mask"] != 0, batch["labels"], -100)
    torch.manual_seed(0)
    whole = torch.randn(*labels.shape, megatron.VOCAB)
    pred = DTensor.from_local(whole, mesh, [Replicate()]).redistribute(mesh, [Shard(2)])
    pred = pred.detach().requires_grad_()
    loss_fn = IQLearnLoss.Config(lam=0.3, gamma=0.9, vocab_size=megatron.VOCAB).build()
    loss, metrics = loss_fn(pred, labels, (labels != -100).sum(), positions=batch["position_ids"])
    loss.backward()
    slope = pred.grad.full_tensor()
    saved = (total / count).detach(), gradients, loss.detach(), slope, metrics["nll_mean"]
    torch.save(saved, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_float64_autograd_of_the_separate_documents(tmp_path):
    launch(__file__, tmp_path, ranks=2)
    torch.manual_seed(0)
    model, made = megatron.GPTModel(), megatron.documents()
    expected, gradients = megatron.reference(model, made)
    batch = megatron.one_row(made)
    labels = torch.where(batch["loss_mask"] != 0, batch["labels"], -100)
    torch.manual_seed(0)
    logits = torch.randn(*labels.shape, megatron.VOCAB).double().requires_grad_()
    titan, _ = naive.loss(
        "iqlearn_loss", logits, labels, lam=0.3, gamma=0.9, position_ids=batch["position_ids"]
    )
    titan.backward()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for loss, _, titan_loss, slope, titan_nll in ranks:
        close_loss(loss, expected)
        close_loss(titan_loss, titan)
        close_loss(slope, logits.grad)
        close_loss(titan_nll, nll)
    # The embedding's gradient is a sum over ranks, which Megatron adds up in its output layer.
    close_loss(sum(grads[0] for _, grads, *_ in ranks), gradients["embedding.weight"])
    shards = torch.cat([grads[1] for _, grads, *_ in ranks])
    close_loss(shards, gradients["output_layer.weight"])
