"""A real ``GPTModel`` of Megatron-Core, micro-batch by micro-batch as its schedules take them.

On a CPU, so that what Megatron does on GPUs alone is replaced: where it allocates, and the state of
random numbers around a dropout of 0.
"""

import contextlib
from functools import partial

import pytest
import torch

from irl_ops.integrations.megatron import apply_iqlearn

from . import test_megatron as stand_in
from .tiny_transformers import close_loss, naive_sum

core = pytest.importorskip("megatron.core", reason="the package megatron-core is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Apex and Transformer Engine, left out

VOCAB, PADDED = stand_in.VOCAB, stand_in.PADDED


@pytest.fixture
def on_a_cpu(monkeypatch):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    fork = lambda self, name=None: contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(random.CudaRNGStatesTracker, "fork", fork)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gpt():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        calculate_per_token_loss=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=64,
        share_embeddings_and_output_weights=True,
    )


def block_diagonal(positions):
    """True where a row does not see another, [1, 1, S, S], from positions that start again."""
    segments = (positions[0] == 0).cumsum(0)
    seen = (segments[:, None] == segments[None]) & torch.ones(
        len(segments), len(segments)
    ).tril().bool()
    return ~seen[None, None]


def forward_step(batches, model):
    """As in pretrain_gpt.py."""
    batch = next(batches)
    output = model(
        batch["input_ids"],
        batch["position_ids"],
        block_diagonal(batch["position_ids"]),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )

    def loss_func(mask, output):
        total, count = stand_in.loss_func(mask, output)
        return total, count.int(), {"loss": total.detach()}

    return output, partial(loss_func, batch["loss_mask"])


def test_a_step_is_the_formula_on_separate_documents(on_a_cpu):
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

    made, model = stand_in.documents(), gpt()
    total = count = 0
    for tokens in made:  # each alone, its logits in float32 and the formula in float64
        ids = torch.tensor([tokens])
        labels = stand_in.unshifted(tokens)
        positions = torch.arange(len(tokens))[None]
        logits = model(ids, positions, block_diagonal(positions))[..., :VOCAB]
        loss, n = naive_sum(logits, labels, shift=True, lam=0.3, gamma=0.9)
        total, count = total + loss, count + n
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total / count, parameters.values())

    apply_iqlearn(model, **stand_in.OPTIONS)
    batches = [stand_in.one_row(made[:2]), stand_in.one_row(made[2:])]
    reports = []
    for batch in batches:  # as in forward_backward_no_pipelining, which counts on a GPU
        output, loss_func = forward_step(iter([batch]), model)
        loss, _ = forward_step_calc_loss(
            model, output, loss_func, model.config, None, False, len(batches), reports, 1, True
        )
        loss.backward()
    close_loss(sum(r["loss"] for r in reports) / count, total / count)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        # Megatron's own finalisation, which waits for its DDP, divides by all tokens
        torch.testing.assert_close(
            parameter.grad / count, gradient, rtol=1e-4, atol=1e-6, msg=name, check_dtype=False
        )
