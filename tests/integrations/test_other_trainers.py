"""Trainers built on Transformers' that are not installed here: their calls, and a Trainer's step.

What is repeated of each is named where it stands. References: float64 autograd on the separate
documents.
"""

import copy
import sys
import types

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast

from irl_ops.integrations import axolotl, llamafactory, swift
from irl_ops.integrations.batches import check_alignment, segment_ids
from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn, iqlearn_loss_func

from .tiny_transformers import (
    OPTIONS,
    VOCAB,
    assert_one_step,
    close_loss,
    collate,
    examples,
    llama,
    naive_loss,
    naive_sum,
    parameters,
    reference_gradients,
    train,
)

LENGTHS = (5, 9, 3, 7, 4, 8, 2, 6)


def flat(rows):
    """Documents one after the other in one row, with their ids 1..n and their positions."""
    batch = {
        "input_ids": [x for row in rows for x in row["input_ids"]],
        "labels": [x for row in rows for x in row["labels"]],
        "position_ids": [x for row in rows for x in range(len(row["input_ids"]))],
        "attention_mask": [i + 1 for i, row in enumerate(rows) for _ in row["input_ids"]],
    }
    return {name: torch.tensor([x]) for name, x in batch.items()}


def blocks(mask):
    """LLaMA-Factory's ``prepare_4d_attention_mask``: 0 within a document, the least number else."""
    same = (mask[:, None, None] == mask[:, None, :, None]) & (mask != 0)[:, None, None]
    seen = same & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


# -------------------------------------------------------------------------------------------------
# Where documents start
# -------------------------------------------------------------------------------------------------


def test_ids_in_the_mask_part_documents():
    labels = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.tensor([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 0, 0]])
    expected = [[0, 0, 1, 1, 2, 3], [0] * 6]
    assert segment_ids({"labels": labels, "attention_mask": mask}).tolist() == expected
    four = blocks(mask)
    for given in (four, four == 0):
        segments = segment_ids({"labels": labels, "attention_mask": given})
        assert segments[0, :5].tolist() == expected[0][:5]
        assert segments[1, :4].tolist() == [0] * 4
    squashed = torch.arange(6)[None].expand(2, -1)  # Axolotl's squash_position_ids
    both = {"labels": labels, "attention_mask": mask, "position_ids": squashed}
    assert segment_ids(both).tolist() == expected
    longer = torch.ones(2, 9, dtype=torch.long)  # a prefix before the tokens
    assert segment_ids({"labels": labels, "attention_mask": longer}) is None
    assert segment_ids({"labels": labels}) is None


def test_alignment_of_labels():
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 9, 9]])
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    masked = torch.where(torch.arange(4) < 2, -100, shifted)
    for labels in (shifted, masked):
        check_alignment(ids, labels, shift=False)
        with pytest.raises(ValueError, match="would be shifted a second time; accepted: labels"):
            check_alignment(ids, labels, shift=True)
    check_alignment(ids, ids, shift=True)
    with pytest.raises(ValueError, match="each row would predict its own token; accepted: labels"):
        check_alignment(ids, ids, shift=False)
    for shift in (False, True):  # neither, or both, or nothing
        for labels in (ids + 1, torch.full_like(ids, -100)):
            check_alignment(ids, labels, shift=shift)
        check_alignment(torch.full_like(ids, 3), torch.full_like(ids, 3), shift=shift)


# -------------------------------------------------------------------------------------------------
# LLaMA-Factory 0.9.5: run_exp(callbacks=[...]), Trainer(..., callbacks=callbacks)
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["none", "neat", "plain"])
def test_llamafactory(packing, tmp_path):
    model = llama()
    data = examples(model, LENGTHS)
    gradients = reference_gradients(model, [collate([row]) for row in data])
    before = parameters(model)

    def neat(rows):
        batch = flat(rows)
        return batch | {"attention_mask": blocks(batch["attention_mask"])}

    def plain(rows):
        batch = flat(rows)
        return {k: v for k, v in batch.items() if k != "attention_mask"}

    trainer = train(
        model,
        data,
        tmp_path,
        callbacks=[llamafactory.IQLearn(**OPTIONS)],
        collator={"none": collate, "neat": neat, "plain": plain}[packing],
        gradient_accumulation_steps=4,
        num_train_epochs=1,
    )
    assert trainer.state.global_step == 1
    assert_one_step(model, before, gradients)
    assert {"nll", "td"} <= set(trainer.state.log_history[0])


class Narrow(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_is_not_told_the_number_of_labels_is_refused(tmp_path):
    model = Narrow(llama().config)
    with pytest.raises(RuntimeError, match="takes no num_items_in_batch"):
        train(model, [], tmp_path, callbacks=[llamafactory.IQLearn(**OPTIONS)])


def test_a_loss_of_llamafactory_beside_it_is_noticed(tmp_path):
    """``use_dft_loss`` and the like set ``compute_loss_func`` after the Trainer is made."""

    class CustomSeq2SeqTrainer(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss

    model = llama()
    with pytest.raises(RuntimeError, match="withheld the labels"):
        train(
            model,
            examples(model),
            tmp_path,
            callbacks=[llamafactory.IQLearn(**OPTIONS)],
            trainer_class=CustomSeq2SeqTrainer,
        )


# -------------------------------------------------------------------------------------------------
# Axolotl 0.19: load_plugin, get_input_args, post_model_load, add_callbacks_post_trainer
# -------------------------------------------------------------------------------------------------


def plugin():
    name = "irl_ops.integrations.axolotl.IQLearnPlugin"
    module, _, kind = name.rpartition(".")
    return getattr(sys.modules[module], kind)()


@pytest.mark.parametrize("packing", [False, True])
def test_axolotl(packing, tmp_path):
    ours, model = plugin(), llama()
    data = examples(model, LENGTHS)
    gradients = reference_gradients(model, [collate([row]) for row in data])
    before = parameters(model)
    module, _, kind = ours.get_input_args().rpartition(".")
    cfg = getattr(sys.modules[module], kind)(iqlearn=OPTIONS).model_dump()
    ours.post_model_load(cfg, model)

    def collator(rows):
        if not packing:
            return collate(rows)
        batch = flat(rows)
        del batch["attention_mask"]  # as with drop_attention_mask; the positions are left
        return batch

    trainer = train(model, data, tmp_path, collator=collator, gradient_accumulation_steps=4)
    for callback in ours.add_callbacks_post_trainer(cfg, trainer):
        assert isinstance(callback, IQLearnCallback) and isinstance(callback, TrainerCallback)
    assert_one_step(model, before, gradients)


def test_axolotl_ids_in_the_mask():
    """The loss of the logits as they come: the attention that reads such ids is Axolotl's."""
    model = llama()
    batch = flat(examples(model, LENGTHS[:3]))
    batch["position_ids"] = torch.arange(batch["labels"].shape[1])[None]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    segments = batch["attention_mask"]
    total, count = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    plugin().post_model_load({"iqlearn": OPTIONS}, model)
    close_loss(model(**batch).loss, total / count)


def test_axolotl_refuses_other_losses_and_a_missing_key():
    with pytest.raises(ValueError, match="iqlearn: is missing from the configuration"):
        plugin().post_model_load({}, llama())
    for name in ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "use_eaft"):
        with pytest.raises(ValueError, match=f"{name}: True beside iqlearn"):
            plugin().post_model_load({"iqlearn": {}, name: True}, llama())
    with pytest.raises(TypeError, match="no option 'lamda'"):
        plugin().post_model_load({"iqlearn": {"lamda": 1}}, llama())
    assert issubclass(axolotl.IQLearnPlugin, axolotl.BasePlugin)


# -------------------------------------------------------------------------------------------------
# ms-swift 4.6: loss_map[loss_type](args, trainer), called by Seq2SeqTrainer.compute_loss
# -------------------------------------------------------------------------------------------------


class SwiftTrainer(Trainer):
    """The part of swift/trainers/seq2seq_trainer.py that a loss of ``loss_map`` goes through."""

    def __init__(self, model, args, compute_loss_func=None, **kwargs):
        super().__init__(model, args, **kwargs)
        self.template = types.SimpleNamespace(sequence_parallel_size=1, padding_free=True)
        args.use_logits_to_keep, args.enable_dft_loss = None, False
        self.compute_loss_func = sys.modules["swift.loss"].loss_map["iqlearn"](args, self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss_scale = inputs.pop("loss_scale", None)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        outputs.loss = None
        if loss_scale is not None:
            loss_scale = torch.roll(loss_scale, shifts=-1, dims=-1).view(-1)
        loss = self.compute_loss_func(
            outputs,
            labels,
            num_items_in_batch=num_items_in_batch,
            loss_scale=loss_scale,
            trainer=self,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss *= self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


@pytest.fixture
def loss_map(monkeypatch):
    module = types.ModuleType("swift.loss")
    module.loss_map = {}
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.loss", module)
    return module.loss_map


@pytest.mark.parametrize("packing", [False, True])
def test_swift(packing, loss_map, tmp_path):
    swift.register(**OPTIONS)
    model = llama()
    data = examples(model, LENGTHS)
    gradients = reference_gradients(model, [collate([row]) for row in data])
    before = parameters(model)

    def collator(rows):
        if not packing:
            return collate(rows)
        batch = flat(rows)
        del batch["attention_mask"]
        return batch

    trainer = train(
        model,
        data,
        tmp_path,
        trainer_class=SwiftTrainer,
        collator=collator,
        gradient_accumulation_steps=4,
    )
    assert trainer.args.use_logits_to_keep is False
    assert_one_step(model, before, gradients)


def test_swift_weighs_tokens(loss_map):
    swift.register(**OPTIONS)
    args = types.SimpleNamespace()
    trainer = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=1))
    loss = loss_map["iqlearn"](args, trainer)
    model = llama()
    batch = collate(examples(model))
    labels = batch["labels"]
    torch.manual_seed(0)
    scale = torch.rand(labels.shape)  # entry t is the weight of token t
    outputs = CausalLMOutputWithPast(logits=model(**batch).logits)
    found = loss(
        outputs, labels, num_items_in_batch=torch.tensor(7), loss_scale=scale.roll(-1, -1).view(-1)
    )
    q = outputs.logits.double()
    total = 0
    for b, t in ((labels[:, 1:] != -100).nonzero() + torch.tensor([0, 1])).tolist():
        row, nxt = q[b, t - 1], t + 1 < labels.shape[1] and labels[b, t + 1] != -100
        v_next = q[b, t].logsumexp(-1) if nxt else 0.0
        residual = row[labels[b, t]] - OPTIONS["gamma"] * v_next
        term = row.logsumexp(-1) - row[labels[b, t]] + OPTIONS["lam"] * residual**2
        total = total + scale[b, t].double() * term
    close_loss(found, total / 7)


def test_swift_refuses_what_moves_rows(loss_map):
    swift.register(**OPTIONS)
    trainer = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=2))
    make = loss_map["iqlearn"]
    for name, value in (
        ("use_logits_to_keep", True),
        ("enable_dft_loss", True),
        ("label_smoothing_factor", 0.1),
    ):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            make(types.SimpleNamespace(**{name: value}), trainer)
    labels = torch.zeros(1, 5, dtype=torch.long)
    outputs = CausalLMOutputWithPast(logits=torch.zeros(1, 3, VOCAB))
    loss = make(types.SimpleNamespace(), trainer)
    with pytest.raises(ValueError, match="sequence_parallel_size=2"):
        loss(outputs, labels)
    trainer.template.sequence_parallel_size = 1
    with pytest.raises(ValueError, match=r"logits=\[1, 3, 41\] with labels \[1, 5\]; accepted: a"):
        loss(outputs, labels)
    with pytest.raises(ValueError, match="of a Megatron trainer"):
        make(types.SimpleNamespace(), type("BaseMegatronTrainer", (), {})())
    with pytest.raises(TypeError, match="register has no option 'lamda'"):
        swift.register(lamda=1)


# -------------------------------------------------------------------------------------------------
# Unsloth 2026.10: its forward computes the loss itself where it sees labels
# -------------------------------------------------------------------------------------------------


class Empty:
    """Stands for logits that were never made, as ``EMPTY_LOGITS``."""


class UnslothLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if labels is None:
            return outputs
        loss = F.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=Empty())


def test_unsloth_with_labels_withheld(tmp_path):
    """``compute_loss_func``: the Trainer takes the labels out of the batch, and logits are made."""
    torch.manual_seed(0)
    model = UnslothLlama(llama().config)
    data = examples(model, LENGTHS)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    gradients = reference_gradients(plain, [collate([row]) for row in data])
    before = parameters(model)
    func = iqlearn_loss_func(**OPTIONS)
    train(
        model,
        data,
        tmp_path,
        loss_func=func,
        callbacks=[IQLearnCallback(func)],
        gradient_accumulation_steps=4,
    )
    assert_one_step(model, before, gradients)


def test_unsloth_with_labels_is_noticed():
    model = UnslothLlama(llama().config)
    batch = collate(examples(model))
    outputs = model(**batch)
    with pytest.raises(ValueError, match="without logits; accepted: a ModelOutput with them, whi"):
        iqlearn_loss_func(**OPTIONS)(outputs, batch["labels"])
    with pytest.raises(RuntimeError, match="computes a loss of its own"):
        apply_iqlearn(model, **OPTIONS)(**batch)


# -------------------------------------------------------------------------------------------------
# Labels that are shifted already, in Transformers
# -------------------------------------------------------------------------------------------------


def test_shifted_labels_are_refused_at_the_first_step():
    model = llama()
    batch = collate(examples(model))
    expected = naive_loss(copy.deepcopy(model).double(), [batch])
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    applied = apply_iqlearn(model, **OPTIONS)
    with pytest.raises(ValueError, match="the labels are shifted already, and would be"):
        applied(**batch | {"labels": shifted})
    close_loss(applied(**batch).loss, expected)
    given = batch | {"shift_labels": shifted}
    close_loss(applied(**given).loss, expected)
