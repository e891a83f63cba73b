"""Batches that each show one thing, for every backend: what random ones only reach at times."""

import math
from typing import Any

import torch

from .cases import LAYOUTS, Case

V = 7
LENGTH = 4


def case(name: str = "iqlearn_loss", labels: Any = ((1, 2, 3, 4),), **options: Any) -> Case:
    labels = torch.tensor(labels)
    generator = torch.Generator().manual_seed(11)
    leaf = 2 * torch.randn(*labels.shape, V, generator=generator)
    defaults = dict(reduction="mean", entropy_coef=0.0)
    if name != "mle_loss":
        defaults |= dict(lam=0.7, gamma=0.6, detach_next=False)
    upstream = options.pop("upstream", 1.0)
    return Case(name, leaf, lambda x: x, labels, {**defaults, **options}, upstream)


def heads(seed: int, rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, LENGTH, generator=torch.Generator().manual_seed(seed))


EXPERT = torch.tensor([True, False])
TWO = ((1, 2, 3, 4), (5, 6, 0, 1))

CASES = {
    "plain TD rows": case(),
    "gamma of one": case(gamma=1.0),
    "numbers as tensors": case(
        lam=torch.tensor(0.7), gamma=torch.tensor(0.6), entropy_coef=torch.tensor(0.2)
    ),
    "a sum, scaled": case(reduction="sum", upstream=-3.0),
    "two sequences": case(labels=TWO),
    "the gradient of an ignored row": case(labels=((1, 2, -100, 3),), boundary="bootstrap"),
    "the last row bootstraps nowhere": case(labels=TWO, boundary="bootstrap"),
    "no TD term at the end": case(labels=((1, 2, -100, 3),), boundary="drop"),
    "tokens that end an episode": case(labels=TWO, eos_token_id=[2, 6]),
    "truncated, by sequence": case(
        labels=((1, 2, 3, -100), (5, 6, 0, -100)), truncated=torch.tensor([True, False])
    ),
    "truncated, by row": case(
        labels=((1, -100, 3, -100),), truncated=torch.tensor([[False, False, True, False]])
    ),
    "segments": case(segment_ids=torch.tensor([[0, 0, 1, 1]])),
    "positions": case(position_ids=torch.tensor([[4, 5, 0, 1]])),
    "ends of segments": case(
        labels=(1, 2, 3, 4), cu_seqlens=torch.tensor([0, 2, 4]), boundary="bootstrap"
    ),
    "shifted": case(labels=TWO, shift=True),
    "shifted, in segments": case(shift=True, segment_ids=torch.tensor([[0, 0, 1, 1]])),
    "where": case(where=torch.tensor([[True, True, False, True]])),
    "ignore_index": case(labels=((1, 0, 3, 4),), ignore_index=0),
    "detached": case(detach_next=True),
    "weights": case(token_weights=torch.tensor([[1.0, 0.0, 2.0, 0.5]])),
    "weights, int32 labels": case(token_weights=torch.tensor([[1.0, 0.25, 2.0, 0.5]])),
    "items": case(num_items=7.5),
    "entropy": case(entropy_coef=0.3),
    "entropy alone": case("mle_loss", entropy_coef=0.3),
    "MLE": case("mle_loss"),
    "z_loss": case(z_loss=0.3),
    "z_loss, MLE": case("mle_loss", z_loss=torch.tensor(0.3)),
    "z_loss, values": case(z_loss=0.3, values=heads(1), next_values=heads(2)),
    "z_loss, experts and agents": case(
        "online_iqlearn_loss", TWO, is_expert=EXPERT, alpha=0.3, z_loss=0.3, entropy_coef=0.2
    ),
    "values": case(values=heads(1)),
    "values, detached": case(values=heads(1), detach_next=True),
    "values, of two sequences": case(labels=TWO, values=heads(1, 2), boundary="bootstrap"),
    "next values": case(next_values=heads(2)),
    "next values, detached": case(next_values=heads(2), detach_next=True),
    "values and next values": case(values=heads(1), next_values=heads(2)),
    "experts and agents": case("online_iqlearn_loss", TWO, is_expert=EXPERT, alpha=0.3),
    "experts and agents, by row": case(
        "online_iqlearn_loss",
        is_expert=torch.tensor([[True, False, False, True]]),
        alpha=0.3,
        entropy_coef=0.2,
    ),
    "experts and agents, items": case(
        "online_iqlearn_loss", TWO, is_expert=EXPERT, alpha=0.3, num_items=(3, 5.0)
    ),
    "experts and agents, values": case(
        "online_iqlearn_loss", TWO, is_expert=EXPERT, alpha=0.3, values=heads(1, 2)
    ),
}
MASKED = ((1, 2, 4, 5), (5, 4, 2, 1))  # no label is a multiple of 3


def masked(**options: Any) -> Case:
    """Every third column is -inf."""
    made = case(labels=MASKED, entropy_coef=0.3, **options)
    made.leaf[..., ::3] = -math.inf
    return made


CASES["weights, int32 labels"].labels = CASES["weights, int32 labels"].labels.int()

_transposed = case(labels=TWO)  # the same batch, whose labels lie column by column
_transposed.labels = _transposed.labels.mT.contiguous().mT
CASES["transposed labels"] = _transposed

_wide = case(labels=TWO)
_wide.leaf = _wide.leaf.movedim(0, 1).contiguous()
_wide.view = LAYOUTS["[T, B, V]"][1]
CASES["logits by position"] = _wide

CASES["masked columns"] = masked()
CASES["scaled"] = masked(logit_scale=2.5)
CASES["capped"] = masked(softcap=torch.tensor(2.0))
CASES["scaled and capped"] = masked(logit_scale=0.5, softcap=3.0)

_garbage = case(labels=((1, 2, -100, 3),))
_garbage.leaf[:, 2] = math.nan  # no term needs that row
CASES["NaN where nobody looks"] = _garbage

_weightless = case(labels=((1, 2, 3, 4),), token_weights=torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
_weightless.options["next_values"] = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
_weightless.leaf[:, 3] = math.inf
CASES["garbage of weight 0"] = _weightless
