"""The arguments of GAIL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from irl_ops.integrations.transformers.sampled import SamplingArguments

ALGORITHMS, SCALES = ("a2c", "ppo"), ("scaled", "whitened", "raw")


@dataclass
class GAILArguments(SamplingArguments):
    """The arguments of ``GAILTrainer``; those of ``TrainingArguments`` hold as well.

    The learning rate, its linear warm-up to a constant and Adam without weight decay are the
    paper's.

    Args:
        algorithm: "a2c", one update for each sample, or "ppo", with a clipped ratio.
        clip: how far "ppo" lets the ratio go from 1.
        updates_per_rollout: updates on the same samples, with new demonstrations each; for "ppo".
        gamma: discount.
        gae_lambda: decay of the generalised advantages; 1 takes whole returns.
        advantages: "scaled", divided by their root mean square over the samples of an update, on
            all processes; "whitened", with their mean taken off first; or "raw".
        kl_initial: weight of the KL to the initial policy at first.
        kl_final: that at the end (the paper's 1e-3).
        kl_anneal_steps: updates from one to the other, in a line.
        mle_weight: weight of the NLL of demonstrations in the policy's loss.
        entropy_coef: weight of the policy's entropy in sampled rows.
        agent_batch_size: samples beside each micro-batch of demonstrations; None: as many.
    """

    learning_rate: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="constant_with_warmup")
    warmup_steps: float = field(default=2000)
    weight_decay: float = field(default=0.0)
    algorithm: Literal["a2c", "ppo"] = field(default="a2c")
    clip: float = field(default=0.2)
    updates_per_rollout: int = field(default=1)
    gamma: float = field(default=1.0)
    gae_lambda: float = field(default=0.95)
    advantages: Literal["scaled", "whitened", "raw"] = field(default="scaled")
    kl_initial: float = field(default=0.1)
    kl_final: float = field(default=1e-3)
    kl_anneal_steps: int = field(default=10_000)
    mle_weight: float = field(default=0.0)
    entropy_coef: float = field(default=0.0)
    agent_batch_size: int | None = field(default=None)

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, accepted in (("algorithm", ALGORITHMS), ("advantages", SCALES)):
            given = getattr(self, name)
            if given not in accepted:
                raise ValueError(f"{name}={given!r}; accepted: {', '.join(map(repr, accepted))}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: [0, 1]")
        for name in ("kl_initial", "kl_final", "kl_anneal_steps", "mle_weight", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: 0 or more")
        if self.updates_per_rollout < 1 or (
            self.updates_per_rollout > 1 and self.algorithm == "a2c"
        ):
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout} with algorithm="
                f"{self.algorithm!r}; accepted: 1, or more with 'ppo'"
            )
        if self.agent_batch_size is not None and self.agent_batch_size < 1:
            raise ValueError(
                f"agent_batch_size={self.agent_batch_size}; accepted: None, or 1 or more"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}; accepted: above 0, since the policy gradient is "
                "that of a distribution"
            )
