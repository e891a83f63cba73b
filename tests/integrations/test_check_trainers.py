"""``check`` on models and on the Trainers of Transformers and TRL: right, and broken on purpose."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from irl_ops.debug import CheckError, check
from irl_ops.debug.callback import CheckCallback
from irl_ops.integrations.transformers import (
    OnlineIQLearnArguments,
    OnlineIQLearnTrainer,
    apply_iqlearn,
    iqlearn_loss_func,
)

from .test_trl import IQLearnTrainer, prompt_data, sft, text_data
from .tiny_transformers import (
    OPTIONS,
    bart,
    collate,
    examples,
    gemma2,
    llama,
    mixtral,
    naive_sum,
    parameters,
    t5,
)


def wrong(report):
    return {row.place for row in report.wrong}


def trainer_of(model, tmp_path, *, kind=Trainer, loss_func=None, collator=collate, **arguments):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return kind(
        model,
        TrainingArguments(**defaults | arguments),
        train_dataset=examples(model, (5, 9, 7, 3, 6, 4, 2, 8)),
        data_collator=collator,
        compute_loss_func=loss_func,
    )


# -------------------------------------------------------------------------------------------------
# Models
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_value_head_is_right(fused):
    model = apply_iqlearn(llama(), value_head=True, fused_linear=fused, **OPTIONS).train()
    torch.nn.init.normal_(model.value_head.weight)
    batch = collate(examples(model))
    report = check(model, batch)
    assert report.ok and report.rows[-1].verdict == "right", str(report)
    assert not check(model, batch, gamma=0.5).ok


def test_a_trainer_that_samples_is_refused(tmp_path):
    arguments = OnlineIQLearnArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = OnlineIQLearnTrainer(llama(), arguments, train_dataset=examples(llama()))
    with pytest.raises(TypeError, match="OnlineIQLearnTrainer, which samples"):
        check(trainer)


def test_all_processes_stop_where_one_is_wrong(tmp_path, monkeypatch):
    trainer = trainer_of(apply_iqlearn(llama(), **OPTIONS), tmp_path)
    CheckCallback().attach(trainer)
    right = types.SimpleNamespace(ok=True, raise_if_wrong=lambda: None)
    monkeypatch.setattr("irl_ops.debug.callback.check", lambda *_, **__: right)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda oks: [*oks, False])
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(CheckError, match="right on process 0, and wrong on process 1"):
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build", [llama, gemma2, t5, bart])
def test_a_model_is_right(build, fused):
    model = apply_iqlearn(build(), fused_linear=fused, **OPTIONS).train()
    report = check(model, collate(examples(model)))
    assert report.ok, str(report)
    assert report.rows[-1].words.startswith("that by the last layer's input"), str(report)


def test_a_model_with_dropout_is_right_and_nothing_is_left_behind():
    model = llama(attention_dropout=0.5)
    model = apply_iqlearn(model, **OPTIONS).train()
    loss = model.loss_function
    batch = collate(examples(model))
    state = torch.random.get_rng_state()
    report = check(model, batch)
    assert report.ok, str(report)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loss._sums
    assert not loss.called
    assert all(p.grad is None for p in model.parameters())


def test_a_packed_model():
    model = apply_iqlearn(llama(), **OPTIONS)
    ids = torch.randint(3, 41, (1, 24))
    ids[0, [9, 16]] = 2
    positions = torch.cat([torch.arange(10), torch.arange(7), torch.arange(7)])[None]
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
    for more in ({}, {"use_cache": False}):  # the attention differs, and the loss need not
        report = check(model, batch | more)
        assert report.ok, str(report)
        assert {row.place: row.verdict for row in report.rows}["neighbour"] == "right"
    del batch["position_ids"]
    report = check(model, batch, documents=(positions == 0).cumsum(-1))
    assert wrong(report) == {"neighbour"}, str(report)


def test_peft():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    report = check(apply_iqlearn(model, **OPTIONS), collate(examples(llama())))
    assert report.ok, str(report)
    assert report.rows[-1].verdict == "right"


def test_a_model_whose_loss_is_something_else():
    report = check(llama(), collate(examples(llama())), **OPTIONS)
    assert wrong(report) == {"terms"}, str(report)
    assert "no TD term" in report.wrong[0].words


def test_a_mixture_counts_its_routers():
    """What is added to the loss is not explained, and not hidden either."""
    model = apply_iqlearn(mixtral(), **OPTIONS)
    assert wrong(check(model, collate(examples(model)))) == {"unknown"}
    assert check(model, collate(examples(model)) | {"output_router_logits": False}).ok


# -------------------------------------------------------------------------------------------------
# Trainers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_trainer_is_right(fused, tmp_path):
    model = apply_iqlearn(llama(), fused_linear=fused, **OPTIONS)
    report = check(trainer_of(model, tmp_path))
    assert report.ok, str(report)
    verdicts = {row.place: row.verdict for row in report.rows}
    assert verdicts["accumulation"] == verdicts["gradient"] == "right", str(report)


def test_a_trainer_with_a_loss_function(tmp_path):
    func = iqlearn_loss_func(**OPTIONS)
    assert check(trainer_of(llama(), tmp_path, loss_func=func)).ok
    assert not func._sums
    coded = iqlearn_loss_func(shift=True, **OPTIONS)
    model = llama()
    batch = collate(examples(model))
    assert check(trainer_of(model, tmp_path, loss_func=coded), batch).ok


def ours(outputs, labels, count, **options):
    """A loss of the user's own; all it lacks is what it is divided by."""
    total, own = naive_sum(outputs.logits, labels, shift=True, **options)
    return total / (own if count is None else count)


def mean_of_the_batch(outputs, labels, num_items_in_batch=None):
    return ours(outputs, labels, None)


def mean_over_steps(outputs, labels, num_items_in_batch=None):
    return ours(outputs, labels, None) / 3


def shifted_twice(outputs, labels, num_items_in_batch=None):
    moved = F.pad(labels[:, 1:], (0, 1), value=-100)
    return ours(outputs, moved, num_items_in_batch)


def likelihood(outputs, labels, num_items_in_batch=None):
    return ours(outputs, labels, num_items_in_batch, lam=0.0)


def narrow(outputs, labels, num_items_in_batch=None):
    outputs.logits = outputs.logits.bfloat16()
    return ours(outputs, labels, num_items_in_batch)


BROKEN = {
    "mean of each batch": (mean_of_the_batch, "accumulation"),
    "mean of means": (mean_over_steps, "accumulation"),
    "shifted twice": (shifted_twice, "shift"),
    "likelihood": (likelihood, "terms"),
    "bfloat16": (narrow, "dtype"),
}


@pytest.mark.parametrize(("func", "place"), BROKEN.values(), ids=BROKEN)
def test_a_broken_trainer_is_named(func, place, tmp_path):
    report = check(trainer_of(llama(), tmp_path, loss_func=func), **OPTIONS)
    assert wrong(report) == {place}, str(report)


class TwiceScaled(Trainer):
    """Divides by the steps what num_items has divided already."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


def test_a_trainer_that_scales_twice(tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    report = check(trainer_of(model, tmp_path, kind=TwiceScaled))
    assert wrong(report) == {"accumulation"}, str(report)
    assert "divided by the number of micro-batches (3) once too often" in report.wrong[0].words


@pytest.mark.parametrize("arguments", [{}, {"packing": True, "max_length": 24}])
def test_trl(arguments, tmp_path):
    rows = (text_data if arguments else prompt_data)()[0]
    plain = sft(llama(), rows, tmp_path, trainer_class=SFTTrainer, **arguments)
    report = check(plain, **OPTIONS)
    assert wrong(report) == {"terms"}, str(report)
    trainer = sft(apply_iqlearn(llama(), **OPTIONS), rows, tmp_path, **arguments)
    assert isinstance(trainer, IQLearnTrainer)
    report = check(trainer)
    assert report.ok, str(report)
    assert not trainer._metrics["train"]


def test_the_callback_lets_a_right_run_be_as_it_is(tmp_path):
    models, logs = [], []
    for watched in (False, True):
        model = apply_iqlearn(llama(attention_dropout=0.2), **OPTIONS)
        trainer = trainer_of(model, tmp_path)
        callback = CheckCallback()
        if watched:
            callback.attach(trainer)
        trainer.train()
        models.append(parameters(model))
        logs.append(
            [{k: x for k, x in log.items() if "loss" in k} for log in trainer.state.log_history]
        )
        assert (callback.report is not None) is watched
    assert callback.report.ok
    torch.testing.assert_close(*models, rtol=0, atol=0)
    assert logs[0] == logs[1]


def test_the_callback_stops_a_wrong_run_before_its_first_step(tmp_path, capsys):
    model = llama()
    before = copy.deepcopy(parameters(model))
    trainer = trainer_of(model, tmp_path, loss_func=mean_of_the_batch)
    CheckCallback(**OPTIONS).attach(trainer)
    with pytest.raises(CheckError, match="divided by its own number of labels"):
        trainer.train()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    trainer = trainer_of(model, tmp_path, loss_func=mean_of_the_batch)
    callback = CheckCallback(stop=False, **OPTIONS)
    callback.attach(trainer)
    trainer.train()
    assert "divided by its own number of labels" in capsys.readouterr().out


def test_the_callback_needs_its_trainer(tmp_path):
    trainer = trainer_of(llama(), tmp_path, loss_func=mean_of_the_batch)
    trainer.add_callback(CheckCallback())
    with pytest.raises(RuntimeError, match=r"accepted: CheckCallback\(...\).attach\(trainer\)"):
        trainer.train()


def test_what_is_refused(tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    with pytest.raises(ValueError, match="accepted for a module: a mapping that has 'labels'"):
        check(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="a batch of the Trainer has no labels"):
        check(trainer_of(model, tmp_path), {"input_ids": torch.ones(1, 4, dtype=torch.long)})
