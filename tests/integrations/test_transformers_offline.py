"""Offline IQLearn in a Trainer: that it learns, and a wrong sign does not; that it is resumed.

Its updates are in test_transformers.py and test_transformers_value_head.py, and those of two
processes in test_transformers_ddp.py and test_systems_ranks.py.
"""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    LamScheduleCallback,
    apply_iqlearn,
)
from irl_ops.schedules import warmup_ramp

from .. import naive
from .tiny_systems import EOS, counting
from .tiny_transformers import collate, llama, train

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


class Flipped(Trainer):
    """The TD term with the wrong sign: 2 NLL - L."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        nll = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].ravel())
        return 2 * nll - outputs.loss


def measured(model, rows):
    """Mean NLL and squared residual of rows, by loops in float64."""
    exact, seen = copy.deepcopy(model).double().eval(), []
    exact.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    inputs = collate(rows)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = exact(**inputs).logits
        options = {"shift": True, "gamma": 0.9, "eos_token_id": EOS}
        if hasattr(exact, "value_head"):
            options["values"] = exact.value_head(seen[0])[..., 0]
        nll, both = (
            naive.loss("iqlearn_loss", logits, labels, lam=lam, **options)[0] for lam in (0.0, 1.0)
        )
    return nll.item(), (both - nll).item()


@pytest.mark.parametrize("value_head", [False, True])
def test_it_learns_and_a_wrong_sign_does_not(value_head, tmp_path):
    """Likelihood rises and residuals shrink; with the TD term's sign flipped they grow."""
    found = {}
    for cls in (Trainer, Flipped):
        model = apply_iqlearn(llama(), value_head=value_head, lam=0.5, gamma=0.9, eos_token_id=EOS)
        torch.manual_seed(0)
        train(
            model,
            counting(32),
            tmp_path,
            trainer_class=cls,
            max_steps=40,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            **ADAM,
        )
        found[cls] = measured(model, counting(16, seed=1))
    nll, td = found[Trainer]
    # untrained: log 41 = 3.7, and at most (log 41)^2 = 14
    assert nll < 1.0
    assert td < 0.5 < 14 < found[Flipped][1]


@pytest.mark.parametrize("value_head", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(value_head, tmp_path):
    """The same losses, with a schedule of lam that the checkpoint lies in the middle of."""

    def curve(checkpoint=None):
        lam = torch.tensor(0.0)
        model = apply_iqlearn(llama(), value_head=value_head, lam=lam, gamma=0.9)
        schedule = partial(warmup_ramp, lam=0.2, warmup_steps=2, ramp_steps=4)
        trainer = train(
            model,
            counting(16),
            tmp_path,
            callbacks=[LamScheduleCallback(lam, schedule), IQLearnCallback()],
            resume=checkpoint,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            **ADAM,
        )
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [{k: v for k, v in log.items() if k != "epoch"} for log in logs]

    straight = curve()
    assert curve(str(tmp_path / "checkpoint-3")) == straight
    assert len(straight) == 6 and {"loss", "nll", "td", "lam"} <= set(straight[0])
    assert straight[2]["lam"] < straight[3]["lam"] < straight[5]["lam"]
