"""apply_iqlearn(value_head=True) against float64 loops; saved, loaded, and with PEFT."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers")

from irl_ops.integrations.transformers import apply_iqlearn

from .. import naive
from .tiny_transformers import OPTIONS, close_loss, collate, examples, gpt2, llama, t5, train


def with_head(build, **options):
    model = apply_iqlearn(build(), value_head=True, **OPTIONS, **options)
    nn.init.normal_(model.value_head.weight)
    return model


def reference(model, batch):
    """The naive loss of a model's logits, and of its head on what the last layer is given."""
    exact, seen = copy.deepcopy(model).double(), []
    exact.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    inputs, shift = dict(batch), not model.config.is_encoder_decoder
    labels = inputs.pop("labels")
    if not shift:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = exact(**inputs).logits
    values = exact.value_head(seen[0])[..., 0]
    options = {**OPTIONS, "shift": shift, "values": values}
    loss, _ = naive.loss("iqlearn_loss", logits, labels, **options)
    loss.backward()
    return loss, exact


@pytest.mark.parametrize("build", [llama, gpt2, t5])
@pytest.mark.parametrize("fused_linear", [False, True])
def test_the_loss_takes_its_values(build, fused_linear):
    model = with_head(build, fused_linear=fused_linear)
    model.train()
    batch = collate(examples(model))
    loss = model(**batch).loss
    loss.backward()
    expected, exact = reference(model, batch)
    close_loss(loss, expected)
    for name, parameter in exact.named_parameters():
        found = model.get_parameter(name).grad
        # sums over some 30 rows of terms of size 1, in float32
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-3, atol=1e-5)
    # given values take its place
    zeros = torch.zeros(batch["labels"].shape)
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    close_loss(model(**batch, values=zeros).loss, model(**batch).loss)


def test_a_trainer_trains_it_and_its_checkpoint_has_it(tmp_path):
    model = apply_iqlearn(llama(), value_head=True, **OPTIONS)
    assert not model.value_head.weight.any()
    trainer = train(model, examples(model), tmp_path, save_strategy="steps", save_steps=1)
    assert model.value_head.weight.any()
    again = type(model).from_pretrained(tmp_path / "checkpoint-1")
    apply_iqlearn(again, value_head=True, **OPTIONS)
    assert torch.equal(again.value_head.weight, model.value_head.weight)
    batch = collate(examples(model))
    close_loss(again(**batch).loss, trainer.model(**batch).loss)
    assert not torch.equal(again.value_head.weight, torch.zeros(1, 16))


def test_shards_are_searched_and_a_lost_head_is_named(tmp_path):
    model = with_head(llama)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "shards")
    apply_iqlearn(again, value_head=True)
    assert torch.equal(again.value_head.weight, model.value_head.weight)
    plain = type(model).from_pretrained(tmp_path / "shards")
    plain.save_pretrained(tmp_path / "lost")
    lost = type(model).from_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="has no value_head"):
        apply_iqlearn(lost, value_head=True)
    lost.config.iqlearn_value_head = False
    assert not apply_iqlearn(lost, value_head=True).value_head.weight.any()


def test_peft_trains_and_saves_it(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["value_head"])
    model = peft.get_peft_model(apply_iqlearn(llama(), value_head=True, **OPTIONS), config)
    data = examples(llama())
    train(model, data, tmp_path)
    trained = model.get_base_model().value_head.weight
    assert trained.any()
    model.save_pretrained(tmp_path / "adapter")
    base = apply_iqlearn(llama(), value_head=True, **OPTIONS)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again.get_base_model().value_head.weight, trained)
    close_loss(again(**collate(data)).loss, model(**collate(data)).loss)
    without = peft.LoraConfig(r=2, target_modules=["q_proj"])
    frozen = peft.get_peft_model(apply_iqlearn(llama(), value_head=True, **OPTIONS), without)
    with pytest.raises(ValueError, match="value_head is frozen"):
        frozen.train()(**collate(data))
    with pytest.raises(ValueError, match="value_head=True after PEFT"):
        apply_iqlearn(peft.get_peft_model(llama(), without), value_head=True)
