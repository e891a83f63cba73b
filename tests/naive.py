"""The losses written naively: loops over rows, float64, gradients by autograd.

Slow and obvious on purpose. Nothing here looks at the code under test.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED, TERMINAL, BOOTSTRAP, NO_TD = 0, 1, 2, 3


@dataclass
class Row:
    """One row: what the labels decide, its terms, and what a rounding of each term may cost."""

    label: int | None
    kind: int
    has_next: bool
    value: Tensor
    logprob: Tensor
    entropy: Tensor
    logsum: Tensor  # V of the logits; ``value`` may be that of a value head
    correct: bool  # no logit is above the label's
    q: Tensor  # [V], what is drawn from
    next_value: Tensor = field(default_factory=lambda: zero())
    reward: Tensor = field(default_factory=lambda: zero())
    m: float = 0.0
    d: float = 0.0


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def logsumexp(q: Tensor) -> Tensor:
    return torch.logsumexp(q[q != -math.inf], -1)


def entropy(q: Tensor) -> Tensor:
    logp = q[q != -math.inf] - logsumexp(q)
    return -(logp.exp() * logp).sum()


def bend(x: Tensor, options: dict[str, Any]) -> Tensor:
    """Logits that are scaled and soft-capped; -inf stays -inf."""
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    q = x * float(scale)
    return (
        q
        if cap is None
        else torch.where(x == -math.inf, x, float(cap) * torch.tanh(q / float(cap)))
    )


def readout(x: Tensor, options: dict[str, Any]) -> Tensor:
    """The Q-values of logits, at one temperature."""
    return bend(x, options) / float(options.get("temperature", 1.0))


def drawn(x: Tensor, options: dict[str, Any], at: tuple[int, ...]) -> Tensor:
    """What a sampler draws from in the row ``at``: the columns it keeps, at the temperature."""
    heat, mask, above = (options.get(n) for n in ("temperature", "keep_mask", "keep_above"))
    q = bend(x, options)
    heat = torch.as_tensor(1.0 if heat is None else heat, dtype=torch.float64)
    z = q / (heat[at] if heat.ndim else heat)
    if mask is not None:
        z = torch.where(mask[at], z, -math.inf)
    return z if above is None else torch.where(q < above.double()[at], -math.inf, z)


def log_likelihood(q: Tensor, token: int) -> Tensor:
    """Of a token that may not be kept, in a row of which nothing may be."""
    return q[token] - logsumexp(q) if len(finite(q)) else q[token]


def joins(t: int, packing: dict[str, Any], b: int, length: int) -> bool:
    """Whether row t + 1 of batch row b is the next row of row t."""
    if t + 1 >= length:
        return False
    if "segment_ids" in packing:
        ids = packing["segment_ids"].reshape(-1, length)[b]
        return bool(ids[t] == ids[t + 1])
    if "position_ids" in packing:
        positions = packing["position_ids"].reshape(-1, length)[b]
        return bool(positions[t + 1] == positions[t] + 1)
    if "cu_seqlens" in packing:
        return t + 1 not in packing["cu_seqlens"].tolist()
    return True


def align(labels: Tensor, options: dict[str, Any]) -> tuple[list[list[int | None]], Any]:
    """The label that each row scores, None where there is none; and `joins` of this batch."""
    length = labels.shape[-1]
    packing = {
        name: options[name]
        for name in ("segment_ids", "position_ids", "cu_seqlens")
        if options.get(name) is not None
    }
    where = options.get("where")
    batch = labels.reshape(-1, length).tolist()
    aligned: list[list[int | None]] = []
    for b, sequence in enumerate(batch):
        row: list[int | None] = []
        for t in range(length):
            label = sequence[t]
            if options.get("shift", False):
                label = sequence[t + 1] if joins(t, packing, b, length) else None
            if label == options.get("ignore_index", -100):
                label = None
            if where is not None and not where.reshape(-1, length)[b, t]:
                label = None
            row.append(label)
        aligned.append(row)
    return aligned, lambda b, t: joins(t, packing, b, length)


def kind_of(label: int | None, has_next: bool, next_labelled: bool, cut: bool, opt: Any) -> int:
    """The table of rules, from the top."""
    eos = opt.get("eos_token_id")
    eos = [eos] if isinstance(eos, int) else eos
    onward = BOOTSTRAP if has_next else NO_TD
    if label is None:
        return IGNORED
    if eos is not None and label in eos:
        return TERMINAL
    if has_next and next_labelled:
        return BOOTSTRAP
    if cut:
        return onward
    if eos is not None:
        return onward
    return {"terminal": TERMINAL, "bootstrap": onward, "drop": NO_TD}[
        opt.get("boundary", "terminal")
    ]


def flag(flags: Tensor | None, labels: Tensor, b: int, t: int) -> bool:
    """A bool a sequence, or a bool a row."""
    if flags is None:
        return False
    if flags.shape == labels.shape:
        return bool(flags.reshape(-1, labels.shape[-1])[b, t])
    return bool(flags.reshape(-1)[b])


def rows_of(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> list[list[Row]]:
    """Every row with its kind and its statistics; logits are float64."""
    length, vocab = labels.shape[-1], logits.shape[-1]
    # row by row, so that no gradient reaches a row that no term uses
    sequences = logits.reshape(-1, length, vocab)
    places = list(np.ndindex(*labels.shape))
    q = [
        [drawn(row, options, places[b * length + t]) for t, row in enumerate(sequence)]
        for b, sequence in enumerate(sequences)
    ]
    given = (options.get("values"), options.get("next_values"))
    values, next_values = (None if x is None else x.double() for x in given)
    gamma = float(options.get("gamma", 1.0))
    aligned, has_next = align(labels, options)
    batch = []
    for b, sequence in enumerate(aligned):
        rows = []
        for t, label in enumerate(sequence):
            v = own = logsumexp(q[b][t])
            kind = kind_of(
                label,
                has_next(b, t),
                has_next(b, t) and sequence[t + 1] is not None,
                flag(options.get("truncated"), labels, b, t),
                options,
            )
            logprob = zero() if label is None else log_likelihood(q[b][t], label)
            if values is not None:
                v = values.reshape(-1, length)[b, t]
            correct = label is not None and bool(q[b][t][label] >= q[b][t].max() > -math.inf)
            h = entropy(q[b][t])
            rows.append(Row(label, kind, has_next(b, t), v, logprob, h, own, correct, q[b][t]))
        for t, row in enumerate(rows):
            if row.kind == BOOTSTRAP:
                if next_values is not None:
                    row.next_value = next_values.reshape(-1, length)[b, t]
                else:
                    row.next_value = rows[t + 1].value
                if options.get("detach_next", False):
                    row.next_value = row.next_value.detach()
            if row.kind in (TERMINAL, BOOTSTRAP):
                label_value = q[b][t][row.label] if values is None else row.value + row.logprob
                row.reward = label_value - gamma * row.next_value
        batch.append(rows)
    return batch


def share(weights: list[float], num_items: Any, reduction: str) -> list[float]:
    if reduction != "mean":
        return weights
    total = sum(weights) if num_items is None else float(num_items)
    return [w / total if total != 0 else 0.0 for w in weights]


def weigh(batch: list[list[Row]], name: str, labels: Tensor, options: dict[str, Any]) -> None:
    """Sets m and d of every row, by the table of losses."""
    reduction, items = options.get("reduction", "mean"), options.get("num_items")
    lam, alpha = float(options.get("lam", 0.1)), float(options.get("alpha", 0.1))
    given = options.get("token_weights")
    weights = torch.ones(labels.shape) if given is None else given
    w = weights.double().reshape(-1).tolist()
    length = labels.shape[-1]
    rows = [row for sequence in batch for row in sequence]
    for i, row in enumerate(rows):
        if row.kind == IGNORED:
            w[i] = 0.0
    if name == "online_iqlearn_loss":
        expert = [
            flag(options["is_expert"], labels, i // length, i % length) for i in range(len(w))
        ]
        n_e, n_b = (None, None) if items is None else items
        w_e = share([x if e else 0.0 for x, e in zip(w, expert, strict=True)], n_e, reduction)
        w_b = share([0.0 if e else x for x, e in zip(w, expert, strict=True)], n_b, reduction)
        m = w_e
        d = [
            lam / (1 - alpha) * e + lam * alpha / (1 - alpha) ** 2 * b
            for e, b in zip(w_e, w_b, strict=True)
        ]
    else:
        m = share(w, items, reduction)
        d = [lam * x if name == "iqlearn_loss" else 0.0 for x in m]
    for row, row.m, row.d in zip(rows, m, d, strict=True):
        if row.kind not in (TERMINAL, BOOTSTRAP):
            row.d = 0.0


def loss(name: str, logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, list]:
    """The loss of that name (a row's loss each with reduction "none"), and the rows."""
    batch = rows_of(logits, labels, options)
    weigh(batch, name, labels, options)
    kappa = float(options.get("entropy_coef", 0.0))
    zeta = float(options.get("z_loss", 0.0))
    per_row = []
    for row in (row for sequence in batch for row in sequence):
        total = zero()
        if row.m != 0:
            total = total - row.m * row.logprob
            if kappa != 0:
                total = total - row.m * kappa * row.entropy
            if zeta != 0:
                total = total + row.m * zeta * row.logsum**2
        if row.d != 0:
            total = total + row.d * row.reward**2
        per_row.append(total)
    out = torch.stack(per_row).reshape(labels.shape) if per_row else torch.zeros(labels.shape)
    return (out if options.get("reduction") == "none" else out.sum()), batch


def token_stats(logits: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    """The outputs of token_stats by name."""
    batch = rows_of(logits, labels, options)
    names = ("value", "logprob", "entropy", "reward", "next_value")
    out = {
        name: torch.stack([getattr(r, name) for s in batch for r in s]).reshape(labels.shape)
        for name in names
    }
    rows = [row for sequence in batch for row in sequence]
    out["kind"] = torch.tensor([row.kind for row in rows]).reshape(labels.shape)
    out["correct"] = torch.tensor([row.correct for row in rows]).reshape(labels.shape)
    return out | measures(rows, labels, options)


def measures(rows: list[Row], labels: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs that are asked for beyond those."""
    out = {}
    extra = options.get("extra_ids")
    if extra is not None:
        each = [
            torch.stack([log_likelihood(row.q, i) if 0 <= i < len(row.q) else zero() for i in ids])
            if ids
            else torch.zeros(0, dtype=torch.float64)
            for row, ids in zip(rows, extra.reshape(len(rows), -1).tolist(), strict=True)
        ]
        out["extra_logprob"] = torch.stack(each).reshape(extra.shape)
    of = {
        "log_sum_sq": lambda q: logsumexp(2 * q) - 2 * logsumexp(q) if len(finite(q)) else q.sum(),
        "top1": lambda q: torch.tensor(int(np.argmax(q.detach().numpy()))),
        "mean_logit": lambda q: finite(q).mean() if len(finite(q)) else q.sum(),
    }
    for name in options.get("extras", ()):
        out[name] = torch.stack([of[name](row.q) for row in rows]).reshape(labels.shape)
    return out


def finite(q: Tensor) -> Tensor:
    return q[q != -math.inf]


def metrics(
    batch: list[list[Row]], name: str, with_entropy: bool, with_z: bool = False
) -> dict[str, float]:
    """Plain means over plain lists."""

    def mean(xs: list[float]) -> float:
        return sum(xs) / len(xs) if xs else 0.0

    rows = [row for sequence in batch for row in sequence]
    labelled = [row for row in rows if row.kind != IGNORED]
    td = [row for row in rows if row.kind in (TERMINAL, BOOTSTRAP)]
    out = {
        "nll": mean([-row.logprob.item() for row in labelled]),
        "value": mean([row.value.item() for row in labelled]),
        "accuracy": mean([float(row.correct) for row in labelled]),
        "tokens": float(len(labelled)),
    }
    if with_z:
        out["z"] = mean([row.logsum.item() ** 2 for row in labelled])
    if with_entropy:
        out["entropy"] = mean([row.entropy.item() for row in labelled])
    if name != "mle_loss":
        out["td"] = mean([row.reward.item() ** 2 for row in td])
        out["reward"] = mean([row.reward.item() for row in td])
    return out
