"""``SFTConfig`` with the options of the loss as fields, for TRL's command line and YAML files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import SFTConfig

from irl_ops.integrations.options import try_options
from irl_ops.schedules import warmup_ramp

# The fields that the loss has under the same name.
LOSS = ("lam", "gamma", "entropy_coef", "z_loss", "eos_token_id", "boundary", "detach_next")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class IQLearnConfig(SFTConfig):  # type: ignore[misc]
    """All of ``SFTConfig``, and the options of ``irl_ops.torch.iqlearn_loss``.

    Args:
        lam: weight of the TD term.
        gamma: discount in [0, 1].
        entropy_coef: weight of the entropy.
        z_loss: weight of the squared log-partition.
        eos_token_id: tokens that end an episode; a number, or several. None: every document ends.
            Packing and ``max_length`` cut documents: give the end token, or cuts count as ends.
        boundary: what the last labelled row of a document is without ``eos_token_id``: "terminal",
            "bootstrap" or "drop".
        detach_next: no gradient through the next row's value.
        lam_warmup_steps: steps with ``lam`` 0 at first.
        lam_ramp_steps: steps in which ``lam`` then rises to its value.
        fused_linear: whether the logits stay unstored in training; None where the head allows it.

    Raises:
        ValueError, TypeError: an option that ``iqlearn_loss`` does not accept.
    """

    lam: float = field(default=0.1, metadata=_help("Weight of IQLearn's TD term."))
    gamma: float = field(default=1.0, metadata=_help("Discount in [0, 1]."))
    entropy_coef: float = field(default=0.0, metadata=_help("Weight of the entropy term."))
    z_loss: float = field(default=0.0, metadata=_help("Weight of the squared log-partition."))
    eos_token_id: list[int] | None = field(
        default=None, metadata=_help("Tokens that end an episode; without, every document ends.")
    )
    boundary: Literal["terminal", "bootstrap", "drop"] = field(
        default="terminal",
        metadata=_help("What a document's last labelled row is without eos_token_id."),
    )
    detach_next: bool = field(
        default=False, metadata=_help("Stop the gradient through the next row's value.")
    )
    lam_warmup_steps: int = field(
        default=0, metadata=_help("Steps of maximum likelihood (lam = 0) at first.")
    )
    lam_ramp_steps: int = field(default=0, metadata=_help("Steps from 0 to lam after these."))
    fused_linear: bool | None = field(
        default=None,
        metadata=_help("Store no logits in training; by default where the head allows it."),
    )

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        try_options(self.loss_options())
        warmup_ramp(
            0, lam=self.lam, warmup_steps=self.lam_warmup_steps, ramp_steps=self.lam_ramp_steps
        )

    def loss_options(self) -> dict[str, Any]:
        """What ``irl_ops.torch.iqlearn_loss`` is called with."""
        return {name: getattr(self, name) for name in LOSS}
