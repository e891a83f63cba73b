"""Two ranks on gloo take the step of one process, and log its metrics."""

import gc
import os
from pathlib import Path

import pytest
import torch

from ..launch import launch

LR = 0.1


def main(folder: Path) -> None:
    """The steps of a rank."""
    torch.set_num_threads(1)
    step(folder, int(os.environ["WORLD_SIZE"]))
    # DDP's reducer goes before its process group. If it were the group's last owner, it would
    # join the group's threads under the GIL, which one of them can be waiting for.
    gc.collect()
    torch.distributed.destroy_process_group()


def step(folder: Path, ranks: int) -> None:
    """One accumulated step of 8 examples of unequal lengths, by however many ranks there are."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        Trainer,
        TrainingArguments,
    )

    from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn

    torch.manual_seed(0)
    tokens = {"vocab_size": 41, "pad_token_id": 0, "eos_token_id": 2}
    llama = LlamaConfig(
        **tokens,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    t5 = T5Config(
        **tokens,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    data = []
    for length in (3, 9, 5, 7, 4, 8, 6, 11):
        ids = torch.full((12,), 0)
        ids[:length] = torch.randint(3, 41, (length,))
        labels = torch.where(ids > 0, ids, -100)
        labels[0] = -100
        data.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})

    for model in (LlamaForCausalLM(llama), T5ForConditionalGeneration(t5)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(
            apply_iqlearn(model, lam=0.1, gamma=0.9),
            TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=4 // ranks,
                per_device_eval_batch_size=4 // ranks,
                gradient_accumulation_steps=2,
                max_steps=1,
                optim="sgd",
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
            ),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[IQLearnCallback()],
        )
        assert trainer.args.world_size == ranks
        trainer.train()
        logged = trainer.state.log_history[0] | trainer.evaluate()
        if trainer.args.process_index == 0:
            update = {
                name: (before[name] - p.detach()) / LR for name, p in model.named_parameters()
            }
            torch.save((update, logged), folder / f"{type(model).__name__}-{ranks}.pt")


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one_process(tmp_path):
    step(tmp_path, ranks=1)
    launch(__file__, tmp_path, ranks=2)
    for kind in ("LlamaForCausalLM", "T5ForConditionalGeneration"):
        one, logged_by_one = torch.load(tmp_path / f"{kind}-1.pt")
        two, logged_by_two = torch.load(tmp_path / f"{kind}-2.pt")
        assert max(update.abs().max() for update in one.values()) > 0.1
        for name, update in one.items():
            # float32 sums in another order
            torch.testing.assert_close(two[name], update, rtol=1e-4, atol=1e-5)
        for name in ("loss", "nll", "value", "td", "reward", "eval_nll", "eval_td", "eval_reward"):
            assert logged_by_two[name] == pytest.approx(logged_by_one[name], rel=1e-4)
