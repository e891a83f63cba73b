"""Online IQLearn (A.1.2, Eqs. 15-17): demonstrations, and samples of the current policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from irl_ops.integrations.transformers.episodes import Buffer, batch_of, joined, plain, scored
from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.integrations.transformers.ranges import LOSS, POLICY
from irl_ops.integrations.transformers.reading import Reader, Readout
from irl_ops.integrations.transformers.sampled import SampledTrainer, SamplingArguments
from irl_ops.integrations.transformers.sampling import Sampler
from irl_ops.schedules import warmup_ramp
from irl_ops.torch import TokenStats, iq_value_loss

OBJECTIVES = ("iqlearn", "value")


@dataclass
class OnlineIQLearnArguments(SamplingArguments):
    """The arguments of ``OnlineIQLearnTrainer``; those of ``TrainingArguments`` hold as well.

    Args:
        objective: "iqlearn", the paper's Eq. 16 (``online_iqlearn_loss``), or "value", that of the
            original IQ-Learn (``iq_value_loss``), which has no term of likelihood.
        semi_gradient: no gradient through V': in all of Eq. 16, or in the value objective's r.
        alpha: strength of the mix-in, in [0, 1).
        lam: weight of the squared TD residual.
        gamma: discount.
        entropy_coef: weight of the entropy of demonstrated rows, for "iqlearn".
        mle_warmup_steps: updates of plain maximum likelihood before (``lam`` = 0: nothing is
            sampled), for "iqlearn".
        lam_ramp_steps: updates in which ``lam`` then rises to its value.
        agent_batch_size: sampled rows that are joined to each micro-batch; None: as many as it has.
        samples_per_refresh: episodes that are sampled at once, on all processes together; None: as
            many as an update takes.
        refresh_every: updates between two refreshes.
        max_age: how many updates ago an episode may have been sampled; at least
            ``refresh_every - 1``.
    """

    objective: Literal["iqlearn", "value"] = field(default="iqlearn")
    semi_gradient: bool = field(default=False)
    alpha: float = field(default=0.1)
    lam: float = field(default=0.1)
    gamma: float = field(default=1.0)
    entropy_coef: float = field(default=0.0)
    mle_warmup_steps: int = field(default=0)
    lam_ramp_steps: int = field(default=0)
    agent_batch_size: int | None = field(default=None)
    samples_per_refresh: int | None = field(default=None)
    refresh_every: int = field(default=1)
    max_age: int = field(default=8)

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}; accepted: {', '.join(OBJECTIVES)}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}; accepted: [0, 1)")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}; accepted: [0, 1]")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"lam={self.lam}; accepted: a finite number, 0 or more")
        if self.refresh_every < 1 or self.max_age < self.refresh_every - 1:
            raise ValueError(
                f"refresh_every={self.refresh_every} and max_age={self.max_age} would leave no "
                "episode; accepted: refresh_every >= 1, max_age >= refresh_every - 1"
            )
        for name in ("agent_batch_size", "samples_per_refresh"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name}={given}; accepted: None, or 1 or more")
        if self.objective == "value" and (
            self.mle_warmup_steps or self.lam_ramp_steps or self.entropy_coef
        ):
            raise ValueError(
                "mle_warmup_steps, lam_ramp_steps and entropy_coef are terms of "
                "objective='iqlearn'; accepted with objective='value': 0"
            )


class OnlineIQLearnTrainer(SampledTrainer):
    """Trains a language model by online IQLearn; in all else it is the Trainer.

    To each micro-batch of demonstrations, samples of the policy are joined. Both end where their
    end token is, V' = 0 there; what was cut off bootstraps from the row behind it. The loss is
    divided by the labels of the whole update over all processes, demonstrated and sampled ones
    apart. With a value head (``apply_iqlearn(model, value_head=True)``), V is that of the head.
    Evaluation computes the loss of demonstrations alone, and ``eval_nll`` with it.

    Args:
        model: a Transformers model that generates, or a PEFT model around one.
        args: ``OnlineIQLearnArguments``.
        sampler: what generates answers; None: ``GenerateSampler``.
        **kwargs: as for the Trainer. ``train_dataset`` needs rows by number, and its collator makes
            ``input_ids``, ``attention_mask`` and ``labels``, -100 on prompts and padding.

    Raises:
        ValueError: arguments of another loss, a model without an end token, a batch that holds
            anything else.
        NotImplementedError: as ``Reader``.
    """

    args: OnlineIQLearnArguments

    def __init__(
        self,
        model: Any,
        args: OnlineIQLearnArguments,
        *,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        Reader(model, args.fused_linear).attach()
        super().__init__(model, args, sampler=sampler, **kwargs)
        self.buffer = Buffer(args.max_age)

    def policy_model(self) -> Any:
        """See ``SampledTrainer``."""
        return transformers_model(self.accelerator.unwrap_model(self.model))

    def lam_now(self) -> float:
        """``lam`` in the update that comes."""
        args = self.args
        value: float = warmup_ramp(
            self.state.global_step,
            lam=args.lam,
            warmup_steps=args.mle_warmup_steps,
            ramp_steps=args.lam_ramp_steps,
        )
        return value

    # ---------------------------------------------------------------------------------------------
    # Before an update
    # ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of an update, with samples; and the pair of their counts of labels."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [plain(batch) for batch in batches]
        if batches and (self.args.objective == "value" or self.lam_now() > 0):
            batches = self._with_samples(batches)
        shift = not self.encoder_decoder
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            expert = batch.get("is_expert", torch.ones(len(batch["labels"]), dtype=torch.bool))
            counts[0] += scored(batch["labels"][expert], shift).to(device)
            counts[1] += scored(batch["labels"][~expert], shift).to(device)
        return batches, self.over_ranks(counts)

    def _with_samples(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        args, step = self.args, self.state.global_step
        sizes = [args.agent_batch_size or len(batch["labels"]) for batch in batches]
        count = int(self.over_ranks(torch.tensor(sum(sizes))))
        if step % args.refresh_every == 0 or not self.buffer.episodes:
            new = self.sample(args.samples_per_refresh or count)
        else:
            new = []
        self.buffer.add(step, new)
        drawn = self.buffer.draw(count, seed=args.seed + 17 * step)
        self.observed["episode_age"] += [float(step - episode.step) for episode in drawn]
        # Of ranks with equally many rows, each takes every world_size-th.
        own = iter(drawn[args.process_index :: args.world_size])
        out = []
        for batch, size in zip(batches, sizes, strict=True):
            chosen = [episode for _, episode in zip(range(size), own, strict=False)]
            if chosen:
                rows = batch_of(chosen, self.pad, self.ends, self.encoder_decoder)
                batch = joined(batch, rows, self.pad)
            out.append(batch)
        return out

    # ---------------------------------------------------------------------------------------------
    # The update
    # ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch; without ``is_expert`` all of it was demonstrated."""
        inputs = dict(inputs)
        labels, is_expert = inputs.pop("labels"), inputs.pop("is_expert", None)
        if is_expert is None:
            is_expert = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
        if self.encoder_decoder:
            make = self.policy_model().prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = make(labels=labels)
        items = None
        if model.training and num_items_in_batch is not None:
            items = (num_items_in_batch[0].float(), num_items_in_batch[1].float())

        def read(readout: Readout) -> Any:
            loss, metrics = self._loss(readout, labels, is_expert, items)
            stored = return_outputs and isinstance(readout.logits, Tensor)
            return loss, metrics, readout.logits if stored else None

        with self.accelerator.autocast(), record_function(POLICY):
            loss, metrics, logits = model(**inputs, read=read)
        if model.training:  # these would be means of demonstrations and samples
            del metrics["nll"], metrics["accuracy"]
        self.running[model.training]._record(metrics)
        if items is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP take means of gradients
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss(
        self, readout: Readout, labels: Tensor, is_expert: Tensor, items: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.args
        shared: dict[str, Any] = {
            "gamma": args.gamma,
            "shift": not self.encoder_decoder,
            "eos_token_id": self.ends,
        }
        if readout.values is not None:
            shared["values"] = readout.values
        if args.objective == "value":
            stats = readout("token_stats", labels, entropy=False, **shared)
            with record_function(LOSS):
                loss = iq_value_loss(
                    stats,
                    is_expert,
                    alpha=args.alpha,
                    lam=args.lam,
                    semi_gradient=args.semi_gradient,
                    num_items=items,
                )
                return loss, _metrics(stats)
        found: tuple[Tensor, dict[str, Tensor]] = readout(
            "online_iqlearn_loss",
            labels,
            is_expert,
            alpha=args.alpha,
            lam=torch.tensor(self.lam_now()),
            entropy_coef=args.entropy_coef,
            detach_next=args.semi_gradient,
            num_items=items,
            return_metrics=True,
            **shared,
        )
        return found


def _metrics(stats: TokenStats) -> dict[str, Tensor]:
    """As ``online_iqlearn_loss`` gives them."""
    labelled = stats.kind != 0
    count = labelled.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(labelled, x, 0.0).sum().detach() / count.clamp(min=1)

    return {
        "nll": -mean(stats.logprob),
        "value": mean(stats.value),
        "td": mean(stats.reward.square()),
        "reward": mean(stats.reward),
        "accuracy": mean(stats.correct.float()),
        "tokens": count.float(),
    }
