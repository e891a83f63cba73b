"""Packed and padded batches, and what a model does as before."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from irl_ops.integrations.batches import segment_ids
from irl_ops.integrations.transformers import (
    apply_iqlearn,
)
from irl_ops.integrations.transformers.loss import BATCH_OPTIONS

from .tiny_transformers import (
    DECODERS,
    OPTIONS,
    TOKENS,
    VOCAB,
    close_loss,
    collate,
    every_model,
    examples,
    llama,
    naive_loss,
    naive_sum,
    parameters,
    t5,
    train,
)


def packed_batch():
    """Four documents in one row, one of a single token, their first labels not masked."""
    documents = [torch.randint(3, VOCAB, (n,)) for n in (6, 4, 1, 7)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    ends = torch.tensor([0, 6, 10, 11, 18], dtype=torch.int32)
    segments = torch.tensor([0] * 6 + [1] * 4 + [2] + [3] * 7)[None]
    return documents, {"input_ids": ids, "labels": ids, "position_ids": positions}, ends, segments


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
def test_packed_positions_are_separate_documents(build):
    model = build()
    documents, batch, _, _ = packed_batch()
    separate = [{"input_ids": d[None], "labels": d[None]} for d in documents]
    expected = naive_loss(copy.deepcopy(model).double(), separate)
    # with a cache, Transformers does not read positions as packing, and documents see each other
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch, use_cache=False).loss, expected)


@pytest.mark.parametrize("mark", ["seq_idx", "cu_seq_lens_q"])
def test_other_marks_of_packing(mark):
    """Given alone, so that the attention is not block-diagonal: the logits are the model's own."""
    model = llama()
    _, batch, ends, segments = packed_batch()
    del batch["position_ids"]
    marks = {"seq_idx": segments.int(), "cu_seq_lens_q": ends}
    logits = model(batch["input_ids"]).logits
    total, count = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    loss = apply_iqlearn(model, **OPTIONS)(**batch, **{mark: marks[mark]}).loss
    close_loss(loss, total / count)


def test_positions_are_packing_beside_a_full_mask_too():
    model = llama()
    _, batch, _, segments = packed_batch()
    batch["attention_mask"] = torch.ones_like(segments)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    total, count = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)


@pytest.mark.parametrize("clamp", [0, 1])
def test_left_padding_is_not_packing(clamp):
    model = llama()
    rows = [{"input_ids": row, "labels": row} for row in ([5, 6, 7, 8, 2], [9, 10, 2])]
    batch = collate(rows, left=True)
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, clamp)
    builtin = model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    total, count = naive_sum(model(**inputs).logits, batch["labels"], shift=True)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)
    close_loss(apply_iqlearn(model, lam=0.0)(**batch).loss, builtin)


def test_positions_of_several_axes_are_not_packing():
    model = apply_iqlearn(llama(), **OPTIONS)
    _, batch, _, _ = packed_batch()
    del batch["position_ids"]
    assert segment_ids(batch | {"position_ids": torch.zeros(3, 1, 18)}) is None
    assert model(**batch).loss > 0


class TwiceLlamaForCausalLM(LlamaForCausalLM):
    """As models that predict several tokens ahead: the loss of each head is added."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        again = self.loss_function(outputs.logits, labels, VOCAB)
        outputs.loss = outputs.loss + again
        return outputs


def test_a_second_head_gets_the_same_batch():
    model = TwiceLlamaForCausalLM(llama().config)
    _, batch, _, segments = packed_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = LlamaForCausalLM.forward(model, **inputs).logits
    total, _ = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    loss = apply_iqlearn(model, **OPTIONS)(**batch, num_items_in_batch=7).loss
    close_loss(loss, 2 * total / 7)


def test_shift_labels():
    model = llama()
    batch = collate(examples(model))
    total, count = naive_sum(model(**batch).logits, batch["labels"], shift=True)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    # the unshifted ones only say that a loss is wanted
    loss = apply_iqlearn(model, **OPTIONS)(**batch, shift_labels=shifted).loss
    close_loss(loss, total / count)


@every_model
def test_without_labels_nothing_changes(build):
    model = build().eval()
    batch = collate(examples(model))
    del batch["labels"]
    decode = (
        {} if not model.config.is_encoder_decoder else {"decoder_input_ids": batch["input_ids"]}
    )
    signature = inspect.signature(model.forward)
    logits = model(**batch, **decode).logits
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
    apply_iqlearn(model, **OPTIONS)
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], **decode)
    assert out.loss is None and torch.equal(out.logits, logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), tokens)
    now = inspect.signature(model.forward)
    assert set(now.parameters) - set(signature.parameters) == set(BATCH_OPTIONS)
    kept = [p for name, p in now.parameters.items() if name not in BATCH_OPTIONS]
    assert now.replace(parameters=kept) == signature
    with pytest.raises(TypeError, match="input_ids"):
        model(batch["input_ids"], input_ids=batch["input_ids"])


@every_model
def test_tuples(build):
    model = apply_iqlearn(build(), **OPTIONS)
    batch = collate(examples(model))
    outputs = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    assert list(outputs)[:2] == ["loss", "logits"]


@pytest.mark.parametrize("build", [llama, t5])
def test_save_pretrained(build, tmp_path):
    model = apply_iqlearn(build(), **OPTIONS)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, loaded.get_parameter(name))
    batch = collate(examples(model))
    close_loss(apply_iqlearn(loaded, **OPTIONS)(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("build", [llama, t5])
def test_deepcopy_is_a_model_of_its_own(build):
    model = apply_iqlearn(build(), **OPTIONS)
    batch = collate(examples(model))
    loss = model(**batch).loss
    twin = copy.deepcopy(model)
    apply_iqlearn(twin, lam=0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    expected = naive_loss(copy.deepcopy(twin).double(), [batch], lam=0.0)
    close_loss(twin(**batch).loss, expected)
    assert torch.equal(model(**batch).loss, loss)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@every_model
def test_a_pickled_model_loads_with_its_loss(build, how):
    model = apply_iqlearn(build(), **OPTIONS, eos_token_id=[2])
    batch = collate(examples(model))
    expected = model(**batch).loss
    model.loss_function.reset()
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, saved := io.BytesIO())
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
    assert loaded.forward.model is loaded and loaded.forward.loss is loaded.loss_function
    assert torch.equal(loaded(**batch).loss, expected)
    assert model.loss_function.drain("") == {} != loaded.loss_function.drain("")
    tokens = [m.eval().generate(batch["input_ids"], max_new_tokens=3) for m in (model, loaded)]
    assert torch.equal(*tokens)
    close_loss(apply_iqlearn(loaded, lam=0.0)(**batch).loss, build()(**batch).loss)
    loaded.forward = type(loaded).forward.__get__(loaded)
    if not loaded.config.is_encoder_decoder:
        with pytest.raises(RuntimeError, match="computes a loss of its own"):
            loaded(**batch)


def test_a_model_pickled_in_mixed_precision_asks_for_the_loss_again(tmp_path):
    """Accelerate's wrapper is a closure; what is loaded for it is the forward of the class."""
    model = apply_iqlearn(llama(), **OPTIONS)
    data = examples(model)
    train(model, data, tmp_path, bf16=True, learning_rate=0.0)
    loaded = pickle.loads(pickle.dumps(model))
    batch = collate(data)
    with pytest.raises(RuntimeError, match="computes a loss of its own"):
        loaded(**batch)
    expected = naive_loss(copy.deepcopy(llama()).double(), [batch])
    close_loss(apply_iqlearn(loaded, **OPTIONS)(**batch).loss, expected)


@every_model
def test_a_second_call_replaces_the_options(build):
    model = build()
    batch = collate(examples(model))
    expected = naive_loss(copy.deepcopy(model).double(), [batch], lam=0.3, gamma=1.0)
    assert apply_iqlearn(apply_iqlearn(model, **OPTIONS), lam=0.3) is model
    close_loss(model(**batch).loss, expected)


def test_a_forward_that_computes_its_own_inputs_keeps_them():
    """Whisper alone knows how to shift its labels to the right."""
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        dropout=0.0,
        num_mel_bins=4,
        decoder_start_token_id=1,
        **TOKENS,
    )
    model = WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(2, 4, 16), "labels": torch.randint(3, VOCAB, (2, 6))}
    builtin = model(**batch)
    total, count = naive_sum(builtin.logits, batch["labels"], shift=False)
    close_loss(apply_iqlearn(model, lam=0.0)(**batch).loss, builtin.loss)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)
