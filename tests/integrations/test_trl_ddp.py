"""Two ranks on gloo under TRL take the step of float64 autograd over all their documents."""

import copy
import gc
from pathlib import Path

import pytest
import torch

from ..launch import launch
from . import test_trl as trl
from . import test_trl_trainer as made
from .tiny_transformers import CLOSE_UPDATE

MODES = ("completions", "packed", "stored", "lora", "mixture", "trainer")
STORED = {"stored": False}  # whether logits are; by default not
LR = 0.1


def setting(name):
    """A model, rows, documents and arguments; the rows are shared evenly by two ranks."""
    from peft import LoraConfig

    build, make, arguments = {
        "completions": (trl.llama, trl.prompt_data, {}),
        "packed": (trl.llama, trl.text_data, {"packing": True, "max_length": 16}),
        "stored": (trl.llama, trl.text_data, {"packing": True, "max_length": 16}),
        "lora": (trl.llama, trl.prompt_data, {}),
        "trainer": (trl.llama, trl.text_data, {"packing": True, "max_length": 16}),
        "mixture": (trl.mixtral, trl.prompt_data, {"router_aux_loss_coef": 0.5}),
    }[name]
    rows, documents = make()
    if name == "mixture":  # the same for all micro-batches, whoever gets which
        rows, documents = rows[:1] * 8, documents[:1] * 8
    if name == "lora":
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        arguments["peft_config"] = config
    return build(), rows, documents, arguments


def main(folder: Path) -> None:
    """One step of an epoch, of one document or packed row in each micro-batch."""
    torch.set_num_threads(1)
    for name in MODES:
        model, rows, _, arguments = setting(name)
        arguments["per_device_train_batch_size"] = 1
        if name == "trainer":
            trainer = made.trainer(model, rows, folder, **arguments)
        else:
            fused_linear = False if name == "stored" else None
            applied = trl.apply_iqlearn(model, fused_linear=fused_linear, **trl.OPTIONS)
            trainer = trl.sft(applied, rows, folder, **arguments)
        assert trainer.args.world_size == 2
        before = trl.parameters(trainer.model)
        trainer.train()
        assert trainer.current_gradient_accumulation_steps > 1
        if trainer.args.process_index == 0:
            update = {
                n: (before[n] - p.detach()) / LR
                for n, p in trainer.model.named_parameters()
                if p.requires_grad
            }
            torch.save((before, update, trainer.state.log_history[0]), folder / f"{name}.pt")
    # as in test_transformers_ddp.py
    del model, trainer
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_step_of_float64_autograd(tmp_path):
    from peft import get_peft_model

    launch(__file__, tmp_path, ranks=2)
    for name in MODES:
        before, update, logged = torch.load(tmp_path / f"{name}.pt")
        model, _, documents, arguments = setting(name)
        if name == "lora":
            model = get_peft_model(model, arguments["peft_config"])
            model.load_state_dict(before, strict=False)  # its adapters start at random
        if name == "mixture":  # the experts' kernels have no float64
            inputs = documents[0]["input_ids"]
            outputs = model(inputs, output_router_logits=True)
            total, count = trl.naive_sum(outputs.logits, documents[0]["labels"], shift=True)
            loss = total / count + 0.5 * outputs.aux_loss
        else:
            model = copy.deepcopy(model).double().train()
            loss = trl.naive_loss(model, documents)
        loss.backward()
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4), name  # rounded for the log
        assert {"nll", "td", "entropy", "mean_token_accuracy"} <= set(logged)
        assert logged["num_tokens"] == sum(d["input_ids"].numel() for d in documents), name
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(gradients) <= set(update) and gradients
        error = sum((update[n].double() - g).square().sum() for n, g in gradients.items())
        norm = sum(g.square().sum() for g in gradients.values())
        assert error.sqrt() < CLOSE_UPDATE * norm.sqrt(), name
