"""The options of the losses as users write them: named and typed once, for every framework.

A public function takes ``**options: Unpack[...]`` of one of the groups below; ``signature`` shows
them one by one, with their defaults, to ``help`` and ``inspect``. ``Array`` stands for the
framework's arrays. What an option means is said in ``irl_ops.torch.iqlearn_loss``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from typing import Any, Generic, Literal, NoReturn, TypedDict, TypeVar

from irl_ops.algebra.options import Heads, Sequence, Weighting
from irl_ops.readout import Readout

Boundary = Literal["terminal", "bootstrap", "drop"]
Reduction = Literal["mean", "sum", "none"]
Extra = Literal["log_sum_sq", "top1", "mean_logit"]
Array = TypeVar("Array")
Function = TypeVar("Function", bound=Callable[..., Any])


class SequenceOptions(TypedDict, Generic[Array], total=False):
    """Which rows carry a label, and which row follows which."""

    ignore_index: int
    where: Array | None
    shift: bool
    segment_ids: Array | None
    position_ids: Array | None
    cu_seqlens: Array | None
    eos_token_id: int | ListOf[int] | None
    boundary: Boundary
    truncated: Array | None


class HeadOptions(TypedDict, Generic[Array], total=False):
    """Where values come from, other than the logits."""

    detach_next: bool
    next_values: Array | None
    values: Array | None


class ReadoutOptions(TypedDict, Generic[Array], total=False):
    """How logits become Q-values."""

    logit_scale: float | Array
    softcap: float | Array | None
    temperature: float | Array


class LikelihoodOptions(SequenceOptions[Array], ReadoutOptions[Array], total=False):
    """What every loss takes."""

    entropy_coef: float | Array
    z_loss: float | Array
    token_weights: Array | None
    reduction: Reduction
    inplace: bool
    backend: str


class MLEOptions(LikelihoodOptions[Array], total=False):
    """Of ``mle_loss``."""

    num_items: float | Array | None


class IQLearnOptions(LikelihoodOptions[Array], HeadOptions[Array], total=False):
    """Of ``iqlearn_loss``."""

    lam: float | Array
    gamma: float | Array
    num_items: float | Array | None


class OnlineOptions(LikelihoodOptions[Array], HeadOptions[Array], total=False):
    """Of ``online_iqlearn_loss``."""

    alpha: float | Array
    lam: float | Array
    gamma: float | Array
    num_items: tuple[float | Array, float | Array] | None


class StatsOptions(SequenceOptions[Array], HeadOptions[Array], ReadoutOptions[Array], total=False):
    """Of ``token_stats``."""

    gamma: float | Array
    entropy: bool
    entropy_grad: bool
    extra_ids: Array | None
    keep_mask: Array | None
    keep_above: Array | None
    extras: ListOf[Extra]
    backend: str


class ParallelOptions(TypedDict, Generic[Array], total=False):
    """Which part of the logits is here; each framework names its own groups of devices beside."""

    vocab_start: int | None
    vocab_size: int | None
    sequence_order: Array | None


class TokenLossOptions(SequenceOptions[Array], ReadoutOptions[Array], total=False):
    """Of the losses that are a function of each token's statistics."""

    token_weights: Array | None
    num_items: float | Array | None
    reduction: Reduction
    backend: str


class RewardOptions(SequenceOptions[Array], HeadOptions[Array], ReadoutOptions[Array], total=False):
    """Of ``endogenous_reward``."""

    gamma: float | Array
    backend: str


class LayerOptions(TypedDict, Generic[Array], total=False):
    """Of losses that compute the logits themselves: the layer, and how its chunks are added up."""

    bias: Array | None
    chunk_size: int | None
    accumulate: Literal["float32", "weight"] | Array | None


class LinearLossOptions(LayerOptions[Array], total=False):
    """Of losses, whose result does not show all rows."""

    drop_rows: bool | None


class LinearIQLearnOptions(LinearLossOptions[Array], IQLearnOptions[Array], total=False):
    """Of ``linear_iqlearn_loss``: those of its dense twin, and of the layer."""


class LinearMLEOptions(LinearLossOptions[Array], MLEOptions[Array], total=False):
    """Of ``linear_mle_loss``."""


class LinearOnlineOptions(LinearLossOptions[Array], OnlineOptions[Array], total=False):
    """Of ``linear_online_iqlearn_loss``."""


class LinearStatsOptions(LayerOptions[Array], StatsOptions[Array], total=False):
    """Of ``linear_token_stats``."""


LAYER: dict[str, Any] = {"bias": None, "chunk_size": None, "accumulate": None}
"""The defaults of the layer's options."""

DEFAULTS: dict[str, Any] = {
    **LAYER,
    "drop_rows": None,
    "alpha": 0.1,
    "lam": 0.1,
    "gamma": 1.0,
    "entropy_coef": 0.0,
    "z_loss": 0.0,
    **Readout._field_defaults,
    "temperature": 1.0,
    **Sequence._field_defaults,
    **Weighting._field_defaults,
    **Heads._field_defaults,
    "entropy": True,
    "entropy_grad": True,
    "extra_ids": None,
    "keep_mask": None,
    "keep_above": None,
    "extras": (),
    "return_metrics": False,
    "inplace": False,
    "vocab_group": None,
    "vocab_axis": None,
    "vocab_start": None,
    "vocab_size": None,
    "sequence_group": None,
    "sequence_axis": None,
    "sequence_order": None,
    "backend": "auto",
}
"""The default of every option, in the order in which signatures show them."""


def signature(options: type) -> Callable[[Function], Function]:
    """Shows the options of that group in the place of ``**options``.

    An option that the function names itself keeps the default that it has there.
    """
    group: Any = options

    def show(function: Function) -> Function:
        plain = inspect.signature(function)
        named = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = {p.name: p.annotation for p in named} | names_in(group)
        own = {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY}
        shown = [p for p in named if p.name not in own or p.name not in DEFAULTS]
        shown += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=own.get(name, default),
                annotation=types[name],
            )
            for name, default in DEFAULTS.items()
            if name in types and name not in {p.name for p in shown}
        ]
        function.__signature__ = plain.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return show


def names_in(group: Any) -> dict[str, Any]:
    """The names of a group's options, those of the groups it is made of among them."""
    base = getattr(group, "__origin__", group)
    return dict(base.__annotations__)


def refuse(caller: str, unknown: ListOf[str], group: Any) -> NoReturn:
    """The TypeError for options that a function does not have."""
    accepted = [name for name in DEFAULTS if name in names_in(group)]
    hint = ""
    if "num_items_in_batch" in unknown:  # what a Trainer calls a compute_loss_func with
        hint = "; for a Trainer: irl_ops.integrations.transformers.iqlearn_loss_func(...)"
    raise TypeError(
        f"{caller} has no option {', '.join(map(repr, unknown))}; accepted: "
        f"{', '.join(accepted)}{hint}"
    )
