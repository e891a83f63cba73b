"""The losses of ``sft`` written naively, in float64; ``sg`` is ``detach``."""

import math
from typing import Any

import torch
from torch import Tensor

from . import naive


def dft(logp: Tensor, **_: Any) -> Tensor:
    return -logp.exp().detach() * logp


def eaft(logp: Tensor, *, entropy: Tensor, vocab: int, alpha: float = 1.0, **_: Any) -> Tensor:
    return -((entropy.detach() / math.log(vocab)) ** alpha) * logp


def asft(logp: Tensor, *, other: Tensor, lam: float = 0.1, **_: Any) -> Tensor:
    ratio = (other - logp).exp()
    return dft(logp) + lam * (ratio - 1 - ratio.log())


def psft(logp: Tensor, *, other: Tensor, epsilon: float = 0.2, **_: Any) -> Tensor:
    ratio = (logp - other).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + epsilon))


def power(logp: Tensor, *, q: float = 1.0, **_: Any) -> Tensor:
    return -logp if q == 0 else (1 - logp.exp() ** q) / q


FORMULAS = {
    "dft_loss": dft,
    "eaft_loss": eaft,
    "asft_loss": asft,
    "psft_loss": psft,
    "power_loss": power,
}
OTHER = {"asft_loss": "reference_logprob", "psft_loss": "old_logprob"}
"""The argument that another model's log-probabilities are given as."""


def loss(
    name: str, logits: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, list[naive.Row]]:
    """The loss of that name; [..., T] for reduction "none". Logits are float64."""
    batch = naive.rows_of(logits, labels, options)
    naive.weigh(batch, "mle_loss", labels, options)
    rows = [row for sequence in batch for row in sequence]
    others = options.get(OTHER.get(name, ""))
    others = torch.zeros(labels.shape) if others is None else others
    own = {key: float(options[key]) for key in ("alpha", "lam", "epsilon", "q") if key in options}
    per_row = []
    for row, other in zip(rows, others.double().reshape(-1), strict=True):
        x = naive.zero()
        if row.m != 0:
            given = {"entropy": row.entropy, "vocab": logits.shape[-1], "other": other}
            x = row.m * FORMULAS[name](row.logprob, **given, **own)
        per_row.append(x)
    out = torch.stack(per_row).reshape(labels.shape)
    return (out if options.get("reduction") == "none" else out.sum()), rows
