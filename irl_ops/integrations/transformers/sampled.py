"""A Trainer that samples its policy between updates, and says what each of the two has taken."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from irl_ops.integrations.transformers import context
from irl_ops.integrations.transformers.callbacks import refuse_the_worst
from irl_ops.integrations.transformers.episodes import Buffer, Episode, prompt_of
from irl_ops.integrations.transformers.loss import DATA_PARALLEL, Loss
from irl_ops.integrations.transformers.ranges import SAMPLING
from irl_ops.integrations.transformers.sampling import (
    ContinuousSampler,
    GenerateSampler,
    Sampler,
    VLLMSampler,
    end_tokens,
    pad_token,
)

BUFFER = "episodes.json"


@dataclass
class SamplingArguments(TrainingArguments):
    """Those of a run that samples its policy.

    Args:
        max_new_tokens: the length at which an answer is cut off.
        temperature: of sampling; 0 takes the likeliest token each time.
        sample_batch_size: prompts in one call of ``generate``, on each process.
        fused_linear: the losses store no logits, as in ``apply_iqlearn``, nor do evaluations.
    """

    max_new_tokens: int = field(default=128)
    temperature: float = field(default=1.0)
    sample_batch_size: int = field(default=16)
    fused_linear: bool = field(default=False)


class SampledTrainer(Trainer):
    """What trainers of sampled policies share: prompts, the buffer, the clocks and their logs.

    Sampling happens before an update, from a model in evaluation mode, with random numbers that
    depend on the seed, the step and the process alone: a run that is resumed samples what it would
    have sampled. The buffer is the same on all processes, and is saved in each checkpoint. Logs
    hold the seconds since the last log that sampling and updates have taken, ``sampling_seconds``
    and ``update_seconds``; to tell them apart, a device is waited for once an update.
    """

    args: SamplingArguments

    def __init__(
        self, model: Any, args: SamplingArguments, *, sampler: Sampler | None = None, **kwargs: Any
    ) -> None:
        if args.label_smoothing_factor != 0 or kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func belong to another loss; accepted: 0 "
                "and None"
            )
        refuse_the_worst(args)
        super().__init__(model, args, **kwargs)
        context.refuse(type(self).__name__, context.sizes())
        if args.n_gpu > 1:
            raise ValueError(DATA_PARALLEL)
        if self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"train_dataset={type(self.train_dataset).__name__}; accepted: one with rows by "
                "number, of which prompts are drawn"
            )
        self.label_names = ["labels"]  # for evaluations: a forward that reads names none
        self.loss_is_scaled_for_ga = True
        self.sampler = sampler or GenerateSampler(
            args.max_new_tokens, args.temperature, args.sample_batch_size
        )
        self._refuse_engines()
        base = self.policy_model()
        base.add_model_tags(["irl_ops", type(self).__name__])
        self.ends, self.pad = end_tokens(base), pad_token(base)
        self.encoder_decoder = bool(base.config.is_encoder_decoder)
        self.buffer = Buffer(0)
        self.running = {training: Loss({}) for training in (True, False)}
        self.observed: defaultdict[str, list[float]] = defaultdict(list)
        self.seconds = {"sampling_seconds": 0.0, "update_seconds": 0.0}
        self.add_callback(_UpdateClock(self))

    def _refuse_engines(self) -> None:
        """Of those that part weights over processes, what cannot sample."""
        zero3 = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "fsdp_config['version']=1: a policy in FSDP1 is not sampled here; accepted: 2"
            )
        if (self.is_fsdp_enabled or zero3) and isinstance(self.sampler, ContinuousSampler):
            raise ValueError(
                "sampler=ContinuousSampler with weights parted by FSDP or ZeRO-3: it generates "
                "in a thread of its own, at another pace on each process, and they would wait for "
                "each other's weights; accepted: GenerateSampler, VLLMSampler"
            )
        unstored = self.args.fused_linear or hasattr(self.model, "critic")
        if zero3 and hasattr(self.policy(), "peft_config") and unstored:
            raise ValueError(
                f"{type(self).__name__}(fused_linear={self.args.fused_linear}) with PEFT under "
                "ZeRO-3, whose hooks would read logits that are not stored; accepted with PEFT: "
                "FSDP2, ZeRO-2, DDP, and under ZeRO-3 OnlineIQLearnTrainer(fused_linear=False)"
            )
        if zero3 and isinstance(self.sampler, VLLMSampler):
            raise ValueError(
                "sampler=VLLMSampler with ZeRO-3, whose parted weights it cannot send; accepted: "
                "GenerateSampler, or FSDP2, ZeRO-2 or DDP"
            )

    def policy_model(self) -> Any:
        """The Transformers model that is sampled, without what wraps it."""
        raise NotImplementedError

    def policy(self) -> torch.nn.Module:
        """The same with its adapters: what samplers are given."""
        policy: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return policy

    # ---------------------------------------------------------------------------------------------
    # Sampling
    # ---------------------------------------------------------------------------------------------

    def sample(self, count: int) -> list[Episode]:
        """``count`` episodes of the current policy, the same list on all processes."""
        args, step = self.args, self.state.global_step
        ranks, rank = args.world_size, args.process_index
        if count % ranks:
            raise ValueError(
                f"{count} episodes for {ranks} processes; accepted: a multiple of their number"
            )
        started = self._now()
        chosen = self._prompts(count, step)
        share = count // ranks
        own = chosen[rank * share : (rank + 1) * share]
        with self._as_of(step), record_function(SAMPLING):
            answers = self._answers(own)
        if len(answers) != len(own):
            raise ValueError(f"the sampler gave {len(answers)} answers to {len(own)} prompts")
        episodes = [Episode(step, p, list(a)) for p, a in zip(own, answers, strict=True)]
        if ranks > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            episodes = gather_object(episodes)
        self.seconds["sampling_seconds"] += self._now() - started
        lengths = [len(episode.answer) for episode in episodes]
        whole = [bool(e.answer) and e.answer[-1] in self.ends for e in episodes]
        self.observed["answer_length"] += [float(x) for x in lengths]
        self.observed["answers_cut_off"] += [float(not x) for x in whole]
        return episodes

    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        return self.sampler.sample(self.policy(), prompts)

    def _prompts(self, count: int, step: int) -> list[list[int]]:
        """Those of demonstrations at random; no demonstration comes again before all have come."""
        data: Any = self.train_dataset
        collate = self._get_collator_with_removed_columns(self.data_collator)
        generator = torch.Generator().manual_seed(self.args.seed + 31 * step)
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(data), generator=generator).tolist()
        batches = (collate([data[i]]) for i in order[:count])
        return [prompt_of(batch, self.encoder_decoder) for batch in batches]

    @contextlib.contextmanager
    def _as_of(self, step: int) -> Iterator[None]:
        """Evaluation mode, no gradients, and random numbers of this step and process."""
        policy = self.policy()
        training = policy.training
        policy.eval()
        seed = self.args.seed + 1_000_003 * (step + 1) + self.args.process_index
        try:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                yield
        finally:
            policy.train(training)

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    # ---------------------------------------------------------------------------------------------
    # Labels, logs, checkpoints
    # ---------------------------------------------------------------------------------------------

    def over_ranks(self, x: Tensor) -> Tensor:
        """A sum over all processes."""
        summed: Tensor = self.accelerator.reduce(x.to(self.args.device), reduction="sum")
        return summed

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the metrics of the losses, and in training also the clocks and what was sampled."""
        for key in list(logs):
            if key.endswith("loss") and key != "train_loss":
                prefix = key.removesuffix("loss")
                logs |= self.running[prefix == ""].drain(prefix)
        if "loss" in logs:
            logs |= {k: sum(v) / len(v) for k, v in self.observed.items() if v}
            logs |= self.seconds
            self.observed.clear()
            self.seconds = dict.fromkeys(self.seconds, 0.0)
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            path = Path(output_dir) / BUFFER
            path.write_text(json.dumps(self.buffer.state()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / BUFFER).is_file():
            self.buffer.load(json.loads(path.read_text(encoding="utf-8")))


class _UpdateClock(TrainerCallback):
    """Times the updates: what lies between the two ends of a step."""

    def __init__(self, trainer: SampledTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.started = self.trainer._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.trainer.seconds["update_seconds"] += self.trainer._now() - self.started
