"""What would be silently wrong raises, and names the argument."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import (
    BartForCausalLM,
    LlamaForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    TrainerCallback,
)

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    LamScheduleCallback,
    apply_iqlearn,
    iqlearn_loss_func,
)
from irl_ops.schedules import warmup_ramp

from .tiny_transformers import (
    OPTIONS,
    T5_SIZES,
    TOKENS,
    VOCAB,
    bart,
    collate,
    examples,
    llama,
    mixtral,
    parameters,
    t5,
    train,
)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            NotImplementedError,
            r"fused_linear=True comes with irl_ops 0\.3\.0",
            {"fused_linear": True},
        ),
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


@pytest.mark.parametrize("steps", [0, 1])
def test_a_loss_that_is_not_called_stops_the_training(steps, tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    data = examples(model)
    saved = []

    class Replace(TrainerCallback):
        """Puts another forward and loss in place, as Liger and TRL do."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == steps:
                model.forward = type(model).forward.__get__(model)
                del model._loss_function
                saved.append(parameters(model))

    with pytest.raises(RuntimeError, match="IQLearn was not called in this step"):
        train(model, data, tmp_path, callbacks=[IQLearnCallback(), Replace()], max_steps=3)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, saved[0][name])


def test_the_callback_needs_a_loss(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="no IQLearn loss: call apply_iqlearn"):
        train(model, examples(model), tmp_path, callbacks=[IQLearnCallback()])
    with pytest.raises(TypeError, match="accepted: None or an iqlearn_loss_func"):
        IQLearnCallback(print)
    with pytest.raises(TypeError, match=r"lam=0\.1; accepted: the 0-d floating tensor"):
        LamScheduleCallback(0.1, warmup_ramp)


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
    for name in ("cp_size", "sp_size"):
        arguments.parallelism_config = ParallelismConfig()
        setattr(arguments.parallelism_config, name, 2)  # what the constructor takes needs ranks
        with pytest.raises(ValueError, match=f"parallelism_config.{name}=2 splits sequences"):
            callback.on_train_begin(arguments, None, None, model=model)


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
