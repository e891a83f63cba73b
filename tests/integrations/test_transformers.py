"""The loss inside models and a Trainer, against float64 autograd of the formula."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
)

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    apply_iqlearn,
    iqlearn_loss_func,
)

from .tiny_transformers import (
    CLOSE_UPDATE,
    OPTIONS,
    assert_one_step,
    close_loss,
    collate,
    every_model,
    examples,
    llama,
    mixtral,
    naive_loss,
    naive_sum,
    parameters,
    reference_gradients,
    t5,
    train,
)


@every_model
def test_one_accumulated_step_is_float64_autograd(build, tmp_path):
    model = build()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    trainer = train(apply_iqlearn(model, **OPTIONS), data, tmp_path, callbacks=[IQLearnCallback()])
    assert_one_step(model, before, gradients)
    assert trainer.model_accepts_loss_kwargs


@every_model
def test_loss_func_takes_the_same_step(build, tmp_path):
    model = build()
    data = examples(model)
    aligned = model.config.is_encoder_decoder
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)

    def collator(rows):
        batch = collate(rows)
        if aligned:  # as DataCollatorForSeq2Seq(tokenizer, model=model) does
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(
                batch["labels"]
            )
        return batch

    loss_func = iqlearn_loss_func(shift=not aligned, **OPTIONS)
    callbacks = [IQLearnCallback(loss_func)]
    trainer = train(
        model, data, tmp_path, callbacks=callbacks, loss_func=loss_func, collator=collator
    )
    assert_one_step(model, before, gradients)
    assert "nll" in trainer.state.log_history[0]


@every_model
@pytest.mark.parametrize("num_items", [None, 10, torch.tensor(10), torch.tensor([10.0])])
def test_lam_zero_is_the_builtin_loss(build, num_items):
    model = build()
    batch = collate(examples(model))
    builtin = model(**batch).loss
    count = (batch["labels"] != -100).sum()
    model = apply_iqlearn(model, lam=0.0)
    loss = model(**batch, num_items_in_batch=num_items).loss
    close_loss(loss, builtin if num_items is None else builtin * count / 10)


class ReservedLlamaForCausalLM(LlamaForCausalLM):
    """As some vision-language models: the Trainer is told to pass no num_items_in_batch."""

    accepts_loss_kwargs = False

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_takes_no_loss_kwargs_is_normalised_as_well(tmp_path):
    model = ReservedLlamaForCausalLM(llama().config)
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    train(apply_iqlearn(model, **OPTIONS), data, tmp_path)
    assert_one_step(model, before, gradients)


def test_gradient_checkpointing(tmp_path):
    model = llama()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    train(apply_iqlearn(model, **OPTIONS), data, tmp_path, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_one_step(model, before, gradients)


@pytest.mark.parametrize("build", [llama, t5])
@pytest.mark.parametrize("peft_first", [True, False])
def test_lora(build, peft_first, tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "q"], init_lora_weights=False, lora_dropout=0.0
    )
    model = build()
    data = examples(model)
    if peft_first:
        model = apply_iqlearn(get_peft_model(model, config), **OPTIONS)
    else:
        model = get_peft_model(apply_iqlearn(model, **OPTIONS), config)
    plain = get_peft_model(build(), config)
    plain.load_state_dict(model.state_dict())
    gradients = reference_gradients(plain, [collate(data)])
    assert gradients and all("lora" in name for name in gradients)
    before = parameters(model)
    train(model, data, tmp_path, callbacks=[IQLearnCallback()])
    assert_one_step(model, before, gradients)


@every_model
def test_inplace_and_entropy_reach_the_loss(build):
    model = build()
    batch = collate(examples(model))
    shift = not model.config.is_encoder_decoder
    reference = copy.deepcopy(model).double()
    logits = reference(**batch).logits
    total, count = naive_sum(logits, batch["labels"], shift=shift)
    labels = F.pad(batch["labels"][:, shift:], (0, int(shift)), value=-100)
    entropy = torch.distributions.Categorical(logits=logits).entropy()[labels != -100].mean()
    expected = total / count - 0.3 * entropy
    expected.backward()
    loss = apply_iqlearn(model, **OPTIONS, entropy_coef=0.3, inplace=True)(**batch).loss
    close_loss(loss, expected)
    loss.backward()
    for name, parameter in reference.named_parameters():
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=CLOSE_UPDATE, atol=1e-6, check_dtype=False
        )
    close_loss(torch.tensor(model.loss_function.drain("")["entropy"]), entropy)


def test_router_loss_is_kept():
    model = mixtral()
    batch = collate(examples(model))
    aux = 0.5 * model(**batch).aux_loss
    assert aux > 0.1
    expected = naive_loss(model, [batch]) + aux  # the experts' kernels have no float64
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, expected)


@pytest.mark.parametrize("build", [llama, t5])
def test_bf16_autocast_keeps_the_loss(build, tmp_path):
    """accelerate wraps the forward, and may unwrap it further than it wrapped."""
    model = apply_iqlearn(build(), **OPTIONS)
    data = examples(model)
    trainer = train(model, data, tmp_path, bf16=True, callbacks=[IQLearnCallback()])
    batch = collate(data)
    wrapped = model(**batch).loss
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    expected = naive_loss(copy.deepcopy(model).double(), [batch])
    close_loss(model(**batch).loss, expected)
    assert abs(wrapped - expected) < 0.02 * expected  # bf16 keeps two to three digits


def test_torch_compile():
    model = apply_iqlearn(llama(), **OPTIONS)
    batch = collate(examples(model))
    eager = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        loss = compiled(**batch).loss
        loss.backward()
    close_loss(loss, eager)
