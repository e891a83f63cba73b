"""Losses for fine-tuning that weigh tokens by what the model thinks of them.

Each takes logits and labels, or the statistics of a call of ``token_stats`` or
``linear_token_stats``, and is differentiated through those::

    dft_loss(logits, labels, shift=True)
    dft_loss(linear_token_stats(hidden, weight, labels, shift=True, entropy=False))
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops.algebra import token_losses
from irl_ops.algebra.token_losses import Scored
from irl_ops.call import read_token_loss, read_vocab
from irl_ops.options import RewardOptions, TokenLossOptions, signature
from irl_ops.torch.arguments import arguments
from irl_ops.torch.tokens import TokenStats, token_stats

__all__ = ["asft_loss", "dft_loss", "eaft_loss", "endogenous_reward", "power_loss", "psft_loss"]


@signature(TokenLossOptions)
def dft_loss(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    **options: Unpack[TokenLossOptions[Tensor]],
) -> Tensor:
    r"""Dynamic fine-tuning (arXiv 2508.05629, Eq. 9): the log-likelihood, weighted by p.

    .. math:: L = \frac{1}{N} \sum_t -w_t\, \mathrm{sg}(p_t) \log p_t, \qquad p_t = \pi(a_t)

    sg stops the gradient, which is then that of ``power_loss`` with q = 1: that of -p.

    Args:
        logits: ``[..., T, V]``; see ``irl_ops.torch.iqlearn_loss`` for this and all that follow. Or
            the ``TokenStats`` of a call of ``token_stats`` or ``linear_token_stats``; labels, and
            all options but the three of how rows are averaged, belong to that call then.
        labels: ``[..., T]``.
        logit_scale: factor of the logits.
        softcap: bound of the logits, or None.
        temperature: divides q.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``.
        shift: logits[t] scores labels[t + 1].
        segment_ids: ``[..., T]``; with ``shift``, where a label is not the next row's.
        position_ids: ``[..., T]``, likewise.
        cu_seqlens: ``[S + 1]``, likewise.
        eos_token_id: changes nothing here, as ``boundary`` and ``truncated``.
        token_weights: w, ``[..., T]``; 1 by default.
        num_items: N for reduction "mean"; by default the sum of w over the labelled rows.
        reduction: "mean", "sum" or "none".
        backend: a name of ``available_backends()``, or "auto".

    Returns:
        Tensor: float32, 0-d, or the labels' shape for reduction "none". 0 where N = 0. Rows without
        a label, and those of weight 0, get no gradient, whatever their logits hold.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``iqlearn_loss``; TypeError for labels
            or other options beside statistics.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> dft_loss(logits, torch.randint(100, (2, 8)), shift=True).backward()
    """
    rows = _rows("dft_loss", logits, labels, dict(options))
    return _averaged(rows, token_losses.dft(xp, rows.logprob, Tensor.detach))


@signature(TokenLossOptions)
def eaft_loss(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    vocab_size: int | None = None,
    **options: Unpack[TokenLossOptions[Tensor]],
) -> Tensor:
    r"""Entropy-adaptive fine-tuning (arXiv 2601.02151): the log-likelihood, weighted by entropy.

    .. math:: L = \frac{1}{N} \sum_t -w_t\, \mathrm{sg}\left[(H_t / \log V)^\alpha\right] \log p_t

    H is the entropy over the whole vocabulary. The paper takes that of the 20 likeliest tokens
    instead, renormalised, divided by 3, which is log 20 rounded.

    Args:
        logits: ``[..., T, V]``, or ``TokenStats``; as all that is not named here: see ``dft_loss``.
        labels: ``[..., T]``.
        alpha: the power of the weight; a number of 0 or more, or a 0-d tensor. 0 is MLE.
        vocab_size: V in log V; the width of the logits by default. Statistics don't hold it: give
            it beside those.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> eaft_loss(logits, torch.randint(100, (2, 8)), alpha=1.0).backward()
    """
    vocab = read_vocab("eaft_loss", TokenStats, logits, vocab_size)
    rows = _rows("eaft_loss", logits, labels, dict(options), entropy=True)
    alpha = arguments.number("alpha", alpha, rows.share, 0.0, math.inf)
    gated = token_losses.eaft(xp, rows.logprob, rows.entropy, vocab, alpha, Tensor.detach)
    return _averaged(rows, gated)


@signature(TokenLossOptions)
def asft_loss(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    *,
    reference_logprob: Tensor,
    lam: float | Tensor = 0.1,
    **options: Unpack[TokenLossOptions[Tensor]],
) -> Tensor:
    r"""Anchored fine-tuning (arXiv 2509.23753): ``dft_loss``, kept near a reference model.

    .. math:: L = \frac{1}{N} \sum_t w_t \left[ -\mathrm{sg}(p_t) \log p_t
              + \lambda (e^{d_t} - d_t - 1) \right], \qquad d_t = \log p^{ref}_t - \log p_t

    The second term is the k3 estimate of a divergence from the reference, at the label alone: the
    reference's log-probabilities suffice. The paper sums KL(ref || p) over the vocabulary.

    Args:
        logits: ``[..., T, V]``, or ``TokenStats``; as all that is not named here: see ``dft_loss``.
        labels: ``[..., T]``.
        reference_logprob: log p^ref of the labels ``[..., T]``, such as ``token_stats`` of the
            reference model under no_grad gives; aligned with the logits. What it holds in rows
            without a label does not matter.
        lam: the strength of the anchor; a number of 0 or more, or a 0-d tensor.

    Example:
        >>> logits, labels = torch.randn(2, 8, 100), torch.randint(100, (2, 8))
        >>> reference = token_stats(torch.randn(2, 8, 100), labels).logprob
        >>> asft_loss(logits.requires_grad_(), labels, reference_logprob=reference).backward()
    """
    rows = _rows("asft_loss", logits, labels, dict(options))
    reference = _given("reference_logprob", reference_logprob, rows)
    lam = arguments.number("lam", lam, rows.share, 0.0, math.inf)
    anchored = token_losses.asft(xp, rows.logprob, reference, lam, Tensor.detach)
    return _averaged(rows, anchored)


@signature(TokenLossOptions)
def psft_loss(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    *,
    old_logprob: Tensor,
    epsilon: float | Tensor = 0.2,
    **options: Unpack[TokenLossOptions[Tensor]],
) -> Tensor:
    r"""Proximal fine-tuning (arXiv 2508.17784): PPO's objective with an advantage of 1.

    .. math:: L = \frac{1}{N} \sum_t -w_t \min(r_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon)),
              \qquad r_t = \exp(\log p_t - \log p^{old}_t)

    An advantage of 1 makes this -min(r, 1 + epsilon): the lower bound never counts.

    Args:
        logits: ``[..., T, V]``, or ``TokenStats``; as all that is not named here: see ``dft_loss``.
        labels: ``[..., T]``.
        old_logprob: log p^old of the labels ``[..., T]``, of the model before the update; aligned
            with the logits. What it holds in rows without a label does not matter.
        epsilon: how far p may rise over p^old before its gradient is 0; a number of 0 or more, or a
            0-d tensor.

    Example:
        >>> logits, labels = torch.randn(2, 8, 100, requires_grad=True), torch.randint(100, (2, 8))
        >>> old = token_stats(logits.detach(), labels).logprob
        >>> psft_loss(logits, labels, old_logprob=old).backward()
    """
    rows = _rows("psft_loss", logits, labels, dict(options))
    old = _given("old_logprob", old_logprob, rows)
    epsilon = arguments.number("epsilon", epsilon, rows.share, 0.0, math.inf)
    return _averaged(rows, token_losses.psft(xp, rows.logprob, old, epsilon))


@signature(TokenLossOptions)
def power_loss(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    *,
    q: float | Tensor = 1.0,
    **options: Unpack[TokenLossOptions[Tensor]],
) -> Tensor:
    r"""A power of the probability (arXiv 2510.00526): from MLE at q = 0 to -p at q = 1 and beyond.

    .. math:: L = \frac{1}{N} \sum_t w_t\, \frac{1 - p_t^q}{q}

    Args:
        logits: ``[..., T, V]``, or ``TokenStats``; as all that is not named here: see ``dft_loss``.
        labels: ``[..., T]``.
        q: a number of 0 or more, or a 0-d tensor. Tokens of small p weigh less as it grows: the
            gradient is p^q times that of the log-likelihood. 0 is MLE.

    Example:
        >>> logits = torch.randn(2, 8, 100, requires_grad=True)
        >>> power_loss(logits, torch.randint(100, (2, 8)), q=0.5).backward()
    """
    rows = _rows("power_loss", logits, labels, dict(options))
    q = arguments.number("q", q, rows.share, 0.0, math.inf)
    return _averaged(rows, token_losses.power(xp, rows.logprob, q))


@signature(RewardOptions)
def endogenous_reward(
    logits: Tensor | TokenStats,
    labels: Tensor | None = None,
    **options: Unpack[RewardOptions[Tensor]],
) -> Tensor:
    r"""The reward that a language model's logits hold (arXiv 2506.23235): ``TokenStats.reward``.

    .. math:: r_t = q_t[a_t] - \gamma V'_t

    It is no loss: one number per token. Logits read as Q-values are what the paper, too, starts
    from; its temperature alpha is 1 here. All options are those of ``token_stats``.

    Args:
        logits: ``[..., T, V]``, or ``TokenStats``, whose rewards are returned.
        labels: ``[..., T]``.
        gamma: discount in [0, 1]. At 1, as in the paper, the rewards of an episode that ends in a
            terminal row sum to log pi(episode) + V(first row).

    Returns:
        Tensor: float32 of the labels' shape; 0 in NO_TD and IGNORED rows.

    Example:
        >>> endogenous_reward(torch.randn(2, 8, 100), torch.randint(100, (2, 8))).shape
        torch.Size([2, 8])
    """
    if isinstance(logits, TokenStats):
        if labels is not None or options:
            raise TypeError("endogenous_reward: more than TokenStats; accepted: those alone")
        return logits.reward
    if labels is None:
        raise TypeError("endogenous_reward: labels are missing; accepted: logits and labels")
    return token_stats(logits, labels, entropy=False, **options).reward


def _rows(
    caller: str, logits: Any, labels: Any, options: dict[str, Any], entropy: bool = False
) -> Scored:
    stats, weighting = read_token_loss(
        caller, arguments, token_stats, TokenStats, logits, labels, options, entropy
    )
    dtype, weights = stats.logprob.dtype, weighting.token_weights
    weights = torch.ones_like(stats.logprob) if weights is None else weights.to(dtype)
    weighting = weighting._replace(token_weights=weights)
    return token_losses.scored(xp, stats.kind, stats.logprob, stats.entropy, weighting)


def _given(name: str, x: Any, rows: Scored) -> Tensor:
    """Log-probabilities of another model; 0 where their row does not count."""
    arguments.check_given(name, x, rows.share)
    return xp.where(rows.share != 0, x.to(rows.share.dtype), 0.0)


def _averaged(rows: Scored, per_token: Tensor) -> Tensor:
    loss: Tensor = token_losses.averaged(xp, rows, per_token)
    return loss
