"""What would be silently wrong raises, and names the argument."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import (
    BartForCausalLM,
    LlamaForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import irl_ops.torch as irl
from irl_ops.integrations.transformers import (
    IQLearnCallback,
    LamScheduleCallback,
    apply_iqlearn,
    context,
    iqlearn_loss_func,
)
from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.schedules import warmup_ramp

from .tiny_transformers import (
    OPTIONS,
    T5_SIZES,
    TOKENS,
    VOCAB,
    bart,
    close_loss,
    collate,
    examples,
    llama,
    mixtral,
    naive_loss,
    parameters,
    t5,
    train,
)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "no option 'lamda'; accepted: lam gamma", {"lamda": 0.1}),
        (TypeError, "no option 'shift'", {"shift": False}),
        (ValueError, "lam", {"lam": -1.0}),
        (ValueError, "boundary", {"boundary": "nowhere"}),
    ],
)
def test_bad_options_are_named_at_once(error, message, options):
    model = llama()
    with pytest.raises(error, match=message):
        apply_iqlearn(model, **options)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "model=Linear; accepted: a Transformers", lambda: torch.nn.Linear(2, 2)),
        (ValueError, "DataParallel", lambda: torch.nn.DataParallel(llama())),
        (
            ValueError,
            "loss_type='ForSequenceClassification'",
            lambda: LlamaForSequenceClassification(llama().config),
        ),
    ],
)
def test_other_models_are_refused(error, message, build):
    with pytest.raises(error, match=message):
        apply_iqlearn(build())


def test_an_inline_loss_is_found():
    """BartForCausalLM computes its cross-entropy itself."""
    model = bart(BartForCausalLM)
    model.config.is_encoder_decoder = False
    apply_iqlearn(model)
    ids = torch.randint(3, VOCAB, (1, 5))
    with pytest.raises(RuntimeError, match=r"BartForCausalLM\.forward computes a loss"):
        model(input_ids=ids, labels=ids)


def test_routers_of_an_encoder_decoder_are_refused():
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, num_experts=2, decoder_start_token_id=0, **T5_SIZES, **TOKENS
    )
    model = apply_iqlearn(SwitchTransformersForConditionalGeneration(config))
    ids = torch.randint(3, VOCAB, (1, 5))
    assert model(input_ids=ids, labels=ids).loss > 0
    with pytest.raises(NotImplementedError, match="output_router_logits=True"):
        model(input_ids=ids, labels=ids, output_router_logits=True)


@pytest.mark.parametrize("with_callback", [True, False])
def test_label_smoothing_is_refused(with_callback, tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    callbacks = [IQLearnCallback()] if with_callback else []
    error, message = (
        (ValueError, r"label_smoothing_factor=0\.3")
        if with_callback
        else (RuntimeError, "withheld the labels .* label_smoothing_factor=0")
    )
    with pytest.raises(error, match=message):
        train(model, examples(model), tmp_path, callbacks=callbacks, label_smoothing_factor=0.3)


def own_loss(model, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """As of Liger and TRL: labels come in, and the loss is made of the backbone's hidden states."""
    hidden = model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    return {"loss": ForCausalLMLoss(logits, labels, VOCAB), "logits": logits}


class ReplaceForward(TrainerCallback):
    """Puts another forward in place, once training runs."""

    def __init__(self, steps):
        self.steps = steps
        self.saved = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.steps:
            base = transformers_model(model)
            base.forward = own_loss.__get__(base)
            self.saved.append(parameters(model))


@pytest.mark.parametrize("lora", [False, True, "first"])
@pytest.mark.parametrize("steps", [0, 1])
def test_labels_that_never_reach_the_loss_raise(steps, lora, tmp_path):
    """Without any callback of ours."""
    model, config = llama(), LoraConfig(r=2, target_modules=["q_proj"])
    data = examples(model)
    if lora == "first":
        model = get_peft_model(model, config)
    model = apply_iqlearn(model, **OPTIONS)
    if lora is True:
        model = get_peft_model(model, config)
    replace = ReplaceForward(steps)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\.forward computes a loss of its own"):
        train(model, data, tmp_path, callbacks=[replace], max_steps=3)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, replace.saved[0][name])


@pytest.mark.parametrize("lora", [False, True])
def test_a_replaced_forward_is_noticed_without_training(lora):
    model = apply_iqlearn(llama(), **OPTIONS).eval()
    batch = collate(examples(model))
    expected = naive_loss(copy.deepcopy(llama()).double(), [batch])
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model
    forward = model.forward
    model.forward = own_loss.__get__(model)
    hidden = model.base_model(batch["input_ids"]).last_hidden_state  # nobody's loss
    assert hidden.requires_grad
    if not lora:  # PEFT calls the forward itself; only a backbone that trains then tells
        with pytest.raises(RuntimeError, match="computes a loss of its own"):
            model(**batch)
    model.forward = forward
    close_loss(outer(**batch).loss, expected)


class NoLabels(Trainer):
    """A Trainer with a loss of its own, which the model does not see."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return ForCausalLMLoss(model(**inputs).logits, labels, VOCAB)


def test_a_loss_that_is_not_called_stops_the_training(tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    data, before = examples(model), parameters(model)
    with pytest.raises(RuntimeError, match="IQLearn was not called in this step"):
        train(model, data, tmp_path, callbacks=[IQLearnCallback()], trainer_class=NoLabels)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, before[name])


def test_the_callback_needs_a_loss(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="no IQLearn loss: call apply_iqlearn"):
        train(model, examples(model), tmp_path, callbacks=[IQLearnCallback()])
    with pytest.raises(TypeError, match="accepted: None or an iqlearn_loss_func"):
        IQLearnCallback(print)
    with pytest.raises(TypeError, match=r"lam=0\.1; accepted: the 0-d floating tensor"):
        LamScheduleCallback(0.1, warmup_ramp)


def test_the_schedule_of_another_lam_is_refused(tmp_path):
    lam, other = torch.tensor(0.1), torch.tensor(0.1)
    schedule = partial(warmup_ramp, lam=0.1, warmup_steps=1)
    model = apply_iqlearn(llama(), lam=lam)
    data = examples(model)
    for refused in (model, copy.deepcopy(model)):  # a copy has a lam of its own
        given = other if refused is model else lam
        with pytest.raises(ValueError, match="another tensor than the loss's: not the model's"):
            train(refused, data, tmp_path, callbacks=[LamScheduleCallback(given, schedule)])
    loss_func = iqlearn_loss_func(lam=lam)
    with pytest.raises(ValueError, match=r"no iqlearn_loss_func\(...\) has it"):
        train(
            llama(),
            data,
            tmp_path,
            callbacks=[LamScheduleCallback(other, schedule)],
            loss_func=loss_func,
        )
    callbacks = [LamScheduleCallback(lam, schedule), IQLearnCallback(loss_func)]
    trainer = train(llama(), data, tmp_path, callbacks=callbacks, loss_func=loss_func)
    assert trainer.state.log_history[0]["lam"] == lam == 0.0


def test_the_bare_loss_is_no_loss_func(tmp_path):
    model = llama()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, compute_loss_func=irl.iqlearn_loss)
    with pytest.raises(ValueError, match=r"accepted: iqlearn_loss_func\(\.\.\.\)"):
        IQLearnCallback(iqlearn_loss_func()).attach(trainer)


def test_data_parallel_and_split_sequences_are_refused(monkeypatch):
    model = apply_iqlearn(llama(), **OPTIONS)
    batch = collate(examples(model))
    once = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    assert model(**batch, num_items_in_batch=torch.tensor(7).expand(2, 1)).loss == once

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="DataParallel"):
        model(**batch, num_items_in_batch=torch.ones(1, 1))
    with pytest.raises(ValueError, match="DataParallel"):
        iqlearn_loss_func()(model(**batch), batch["labels"], torch.ones(2, 1))

    callback = IQLearnCallback()
    arguments = SimpleNamespace(label_smoothing_factor=0.0, n_gpu=2)
    with pytest.raises(ValueError, match="DataParallel"):
        callback.on_train_begin(arguments, None, None, model=model)
    arguments.n_gpu = 1
    arguments.parallelism_config = ParallelismConfig()
    callback.on_train_begin(arguments, None, None, model=model)
    arguments.parallelism_config.sp_size = 2  # what the constructor takes needs ranks
    callback.on_train_begin(arguments, None, None, model=model)
    with pytest.raises(ValueError, match="sp_size=2, under which the Trainer calls no"):
        IQLearnCallback(iqlearn_loss_func()).on_train_begin(arguments, None, None, model=model)
    for given, name in (((2, 1), "cp_size"), ((1, 2), "sp_size")):
        with pytest.raises(ValueError, match=f"parallelism_config.{name}=2 splits sequences"):
            context.refuse("GAILTrainer", given)
    monkeypatch.setitem(AcceleratorState._shared_state, context.CONFIG, ParallelismConfig())
    assert context.sizes() == (1, 1)
    monkeypatch.setattr(AcceleratorState._shared_state[context.CONFIG], "cp_size", 2)
    assert context.sizes() == (2, 1)
    assert context.part_of(batch["labels"], training=True) is None  # nothing is cut out there


def test_loss_func_refuses_what_it_would_get_wrong():
    loss_func = iqlearn_loss_func(**OPTIONS)
    model = t5()
    batch = collate(examples(model))
    with pytest.raises(ValueError, match="shift=True with the outputs of an encoder-decoder"):
        loss_func(model(**batch), batch["labels"])
    model = mixtral()
    batch = collate(examples(model))
    with pytest.raises(ValueError, match=r"outputs.aux_loss: a router's loss would be dropped"):
        loss_func(model(**batch), batch["labels"])
    outputs = llama()(**batch)
    with pytest.raises(ValueError, match="labels=None"):
        loss_func(outputs, None)
    with pytest.raises(ValueError, match="outputs=dict without logits"):
        loss_func({"loss": outputs.loss}, batch["labels"])
    with pytest.raises(TypeError, match="iqlearn_loss_func has no option 'lamda'"):
        iqlearn_loss_func(lamda=1)


def test_masked_ends_are_told_once():
    model = apply_iqlearn(llama(pad_token_id=2), **OPTIONS)
    batch = collate(examples(model))
    erased = batch | {"labels": batch["labels"].masked_fill(batch["labels"] == 2, -100)}
    with pytest.warns(UserWarning, match=r"no end token \(\[2\]\), and pad_token_id is one"):
        model(**erased)
    kept = apply_iqlearn(llama(pad_token_id=2), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**erased)  # once
        kept(**batch)
        apply_iqlearn(llama(), **OPTIONS)(**erased)  # another pad token: nothing was erased
