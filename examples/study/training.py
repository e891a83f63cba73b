"""One fine-tuning of the study, by the loss that its settings name."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from irl_ops.integrations.transformers import apply_iqlearn
from irl_ops.schedules import warmup_ramp
from study.config import Run
from study.start import Row, Sizes, Start

POINTS = 8  # of a learning curve, beside its start

Evaluate = Callable[[PreTrainedModel], dict[str, float]]


def arguments(sizes: Sizes, steps: int, seed: int) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "output_dir": tempfile.gettempdir(),  # it is asked for, and nothing is written there
        "max_steps": steps,
        "per_device_train_batch_size": sizes.batch_size,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "seed": seed,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class OfflineTrainer(Trainer):
    """MLE, entropy-regularised MLE and offline IQLearn, with all that the study varies."""

    def __init__(self, run: Run, initial: PreTrainedModel, ends: list[int], **kwargs: Any) -> None:
        self.run = run
        self.weight = torch.zeros((), device=kwargs["args"].device)  # lam, set at each step
        # Where documents end is known from their end tokens, unless ``boundary`` is what is varied.
        apply_iqlearn(
            kwargs["model"], lam=self.weight, gamma=run.gamma, entropy_coef=run.entropy_coef,
            z_loss=run.z_loss, boundary=run.boundary, value_head=run.value_head,
            eos_token_id=ends if run.boundary == "terminal" else None,
        )  # fmt: skip
        super().__init__(**kwargs)
        self.initial = initial.eval() if run.kl else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of a batch, the mean over its labels."""
        self.weight.fill_(self.lam())
        outputs = model(**inputs)
        loss = outputs.loss
        if self.initial is not None:
            two_parts = model.config.is_encoder_decoder
            with torch.no_grad():
                reference = self.initial(**inputs).logits
            loss = loss + self.run.kl * divergence(
                outputs.logits, reference, inputs["labels"], two_parts
            )
        return (loss, outputs) if return_outputs else loss

    def lam(self) -> float:
        """The weight of the TD term in this update: none at first, and none at the end."""
        steps, run = self.args.max_steps, self.run
        warm = round(run.warmup * steps)
        falls = {}
        if run.anneal:
            start = max(warm, round((1 - run.anneal) * steps))
            falls = {"anneal_start": start, "anneal_steps": steps - start}
        return warmup_ramp(self.state.global_step, lam=run.lam, warmup_steps=warm, **falls)


def divergence(logits: Tensor, reference: Tensor, labels: Tensor, two_parts: bool) -> Tensor:
    """Mean of KL(pi || pi_0) over the rows that score a label."""
    scored = labels != -100
    if not two_parts:
        scored = F.pad(scored[:, 1:], (0, 1))
    ours, theirs = logits[scored].log_softmax(-1), reference[scored].log_softmax(-1)
    return F.kl_div(theirs, ours, log_target=True, reduction="batchmean")


class Curve(TrainerCallback):
    """Evaluates along the way."""

    def __init__(self, evaluate: Evaluate, steps: int) -> None:
        self.evaluate, self.every = evaluate, max(1, steps // POINTS)
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A point of the curve, when it is time."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            model = kwargs["model"]
            training = model.training
            policy = getattr(model, "policy", model)  # of the networks of GAIL
            self.points.append({"step": state.global_step, **self.evaluate(policy)})
            model.train(training)


def pre_train(
    sizes: Sizes, model: PreTrainedModel, rows: list[Row], collate: Any, steps: int, seed: int
) -> None:
    """Maximum likelihood of everything that the initial policy is made from."""
    given = arguments(sizes, steps, seed) | {"learning_rate": 3 * sizes.learning_rate}
    _go(Trainer(model, TrainingArguments(**given), train_dataset=rows, data_collator=collate))


def fine_tune(
    start: Start, run: Run, sizes: Sizes, seed: int, evaluate: Evaluate
) -> tuple[PreTrainedModel, list[dict[str, float]], dict[str, float]]:
    """Train a copy of the initial policy; returns it, its learning curve and what the trainer said.

    GAIL goes on from maximum likelihood with as many updates as every other run has.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(start.model)
    rows = start.train[: max(1, round(run.subset * len(start.train)))]
    common: dict[str, Any] = {"train_dataset": rows, "data_collator": start.collate}
    if run.loss == "gail":
        model = _offline(start, model, Run(architecture=run.architecture), sizes, seed, common)[0]
        return _gail(model, run, sizes, seed, evaluate, common)
    if run.loss == "online":
        return _online(model, run, sizes, seed, evaluate, common)
    model, curve = _offline(start, model, run, sizes, seed, common, evaluate)
    return model, curve, {}


def _offline(
    start: Start, model: PreTrainedModel, run: Run, sizes: Sizes, seed: int,
    common: dict[str, Any], evaluate: Evaluate | None = None,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:  # fmt: skip
    initial = copy.deepcopy(start.model) if run.kl else model
    trainer = OfflineTrainer(
        run, initial, start.scorer.ends, model=model,
        args=TrainingArguments(**arguments(sizes, sizes.steps, seed)), **common,
    )  # fmt: skip
    if trainer.initial is not None:
        trainer.initial.to(trainer.args.device)
    return model, _go(trainer, evaluate)


def _online(
    model: PreTrainedModel, run: Run, sizes: Sizes, seed: int, evaluate: Evaluate,
    common: dict[str, Any],
) -> tuple[PreTrainedModel, list[dict[str, float]], dict[str, float]]:  # fmt: skip
    from irl_ops.integrations.transformers import OnlineIQLearnArguments, OnlineIQLearnTrainer

    trainer = OnlineIQLearnTrainer(
        apply_iqlearn(model, value_head=True) if run.value_head else model,
        OnlineIQLearnArguments(
            **arguments(sizes, sizes.steps, seed), alpha=run.alpha, lam=run.lam, gamma=run.gamma,
            entropy_coef=run.entropy_coef, mle_warmup_steps=round(run.warmup * sizes.steps),
            refresh_every=8, samples_per_refresh=2 * sizes.batch_size,
            sample_batch_size=2 * sizes.batch_size, max_new_tokens=sizes.max_new_tokens,
        ),
        **common,
    )  # fmt: skip
    curve = _go(trainer, evaluate)
    return model, curve, dict(trainer.seconds)


def _gail(
    model: PreTrainedModel, run: Run, sizes: Sizes, seed: int, evaluate: Evaluate,
    common: dict[str, Any],
) -> tuple[PreTrainedModel, list[dict[str, float]], dict[str, float]]:  # fmt: skip
    from irl_ops.integrations.transformers import GAILArguments, GAILTrainer

    steps = sizes.online_steps
    given = arguments(sizes, steps, seed) | {"lr_scheduler_type": "constant_with_warmup"}
    trainer = GAILTrainer(
        model,
        GAILArguments(
            **given, gamma=run.gamma, mle_weight=run.mle_weight, entropy_coef=run.entropy_coef,
            kl_anneal_steps=steps, max_new_tokens=sizes.max_new_tokens,
            sample_batch_size=sizes.batch_size,
        ),
        **common,
    )  # fmt: skip
    curve = _go(trainer, evaluate)
    return model, curve, dict(trainer.seconds)


def _go(trainer: Trainer, evaluate: Evaluate | None = None) -> list[dict[str, float]]:
    curve = Curve(evaluate, trainer.args.max_steps) if evaluate else None
    if curve:
        trainer.add_callback(curve)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve.points if curve else []
