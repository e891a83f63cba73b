"""What the loss takes from a batch, as keys of a forward and as columns of a data set."""

import copy
import inspect
from typing import get_args, get_type_hints

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    apply_iqlearn,
    iqlearn_loss_func,
)
from irl_ops.integrations.transformers.loss import BATCH_OPTIONS, IQLearnOptions
from irl_ops.integrations.transformers.loss import OPTIONS as RUN_OPTIONS
from irl_ops.options import IQLearnOptions as LossOptions
from irl_ops.torch import iqlearn_loss

from .. import naive
from .tiny_transformers import (
    GAMMA,
    LAM,
    OPTIONS,
    assert_one_step,
    close_loss,
    collate,
    every_model,
    examples,
    llama,
    parameters,
)


def keys_of(labels):
    """A value for every key, in the labels' shape; ``truncated`` for sequences."""
    torch.manual_seed(1)
    width = labels.shape[1]
    return {
        "segment_ids": (torch.arange(width) >= width // 2).long().expand(labels.shape),
        "token_weights": torch.rand(labels.shape) + 0.5,
        "truncated": torch.arange(len(labels)) % 2 == 0,
        "where": torch.rand(labels.shape) > 0.3,
        "values": torch.randn(labels.shape),
    }


def reference(model, batch, keys, num_items=None):
    """The naive loss in float64 by the untouched model's logits."""
    shift = not model.config.is_encoder_decoder
    model = copy.deepcopy(model).double()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not shift:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    logits = model(**inputs).logits
    options = {"shift": shift, "lam": LAM, "gamma": GAMMA, "num_items": num_items} | keys
    return naive.loss("iqlearn_loss", logits, batch["labels"], **options)[0], model


@every_model
@pytest.mark.parametrize(
    "name", ["segment_ids", "token_weights", "truncated", "where", "values", "all"]
)
def test_the_loss_gets_its_keys(build, name):
    model = build()
    batch = collate(examples(model))
    keys = keys_of(batch["labels"])
    given = keys if name == "all" else {name: keys[name]}
    plain, _ = reference(model, batch, {})
    expected, _ = reference(model, batch, given)
    assert abs(plain - expected) > 1e-3 * abs(plain)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch, **given).loss, expected)


def test_given_segments_come_before_what_marks_a_packed_batch():
    model = llama()
    ids = torch.randint(3, 41, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    expected, _ = reference(model, batch, {"segment_ids": segments})
    model = apply_iqlearn(model, **OPTIONS)
    close_loss(model(**batch, segment_ids=segments).loss, expected)


def test_columns_reach_the_loss_through_the_trainer(tmp_path):
    model = llama()
    rows = collate(examples(model))
    keys = keys_of(rows["labels"])
    keys.pop("values")  # of a value head, which no data set has
    data = [
        {name: value[i].tolist() for name, value in (rows | keys).items()}
        | {"comment": "a column that nobody takes"}
        for i in range(4)
    ]
    count = (rows["labels"][:, 1:] != -100).sum().item()
    expected, twin = reference(model, rows, keys, num_items=count)
    expected.backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    before = parameters(model)
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(apply_iqlearn(model, **OPTIONS), arguments, train_dataset=data)
    IQLearnCallback().attach(trainer)
    trainer.train()
    assert_one_step(model, before, gradients)


@every_model
@pytest.mark.parametrize("name", ["token_weight", "next_values", "reduction", "comment"])
def test_other_keys_are_refused(build, name):
    model = apply_iqlearn(build(), **OPTIONS)
    batch = collate(examples(model))
    with pytest.raises(TypeError, match=f"takes no '{name}'; accepted: .* segment_ids, token_we"):
        model(**batch, **{name: torch.ones(batch["labels"].shape)})


def test_what_transformers_knows_is_not_refused():
    model = llama()
    batch = collate(examples(model))
    expected, _ = reference(model, batch, {})
    known = {"output_hidden_states": True, "use_cache": False, "max_length_q": 9, "where": None}
    outputs = apply_iqlearn(model, **OPTIONS)(**batch, **known)
    close_loss(outputs.loss, expected)
    assert len(outputs.hidden_states) == 2


def test_weights_of_another_shape_are_refused():
    model = apply_iqlearn(llama(), **OPTIONS)
    batch = collate(examples(model))
    with pytest.raises(ValueError, match="token_weights"):
        model(**batch, token_weights=F.pad(torch.ones(batch["labels"].shape), (0, 1)))


@pytest.mark.parametrize("function", [apply_iqlearn, iqlearn_loss_func])
def test_editors_and_mypy_see_the_options_of_the_loss(function):
    """Unpack[TypedDict], with the types that iqlearn_loss has; nothing of a batch among them."""
    (unpacked,) = (
        parameter.annotation
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is inspect.Parameter.VAR_KEYWORD
    )
    assert get_args(unpacked) == (IQLearnOptions,)
    of_loss, options = get_type_hints(LossOptions), get_type_hints(IQLearnOptions)
    assert {"lam", "gamma", "entropy_coef", "eos_token_id", "boundary", "backend"} <= set(
        RUN_OPTIONS
    )
    for name in RUN_OPTIONS:  # there the arrays are those of any framework
        ours, of_any = (
            {str(part) for part in get_args(hint) or (hint,)}
            for hint in (options[name], of_loss[name])
        )
        assert ours == {x.replace("~Array", str(torch.Tensor)) for x in of_any}, name
    accepted = set(inspect.signature(iqlearn_loss).parameters) & set(options)
    assert accepted == set(RUN_OPTIONS) and not accepted & set(BATCH_OPTIONS)
