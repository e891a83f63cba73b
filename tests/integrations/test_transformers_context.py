"""Two ranks on gloo that have parts of each sequence take the step of one process.

The Trainer, accelerate and the sharding of its ``cp`` by torch's ``context_parallel`` are the real
ones. Two things stand in for what a CPU has not: attention across ranks, which gathers keys and
values in the place of torch's ring, and DDP in the place of FSDP2, which averages likewise. For
``sp`` the batch is cut as DeepSpeed's data loader cuts it, and Transformers' own function weights
the losses of the ranks.
"""

import gc
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from .. import naive
from ..launch import launch

LR, RANKS, VOCAB = 0.1, 2, 41
OPTIONS = {"lam": 0.1, "gamma": 0.9}
CASES = {
    # 14 rows are two contiguous parts; 16 are pieces from head and tail
    "contiguous, and the end bootstraps": (14, {"boundary": "bootstrap", "entropy_coef": 0.1}, {}),
    "packed and weighted, no logits stored": (16, {}, {"packed": True, "fused_linear": True}),
    "a value head, a count for each rank": (16, {}, {"value_head": True, "average": False}),
    "a compute_loss_func": (16, {}, {"loss_func": True}),
}


def build(**attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, **attention))


def data_of(rows, packed=False):
    """Four sequences; the labels of some of their rows, unevenly on the ranks."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, VOCAB, (4, rows), generator=generator)
    labels = ids.clone()
    labels[:, 0] = labels[1, 5:] = labels[2, :7] = -100
    data = {"input_ids": ids, "labels": labels}
    if packed:
        labels[:, 6] = -100  # the first of a document
        positions = torch.cat([torch.arange(6), torch.arange(rows - 6)])
        data["position_ids"] = positions.expand(4, -1).contiguous()
        data["token_weights"] = torch.rand(4, rows, generator=generator)
    return data


def main(folder: Path) -> None:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
    from torch import distributed as dist
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn import functional as F
    from transformers import Trainer, TrainingArguments
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    from irl_ops.integrations.transformers import (
        IQLearnCallback,
        apply_iqlearn,
        iqlearn_loss_func,
    )

    torch.set_num_threads(1)
    attention = SimpleNamespace(**inspect.unwrap(context_parallel).__globals__)
    found = {}

    class Everywhere(torch.autograd.Function):
        """Rows of all ranks, on axis 2."""

        @staticmethod
        def forward(ctx, x):
            parts = [torch.empty_like(x.contiguous()) for _ in range(RANKS)]
            dist.all_gather(parts, x.contiguous())
            return torch.cat(parts, dim=2)

        @staticmethod
        def backward(ctx, above):
            total = above.contiguous().clone()
            dist.all_reduce(total)
            return total.chunk(RANKS, dim=2)[dist.get_rank()]

    def with_all_keys(index, args, kwargs):
        """Arguments of attention: keys and values of all ranks, and who may see whom."""
        query, *local = args[:3]
        key, value = (Everywhere.apply(x) for x in local)
        mine = index.chunk(RANKS)[dist.get_rank()]
        named = {k: v for k, v in kwargs.items() if k in ("scale", "dropout_p")}
        return (query, key, value), named | {"attn_mask": mine[:, None] >= index}

    def into_attention(self, module, args, kwargs, mesh):
        rows = args[0].shape[2] * RANKS
        index = torch.arange(rows)
        if attention._cp_options.enable_load_balance:
            balancer = attention._create_default_load_balancer(rows, RANKS, "cpu")
            index = balancer._generate_indices()[0].long()
        return with_all_keys(index, args, kwargs)

    attention._ContextParallel.sdpa_input_fn = into_attention
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # it wants a GPU
    for name, (rows, options, kind) in CASES.items():
        kind = dict(kind)
        data = data_of(rows, kind.pop("packed", False))
        average = kind.pop("average", True)
        model, loss_func = build(), None
        if kind.pop("loss_func", False):  # whose labels are not shifted
            loss_func = iqlearn_loss_func(**OPTIONS, **options)
        else:
            model = apply_iqlearn(model, **OPTIONS, **options, **kind)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            per_device_eval_batch_size=4, max_steps=1, optim="sgd", learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1, seed=3,
            average_tokens_across_devices=average, train_sampling_strategy="sequential",
            parallelism_config=ParallelismConfig(cp_size=RANKS),
        )  # fmt: skip
        examples = [{k: x[i] for k, x in data.items()} for i in range(4)]
        trainer = Trainer(
            model, arguments, train_dataset=examples, eval_dataset=examples,
            compute_loss_func=loss_func,
        )  # fmt: skip
        IQLearnCallback(loss_func).attach(trainer)
        trainer.train()
        after = dict(model.named_parameters())
        update = {name: (before[name] - after[name].detach()) / LR for name in before}
        found[name] = update, trainer.state.log_history[0] | trainer.evaluate()
        del trainer, model
        gc.collect()

    # Sequence parallelism: contiguous parts, labels shifted beforehand, no num_items_in_batch.
    rank, group = dist.get_rank(), dist.group.WORLD
    groups = SimpleNamespace(_get_sequence_parallel_group=lambda: group)
    for name in ("deepspeed", "deepspeed.utils"):
        sys.modules[name] = ModuleType(name)
    sys.modules["deepspeed.utils"].groups = groups
    config = SimpleNamespace(cp_size=1, sp_size=RANKS, sp_backend="deepspeed")
    AcceleratorState._shared_state["parallelism_config"] = config
    plain = F.scaled_dot_product_attention

    def over_ranks(*args, **kwargs):
        args, kwargs = with_all_keys(torch.arange(args[0].shape[2] * RANKS), args, kwargs)
        return plain(*args, **kwargs)

    model = apply_iqlearn(build(), **OPTIONS, boundary="bootstrap").train()
    data = sp_batch()
    whole = {
        "input_ids": data["input_ids"],
        "shift_labels": F.pad(data["labels"], (0, 1), value=-100)[:, 1:],
        "position_ids": torch.arange(12).expand(2, -1),
    }
    mine = {k: x.chunk(RANKS, dim=1)[rank].contiguous() for k, x in whole.items()}
    assert rank == 0 or (mine["shift_labels"] == -100).all()
    F.scaled_dot_product_attention = over_ranks
    loss = deepspeed_sp_compute_loss(None, model, mine, False, config)
    loss.backward()
    F.scaled_dot_product_attention = plain
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= RANKS  # as ZeRO does
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found["sp"] = gradients, {"loss": loss.item()}
    # In evaluation DeepSpeed cuts nothing.
    found["sp"][1]["eval_loss"] = model.eval()(**data).loss.item()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    del model
    gc.collect()
    dist.destroy_process_group()


def sp_batch():
    """Where all labels are on the first rank, whose last row bootstraps from the second's first."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 12), generator=generator)
    labels = ids.clone()
    labels[:, 0] = labels[:, 7:] = labels[1, 3:5] = -100
    return {"input_ids": ids, "labels": labels}


def reference(data, options, value_head=False):
    """The gradient and the loss of one process in float64."""
    model = build().double().train()
    rows = data["labels"].shape[1]
    # what the ranks' attention sees: documents are not kept apart
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()[None, None]
    head = torch.zeros(16, 1, dtype=torch.float64, requires_grad=True)
    inputs = {k: data[k] for k in ("input_ids", "position_ids") if k in data}
    out = model(
        **inputs, attention_mask=mask.expand(len(data["labels"]), -1, -1, -1),
        output_hidden_states=True,
    )  # fmt: skip
    more = {k: data[k] for k in ("position_ids", "token_weights") if k in data}
    if value_head:
        more["values"] = (out.hidden_states[-1] @ head)[..., 0]
    count = (data["labels"][:, 1:] != -100).sum()
    total, _ = naive.loss(
        "iqlearn_loss", out.logits, data["labels"], shift=True, num_items=count.item(),
        **OPTIONS, **options, **more,
    )  # fmt: skip
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if value_head:
        gradients["value_head.weight"] = head.grad.T
    return gradients, total.item()


@pytest.mark.slow
def test_two_ranks_with_parts_of_sequences_take_the_step_of_one_process(tmp_path):
    launch(__file__, tmp_path, ranks=RANKS)
    found = torch.load(tmp_path / "found.pt")
    for name, (rows, options, kind) in CASES.items():
        data, head = data_of(rows, kind.get("packed", False)), kind.get("value_head", False)
        expected, loss = reference(data, options, head)
        update, logged = found[name]
        assert logged["loss"] == pytest.approx(loss, rel=1e-5), name
        assert {"nll", "td", "eval_nll"} <= logged.keys()
        assert_close(update, expected, name)
    expected, loss = reference(sp_batch(), {"boundary": "bootstrap"})
    gradients, logged = found["sp"]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(gradients, expected, "sp")


def assert_close(actual, expected, name):
    """Float32 beside float64: to 1e-4 of the whole, sums of terms that partly cancel."""
    assert expected.keys() <= actual.keys()
    error = sum((actual[k].double() - g).square().sum() for k, g in expected.items()).sqrt()
    norm = sum(g.square().sum() for g in expected.values()).sqrt()
    assert norm > 0.1
    assert error < 1e-4 * norm, (name, error / norm)
