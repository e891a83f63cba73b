"""Models whose logits are never stored, against float64 autograd of the formula."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn
from irl_ops.integrations.transformers.fused import UnstoredLogits
from irl_ops.torch import linear_arguments

from .tiny_transformers import (
    CLOSE_UPDATE,
    MODELS,
    OPTIONS,
    TOKENS,
    VOCAB,
    assert_one_step,
    close_loss,
    collate,
    examples,
    gemma2,
    llama,
    mixtral,
    naive_loss,
    parameters,
    reference_gradients,
    t5,
    train,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def made(model_class, config_class, **config):
    def build():
        torch.manual_seed(0)
        return model_class(config_class(**SIZES, **HEADS, **TOKENS | config))

    return build


FAMILIES = {
    **MODELS,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "mistral": made(MistralForCausalLM, MistralConfig),
    "qwen3": made(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "gemma2": gemma2,
    "gemma3": made(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8, final_logit_softcapping=0.7),
    "cohere": made(CohereForCausalLM, CohereConfig, logit_scale=0.3),
    "granite": made(GraniteForCausalLM, GraniteConfig, logits_scaling=0.4),
}


def fused(model):
    return apply_iqlearn(model, fused_linear=True, **OPTIONS).train()


def assert_gradients(model, expected):
    """Of every parameter that trains: float32 against float64, or another order of float32 sums."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= CLOSE_UPDATE * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
def test_loss_and_gradients_are_float64_autograd(build):
    model = build().train()
    batch = collate(examples(model))
    gradients = reference_gradients(model, [batch])
    expected = naive_loss(copy.deepcopy(model).double(), [batch])
    outputs = fused(model)(**batch)
    assert outputs.logits is None
    close_loss(outputs.loss, expected)
    outputs.loss.backward()
    assert_gradients(model, gradients)


@pytest.mark.parametrize("build", [llama, t5])
def test_one_accumulated_step_of_a_trainer(build, tmp_path):
    model = build()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    trainer = train(
        fused(model),
        data,
        tmp_path,
        callbacks=[IQLearnCallback()],
        gradient_checkpointing=True,
    )
    assert_one_step(model, before, gradients)
    assert {"nll", "td", "value", "reward"} <= trainer.state.log_history[0].keys()


def dense_step(model, batch):
    """Loss and gradients of the dense path, of a copy; its numbers have tests of their own."""
    model = apply_iqlearn(copy.deepcopy(model), **OPTIONS).train()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_dense(model, batch):
    loss, gradients = dense_step(model, batch)
    found = fused(model)(**batch).loss
    close_loss(found, loss)
    found.backward()
    assert_gradients(model, gradients)


@pytest.mark.parametrize("num_items", [None, torch.tensor(10)])
def test_a_routers_loss_is_kept(num_items):
    """The experts' kernels have no float64."""
    model = mixtral()
    assert_as_dense(model, collate(examples(model)) | {"num_items_in_batch": num_items})


def packed(ids):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": (positions == 0).cumsum(-1), "position_ids": positions},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 4, 7, 10], dtype=torch.int32)},
        "shift_labels": {"shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100)},
        "batch options": {
            "segment_ids": (positions == 0).cumsum(-1),
            "token_weights": torch.rand(ids.shape),
            "where": torch.rand(ids.shape) > 0.2,
            "truncated": torch.tensor([True]),
            "values": torch.rand(ids.shape),
        },
    }


@pytest.mark.parametrize("marks", packed(torch.zeros(1, 10, dtype=torch.long)))
def test_what_marks_a_batch_is_understood_as_in_the_dense_path(marks):
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (1, 10))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False, **packed(ids)[marks]}
    assert_as_dense(llama(), batch)


# -------------------------------------------------------------------------------------------------
# Logits: where they are, and where they are not
# -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return found


def test_no_tensor_has_the_size_of_the_logits(monkeypatch):
    monkeypatch.setattr(linear_arguments, "default_chunk", lambda weight: 25)  # rows
    model = llama(vocab_size=1000)
    ids = torch.randint(3, 1000, (2, 100))
    sizes = {}
    for fused_linear in (False, True):
        apply_iqlearn(model, fused_linear=fused_linear).train()
        with Largest() as largest:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        sizes[fused_linear] = largest.elements
    assert sizes[False] == 2 * 100 * 1000
    assert sizes[True] < 50 * 1000  # a chunk; the attention's scores have 2 * 2 * 100 * 100


@pytest.mark.parametrize("build", [llama, t5])
def test_logits_are_there_for_evaluation_and_generation(build):
    model = fused(build())
    batch = collate(examples(model))
    trained = model(**batch)
    assert trained.logits is None
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0
    assert not any(isinstance(x, UnstoredLogits) for x in as_tuple)
    without = {name: value for name, value in batch.items() if name != "labels"}
    if not model.config.is_encoder_decoder:
        assert model(**without).logits.shape == (*batch["labels"].shape, VOCAB)
    model.eval()
    assert model(**batch).logits.shape == (*batch["labels"].shape, VOCAB)
    close_loss(model(**batch).loss, trained.loss)
    made = model.generate(**without, max_new_tokens=3, do_sample=False)
    expected = build().eval().generate(**without, max_new_tokens=3, do_sample=False)
    assert torch.equal(made, expected)


def test_a_trainer_predicts_with_logits(tmp_path):
    model = fused(llama())
    data = examples(model)
    trainer = train(model, data, tmp_path, callbacks=[IQLearnCallback()])
    expected = naive_loss(copy.deepcopy(model).double().eval(), [collate(data)])
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (4, 12, VOCAB)
    close_loss(model.train()(**collate(data)).loss, expected)


def test_a_second_call_turns_it_on_and_off():
    model = fused(llama())
    batch = collate(examples(model))
    assert model(**batch).logits is None
    assert apply_iqlearn(model, **OPTIONS)(**batch).logits is not None


def test_copies_and_files_keep_it():
    model = fused(llama(tie_word_embeddings=True))
    batch = collate(examples(model))
    loss = model(**batch).loss
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        outputs = other(**batch)
        assert outputs.logits is None
        close_loss(outputs.loss, loss)
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_bf16_autocast(tmp_path):
    model = fused(gemma2())
    data = examples(model)
    train(model, data, tmp_path, bf16=True, callbacks=[IQLearnCallback()])
    batch = collate(data)
    expected = naive_loss(copy.deepcopy(model).double().eval(), [batch])
    # bf16 keeps two to three digits
    assert abs(model.train()(**batch).loss - expected) < 0.02 * expected


@pytest.mark.slow
def test_torch_compile_leaves_the_head_out():
    model = fused(gemma2())
    batch = collate(examples(model))
    eager = model(**batch).loss
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        outputs = compiled(**batch)
        outputs.loss.backward()
    assert outputs.logits is None
    close_loss(outputs.loss, eager)


# -------------------------------------------------------------------------------------------------
# PEFT
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_first", [True, False])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters_with_a_frozen_and_with_a_trained_head(peft_first, saved):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved
    )
    model = llama()
    batch = collate(examples(model))
    model = fused(model) if not peft_first else model
    model = get_peft_model(model, config)
    model = fused(model) if peft_first else model
    if saved:  # the copy is what counts
        torch.nn.init.normal_(model.get_base_model().lm_head.original_module.weight)
    plain = get_peft_model(llama(), config)
    plain.load_state_dict(model.state_dict())
    gradients = reference_gradients(plain, [batch])
    heads = [name for name in gradients if "lm_head" in name]
    assert len(heads) == len(saved or [])
    expected = naive_loss(copy.deepcopy(plain).double(), [batch])
    outputs = model.train()(**batch)
    assert outputs.logits is None
    close_loss(outputs.loss, expected)
    outputs.loss.backward()
    assert_gradients(model, gradients)


def test_an_adapter_on_the_head_is_refused():
    config = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(NotImplementedError, match="accepted: fused_linear=False"):
        fused(get_peft_model(llama(), config))
    model = get_peft_model(fused(llama()), config)
    batch = collate(examples(model.get_base_model()))
    with pytest.raises(NotImplementedError, match="may not put LoRA on it"):
        model(**batch)
