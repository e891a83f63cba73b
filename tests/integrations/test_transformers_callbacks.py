"""Metrics in the logs, the schedule of lam, and the checks before an update."""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    LamScheduleCallback,
    apply_iqlearn,
)
from irl_ops.schedules import warmup_ramp

from .tiny_transformers import (
    CLOSE_UPDATE,
    GAMMA,
    OPTIONS,
    close_loss,
    collate,
    examples,
    llama,
    parameters,
    reference_gradients,
    train,
)


class Reporter(TrainerCallback):
    """What TensorBoard and W&B are to the Trainer."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def naive_metrics(model, batches):
    """Means over all labelled tokens of nll, value, td, reward."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            q = model(**inputs).logits
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        for row, row_labels in zip(q, labels, strict=True):
            for t in torch.nonzero(row_labels != -100).flatten().tolist():
                value, q_label = row[t].logsumexp(-1), row[t, row_labels[t]]
                last = t + 1 == len(row_labels) or row_labels[t + 1] == -100
                reward = q_label - (0 if last else GAMMA * row[t + 1].logsumexp(-1))
                sums += torch.stack([value - q_label, value, reward**2, reward, reward * 0 + 1])
    return dict(zip(("nll", "value", "td", "reward"), (sums / sums[-1])[:4], strict=True))


def test_metrics_reach_logs_reporters_and_evaluate(tmp_path):
    model = llama()
    data, held_out = examples(model, (5, 9, 7, 3)), examples(model, (4, 8, 2))
    reference = copy.deepcopy(model).double()
    trainer = Trainer(
        apply_iqlearn(model, **OPTIONS),
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.0,  # so that both steps see the reference's parameters
            use_cpu=True,
            report_to="none",
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=2,
            save_strategy="best",
            metric_for_best_model="eval_a_nll",
            greater_is_better=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset={"a": held_out, "b": data},
        data_collator=collate,
        callbacks=[reporter := Reporter()],
    )
    IQLearnCallback().attach(trainer)
    model(**collate(held_out))  # before the training: no part of its logs
    trainer.train()

    expected = naive_metrics(reference, [collate(data)])
    expected_held_out = naive_metrics(reference, [collate(held_out)])
    stored = trainer.state.log_history
    for log, prefix, values in (
        (stored[0], "", expected),
        (stored[1], "eval_a_", expected_held_out),
        (stored[2], "eval_b_", expected),
        (reporter.seen[0], "", expected),
        (reporter.seen[1], "eval_a_", expected_held_out),
        (trainer.evaluate(), "eval_b_", expected),
        (trainer.predict(held_out).metrics, "test_", expected_held_out),
    ):
        assert f"{prefix}loss" in log
        for name, value in values.items():
            close_loss(torch.tensor(log[prefix + name]), value)
    assert trainer.state.best_metric == stored[1]["eval_a_nll"]
    assert "nll" not in stored[3]  # the summary of the training has nothing left to report


def test_lam_follows_its_schedule(tmp_path):
    model = llama()
    data = examples(model)
    before = parameters(model)
    gradients = reference_gradients(model, [collate(data)], lam=0.0, gamma=1.0)
    lam = torch.tensor(0.5)  # what a forgotten first step would use
    schedule = partial(warmup_ramp, lam=0.2, warmup_steps=1, ramp_steps=2)
    first_step = []

    class AfterFirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            first_step.append(parameters(model))

    trainer = train(
        apply_iqlearn(model, lam=lam),
        data,
        tmp_path,
        max_steps=4,
        callbacks=[LamScheduleCallback(lam, schedule), AfterFirstStep()],
    )
    logged = [log["lam"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx([0.0, 0.0, 0.1, 0.2], rel=1e-6)  # float32
    for name, gradient in gradients.items():
        update = (before[name] - first_step[0][name]).double() / 0.1
        torch.testing.assert_close(update, gradient, rtol=CLOSE_UPDATE, atol=1e-5)


def test_the_worst_checkpoint_is_not_kept():
    """By default the Trainer looks for the largest "eval_nll"."""
    given = {"label_smoothing_factor": 0.0, "n_gpu": 1, "metric_for_best_model": "eval_nll"}
    model = apply_iqlearn(llama(), **OPTIONS)
    for greater in (True, False):
        arguments = SimpleNamespace(**given, greater_is_better=greater)
        refused = pytest.raises(ValueError, match="accepted: greater_is_better=False")
        with refused if greater else nullcontext():
            IQLearnCallback().on_train_begin(arguments, None, None, model=model)
