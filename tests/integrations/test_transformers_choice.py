"""Where logits are left unstored without being asked for, and heads that change afterwards."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn
from irl_ops.integrations.transformers.model import applied_loss

from .tiny_transformers import (
    OPTIONS,
    VOCAB,
    assert_one_step,
    close_loss,
    collate,
    examples,
    llama,
    parameters,
    reference_gradients,
)


class OwnLoss(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class CappedBelow(LlamaForCausalLM):
    """Does more with its logits than can be taken down."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, attention_mask=attention_mask)[0]).clamp(-9, 9)
        loss = None if labels is None else self.loss_function(logits, labels, VOCAB, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("build", "given", "trainer_class", "chosen"),
    [
        (llama, None, Trainer, True),
        (llama, False, Trainer, False),
        (llama, None, OwnLoss, False),
        (lambda: CappedBelow(llama().config), None, Trainer, False),
    ],
)
def test_a_trainer_chooses_where_nobody_has(build, given, trainer_class, chosen, tmp_path):
    model = build()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    applied = apply_iqlearn(model, fused_linear=given, **OPTIONS)
    trainer = trainer_class(applied, arguments, train_dataset=data, data_collator=collate)
    IQLearnCallback().attach(trainer)
    if isinstance(model, CappedBelow):
        assert applied_loss(model).fused_linear
        with pytest.warns(UserWarning, match="are stored after all: .* calls clamp on its logits"):
            trainer.train()
    else:
        trainer.train()
    assert applied_loss(model).fused_linear is chosen
    assert_one_step(model, before, gradients)


def test_tied_and_resized_embeddings():
    """Resized after ``apply_iqlearn``: the last layer is looked up in each forward."""
    for tie in (False, True):
        model = llama(tie_word_embeddings=tie)
        plain = copy.deepcopy(model)
        fused_model = apply_iqlearn(model, fused_linear=True, **OPTIONS).train()
        for one in (fused_model, plain):
            torch.manual_seed(0)
            one.resize_token_embeddings(VOCAB + 7)
        batch = collate(examples(plain))
        gradients = reference_gradients(plain, [batch])
        outputs = fused_model(**batch)
        outputs.loss.backward()
        assert outputs.logits is None
        for name, parameter in fused_model.named_parameters():
            close_loss(parameter.grad, gradients[name], rtol=1e-4)
