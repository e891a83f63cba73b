"""``IQLearnSFTTrainer`` and its configuration: steps, command lines, YAML files, and refusals.

The references are those of test_trl.py: float64 autograd on the separate documents.
"""

import copy
import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser
from trl import SFTConfig, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn
from irl_ops.integrations.transformers.model import applied_loss
from irl_ops.integrations.trl import IQLearnConfig, IQLearnSFTTrainer
from irl_ops.integrations.trl.__main__ import main

from . import test_trl as trl
from .tiny_transformers import (
    GAMMA,
    LAM,
    OPTIONS,
    assert_one_step,
    close_loss,
    collate,
    examples,
    llama,
    mixtral,
    naive_loss,
    parameters,
    reference_gradients,
)

STEP = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def trainer(model, rows, tmp_path, **arguments):
    names = {"peft_config", "callbacks", "data_collator"}
    given = {name: arguments.pop(name) for name in names & set(arguments)}
    return IQLearnSFTTrainer(
        model,
        IQLearnConfig(str(tmp_path), **STEP | OPTIONS | arguments),
        train_dataset=trl.Dataset.from_list(rows),
        processing_class=trl.tokenizer(),
        **given,
    )


@pytest.mark.parametrize(
    ("mode", "fused_linear"),
    [
        ("text", None),
        ("prompt-completion", None),
        ("packed", None),
        ("packed completions", False),
        ("assistant-only", None),
        ("soft-capped", None),
    ],
)
def test_a_step_is_float64_autograd_of_the_separate_documents(mode, fused_linear, tmp_path):
    build, make, arguments = trl.MODES[mode]
    model = build()
    rows, documents = make()
    gradients = reference_gradients(model, documents)
    expected = naive_loss(copy.deepcopy(model).double(), documents)
    before = parameters(model)
    ours = trainer(model, rows, tmp_path, fused_linear=fused_linear, **arguments)
    ours.train()
    assert ours.state.global_step == 1
    assert ours.current_gradient_accumulation_steps > 1
    assert applied_loss(model).fused_linear is (fused_linear is None)
    assert_one_step(model, before, gradients)
    logged = ours.state.log_history[0]
    close_loss(torch.tensor(logged["loss"]), expected, rtol=1e-4, atol=0)  # rounded for the log
    assert {"nll", "td", "reward", "entropy", "mean_token_accuracy"} <= set(logged)


def test_a_peft_config_and_a_peft_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    rows, documents = trl.prompt_data()
    for given in (False, True):
        model = get_peft_model(llama(), config) if given else llama()
        ours = trainer(model, rows, tmp_path, peft_config=None if given else config)
        plain = get_peft_model(llama(), config)
        plain.load_state_dict(ours.model.state_dict())
        gradients = reference_gradients(plain, documents)
        before = parameters(ours.model)
        ours.train()
        assert_one_step(ours.model, before, gradients)


def test_a_head_that_peft_trains(tmp_path):
    """``modules_to_save``: the gradient goes to the copy, and the original keeps its values."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    rows, documents = trl.prompt_data()
    ours = trainer(llama(), rows, tmp_path, peft_config=config)
    plain = get_peft_model(llama(), config)
    plain.load_state_dict(ours.model.state_dict())
    gradients = reference_gradients(plain, documents)
    assert any("modules_to_save" in name for name in gradients)
    before = parameters(ours.model)
    ours.train()
    assert applied_loss(ours.model.get_base_model()).fused_linear
    assert_one_step(ours.model, before, gradients)


def test_tied_and_resized_embeddings(tmp_path):
    """Rows for new tokens, in an embedding that is the head as well."""
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(trl.VOCAB + 7)
    rows, documents = trl.text_data()
    gradients = reference_gradients(model, documents)
    before = parameters(model)
    trainer(model, rows, tmp_path).train()
    assert_one_step(model, before, gradients)


def test_lam_rises_as_configured(tmp_path):
    rows, _ = trl.text_data()
    ours = trainer(
        llama(),
        rows,
        tmp_path,
        lam_warmup_steps=1,
        lam_ramp_steps=2,
        max_steps=4,
        gradient_accumulation_steps=1,
    )
    ours.train()
    lams = [logs["lam"] for logs in ours.state.log_history if "lam" in logs]
    close_loss(torch.tensor(lams), torch.tensor([0.0, 0.0, LAM / 2, LAM]))
    for logs in ours.state.log_history[:4]:
        expected = logs["nll"] + logs["lam"] * logs["td"]
        assert logs["loss"] == pytest.approx(expected, rel=1e-3)  # rounded for the log


def test_a_router_is_weighted_as_trl_does(tmp_path):
    """As under the mixin, against which test_trl.py compares the formula."""
    logged = []
    for mixin in (False, True):
        rows, _ = trl.prompt_data()
        if mixin:
            made = trl.sft(
                apply_iqlearn(mixtral(), **OPTIONS), rows, tmp_path, router_aux_loss_coef=0.3
            )
        else:
            made = trainer(mixtral(), rows, tmp_path, router_aux_loss_coef=0.3)
        made.train()
        logged.append(made.state.log_history[0])
    for name in ("loss", "aux_loss", "grad_norm", "nll"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-5)


# -------------------------------------------------------------------------------------------------
# The configuration
# -------------------------------------------------------------------------------------------------

FIELDS = {
    "lam": 0.3,
    "gamma": 0.95,
    "entropy_coef": 0.01,
    "z_loss": 1e-4,
    "eos_token_id": [2, 5],
    "boundary": "drop",
    "detach_next": True,
    "lam_warmup_steps": 3,
    "lam_ramp_steps": 4,
    "fused_linear": False,
}


def command_line(fields):
    for name, value in fields.items():
        yield f"--{name}"
        yield from map(str, value if isinstance(value, list) else [value])


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
def test_the_command_line_has_every_field(parser, tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", *command_line(FIELDS)]
    (args,) = parser(IQLearnConfig).parse_args_into_dataclasses(line)
    assert {name: getattr(args, name) for name in FIELDS} == FIELDS
    assert args.loss_options() == {k: v for k, v in FIELDS.items() if k in args.loss_options()}
    help_text = parser(IQLearnConfig).format_help()
    assert all(f"--{name}" in help_text for name in FIELDS)


def test_a_yaml_file_and_a_dictionary(tmp_path):
    path = tmp_path / "sft.yaml"
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    path.write_text(yaml.safe_dump(settings | FIELDS))
    (args,) = TrlParser(IQLearnConfig).parse_args_and_config(["--config", str(path)])
    assert {name: getattr(args, name) for name in FIELDS} == FIELDS
    (given,) = TrlParser(IQLearnConfig).parse_args_and_config(
        ["--config", str(path), "--lam", "0.7", "--eos_token_id", "3"]
    )
    assert (given.lam, given.gamma, given.eos_token_id) == (0.7, 0.95, [3])
    again = IQLearnConfig(**{k: v for k, v in args.to_dict().items() if k in FIELDS}, **settings)
    assert again.loss_options() == args.loss_options()
    assert json.loads(args.to_json_string())["lam"] == 0.3
    path.write_text(yaml.safe_dump(settings | {"lamda": 0.3}))
    with pytest.raises(ValueError, match="lamda"):
        TrlParser(IQLearnConfig).parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("lam", {"lam": -0.1}),
        ("gamma", {"gamma": 1.5}),
        ("boundary", {"boundary": "open"}),
        ("warmup_steps", {"lam_warmup_steps": -1}),
    ],
)
def test_bad_fields_raise_at_once(message, fields, tmp_path):
    with pytest.raises(ValueError, match=message):
        IQLearnConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_the_command_line_trains(tmp_path):
    """A model by name, a YAML file and an option: the step of float64 autograd, and it is saved."""
    model = llama()
    rows, documents = trl.prompt_data()
    gradients = reference_gradients(model, documents)
    before = parameters(model)
    for made in (model, trl.tokenizer()):
        made.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    settings = STEP | {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "gamma": GAMMA,
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    ours = main(["--config", str(tmp_path / "sft.yaml"), "--lam", str(LAM)])
    assert ours.state.global_step == 1
    assert_one_step(ours.model, before, gradients)
    saved = type(model).from_pretrained(tmp_path / "out")
    for name, parameter in parameters(saved).items():
        assert torch.equal(parameter, dict(ours.model.named_parameters())[name])


# -------------------------------------------------------------------------------------------------
# What is refused
# -------------------------------------------------------------------------------------------------


def test_another_configuration_or_an_applied_model_is_refused(tmp_path):
    rows, _ = trl.text_data()
    data = {"train_dataset": trl.Dataset.from_list(rows), "processing_class": trl.tokenizer()}
    plain = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args=SFTConfig, which has no lam; accepted: IQLearnConf"):
        IQLearnSFTTrainer(llama(), plain, **data)
    with pytest.raises(ValueError, match="model=LlamaForCausalLM after apply_iqlearn"):
        trainer(apply_iqlearn(llama()), rows, tmp_path)


def test_left_padding_that_would_be_trained_is_refused(tmp_path):
    """And what is masked trains as padding on the right does."""
    model = llama()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)

    def left(rows):
        return collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows], left=True)

    def whole(rows):
        batch = left(rows)
        batch["labels"] = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
        return batch

    with pytest.raises(ValueError, match="padded on the left, and its padding would be trained"):
        trainer(model, data, tmp_path, data_collator=whole).train()
    trainer(model_again := llama(), data, tmp_path, data_collator=left).train()
    assert_one_step(model_again, before, gradients)


def test_images_are_refused(tmp_path):
    rows, _ = trl.text_data()
    collator = DataCollatorForVisionLanguageModeling(trl.tokenizer())
    with pytest.raises(NotImplementedError, match="images were never tried; accepted: text"):
        trainer(llama(), rows, tmp_path, data_collator=collator)


def test_labels_that_are_shifted_already_are_refused(tmp_path):
    def shifted(rows):
        batch = collate(rows)
        batch["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch

    model = llama()
    before = parameters(model)
    with pytest.raises(ValueError, match="the labels are shifted already"):
        trainer(model, examples(model), tmp_path, data_collator=shifted).train()
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, before[name])


def test_the_callback_stands_first(tmp_path):
    rows, _ = trl.text_data()
    given = IQLearnCallback()
    ours = trainer(llama(), rows, tmp_path, callbacks=[given])
    assert ours.callback_handler.callbacks[0] is given
