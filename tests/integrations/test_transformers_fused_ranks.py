"""Two ranks on gloo without stored logits: DDP, and FSDP2 with and without a unit for the head.

Their gradients are those of the dense path in one process.
DeepSpeed is not installed with the tests, so ZeRO-3 is not among them.
"""

import copy
import gc
from pathlib import Path

import pytest
import torch

from ..launch import launch


def main(folder: Path) -> None:
    """Rank 0 saves, by the kind of wrapper and model, the gradients and those expected."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    from irl_ops.integrations.transformers import apply_iqlearn

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    tokens = {"vocab_size": 41, "pad_token_id": 0, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    llama = LlamaConfig(**tokens, **sizes, **heads)
    tied = LlamaConfig(**tokens, **sizes, **heads, tie_word_embeddings=True)
    t5 = T5Config(
        **tokens,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    ids = torch.randint(3, 41, (4, 9))
    labels = ids.clone()
    labels[1, 5:] = labels[2, :4] = -100
    batch = {"input_ids": ids, "labels": labels, "use_cache": False}
    local = {**batch, "input_ids": ids[2 * rank :][:2], "labels": labels[2 * rank :][:2]}
    options = {"lam": 0.1, "gamma": 0.9}

    def ddp(model):
        return DistributedDataParallel(model)

    def fsdp(model, head=False, **policy):
        for layer in model.base_model.layers if hasattr(model.base_model, "layers") else ():
            fully_shard(layer, **policy)
        if head:
            fully_shard(model.lm_head, **policy)
        return fully_shard(model, **policy)

    def fsdp_head(model):
        return fsdp(model, head=True)

    def fsdp_bf16(model):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fsdp(model, head=True, mp_policy=policy)

    found = {}
    for wrap, kind, config in (
        (ddp, LlamaForCausalLM, tied),
        (ddp, T5ForConditionalGeneration, t5),
        (fsdp, LlamaForCausalLM, llama),
        (fsdp, LlamaForCausalLM, tied),
        (fsdp, T5ForConditionalGeneration, t5),
        (fsdp_head, LlamaForCausalLM, llama),
        (fsdp_bf16, LlamaForCausalLM, llama),
    ):
        torch.manual_seed(0)
        model = kind(config).train()
        dense = apply_iqlearn(copy.deepcopy(model), **options)
        expected = dense(**batch, num_items_in_batch=24).loss
        expected.backward()
        wrapped = wrap(apply_iqlearn(model, fused_linear=True, **options))
        for _ in range(2):  # the second accumulates
            outputs = wrapped(**local, num_items_in_batch=24)
            assert outputs.logits is None
            (2 * outputs.loss / 2).backward()  # the mean over ranks, and two equal micro-batches
        loss = outputs.loss.detach().clone()
        torch.distributed.all_reduce(loss)
        pairs = {"the loss": (loss, expected.detach())}
        for name, parameter in dense.named_parameters():
            gradient = model.get_parameter(name).grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            pairs[name] = (gradient, parameter.grad)
        found[f"{wrap.__name__} {kind.__name__} tied={config.tie_word_embeddings}"] = pairs
        if wrap is not ddp:  # logits of a sharded model, as of any other
            assert wrapped.eval()(**local).logits.shape == (2, 9, 41)
    # A head in parts has no loss of its own: tensor parallelism is refused.
    model = apply_iqlearn(LlamaForCausalLM(llama), fused_linear=True, **options).train()
    mesh = init_device_mesh("cpu", (2,))
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    with pytest.raises(NotImplementedError, match=r"accepted: .* fused_linear=False"):
        parallelize_module(model, mesh, plan)(**batch)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    # As in test_transformers_ddp.py: the reducer goes before its process group.
    del model, wrapped, outputs, dense, loss, expected
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_the_dense_path(tmp_path):
    launch(__file__, tmp_path, ranks=2)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 7
    for case, pairs in found.items():
        # float32 sums in another order; bfloat16 keeps two to three digits
        tolerance = 0.05 if "bf16" in case else 1e-4
        assert max(expected.norm() for _, expected in pairs.values()) > 0.1
        for name, (gradient, expected) in pairs.items():
            error = (gradient - expected).norm()
            assert error <= tolerance * expected.norm() + 1e-6, (case, name)
