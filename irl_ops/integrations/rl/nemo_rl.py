"""The log-probabilities of NeMo RL: of ``nemo_rl.distributed.model_utils``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from irl_ops.integrations.rl.rows import columns, of_hidden, size_of
from irl_ops.torch import token_stats


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
) -> Tensor:
    """Log-probabilities of the next tokens ``[B, S - 1]``.

    Args:
        vocab_parallel_logits: ``[B, S, V]``; of the columns, this process has those from
            vocab_start_index up to vocab_end_index.
        target: ``[B, S]``, not shifted; logits of row t score the token of row t + 1.
        vocab_start_index: the first column here.
        vocab_end_index: the one behind the last.
        tp_group: the processes that share the vocabulary.
        inference_only: no gradient will be asked for.
        cp_group: of one process, or None.
        chunk_size: changes nothing: no row of probabilities is stored.
        sampling_params: None, or an object with ``top_k`` and ``top_p``: columns that such a
            sampler cannot draw count as -inf. The logits come divided by its temperature. Where the
            columns are shared, each process has as many; it sorts a part of the rows, and of the
            columns that equal the least likely one that can be drawn, all can.

    Raises:
        ValueError: indices that are not as far apart as the logits are wide.
        NotImplementedError: a cp_group of more processes.
    """
    _refuse_context(cp_group)
    _check_width(vocab_start_index, vocab_end_index, vocab_parallel_logits.shape[-1])
    shared = columns(tp_group, vocab_start_index)
    keep = _kept(vocab_parallel_logits, sampling_params, shared.get("vocab_group"))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        stats = token_stats(
            vocab_parallel_logits,
            _next(target, vocab_parallel_logits),
            entropy=False,
            **keep,
            **shared,
        )
    return stats.logprob[:, : target.shape[1] - 1]


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of the next tokens ``[B, S - 1]``, from hidden states.

    Args:
        tensor_parallel_hidden_states: ``[S, B, D]``, Megatron's order; of the sequence, this
            process has an equal part.
        output_weight_layer: ``[V, D]``; of its rows, this process has those from
            vocab_start_index up to vocab_end_index.
        runtime_gather_output: changes nothing, as in the original.
        target: ``[B, S]``, not shifted.
        vocab_start_index: the first row here.
        vocab_end_index: the one behind the last.
        tp_group: the processes that share the sequence and the vocabulary.
        inference_only: no gradient will be asked for.
        cp_group: of one process, or None.
        chunk_size: rows per chunk, or None.

    Raises:
        ValueError: indices that are not as far apart as the weight has rows.
        NotImplementedError: a cp_group of more processes.
    """
    _refuse_context(cp_group)
    _check_width(vocab_start_index, vocab_end_index, output_weight_layer.shape[0])
    shared = columns(tp_group, vocab_start_index)
    hidden = tensor_parallel_hidden_states
    if shared:
        hidden = _Gathered.apply(hidden, shared["vocab_group"])  # type: ignore[no-untyped-call]
    hidden = hidden.transpose(0, 1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        logprobs, _ = of_hidden(
            hidden,
            output_weight_layer,
            _next(target, hidden),
            entropy=False,
            chunk_size=chunk_size,
            **shared,
        )
    return logprobs[:, : target.shape[1] - 1]


def _next(target: Tensor, rows: Tensor) -> Tensor:
    """The token behind each row; none for the last, and for rows that pad the sequence."""
    ahead = torch.full(rows.shape[:2], -100, dtype=torch.int64, device=target.device)
    ahead[:, : target.shape[1] - 1] = target[:, 1:]
    return ahead


class _Gathered(torch.autograd.Function):
    """Hidden states of the whole sequence; the gradient of each is the same in all processes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        """The parts behind each other."""
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        """The part that is here."""
        return above.chunk(ctx.group.size())[ctx.group.rank()], None


def _check_width(start: int, end: int, width: int) -> None:
    if end - start != width:
        raise ValueError(
            f"vocab_start_index and vocab_end_index are {start} and {end}; accepted: as far apart "
            f"as there are columns here, {width}"
        )


def _refuse_context(group: Any) -> None:
    if group is not None and size_of(group) != 1:
        raise NotImplementedError(
            f"irl_ops: cp_group has {size_of(group)} processes; accepted: one, or None"
        )


def _kept(logits: Tensor, sampling: Any, group: Any) -> dict[str, Any]:
    """The option that says which columns sampling can draw; none where it can draw all."""
    top_k: int = getattr(sampling, "top_k", None) or 0  # -1 for none too
    top_p: float = getattr(sampling, "top_p", None) or 1.0
    if top_k <= 0 and top_p == 1.0:
        return {}
    logits = logits.detach()
    if group is None:
        return {"keep_mask": _drawn(logits, top_k, top_p)}
    # whole rows, but only so many of them: what goes to each process is what it gets
    ranks, width, rows = group.size(), logits.shape[-1], logits.shape[:-1]
    flat = logits.reshape(-1, width)
    spare = -flat.shape[0] % ranks
    given = torch.cat([flat, flat.new_zeros(spare, width)])
    whole = torch.empty_like(given)
    dist.all_to_all_single(whole, given, group=group)
    whole = whole.view(ranks, -1, width).transpose(0, 1).flatten(1)
    least = whole.masked_fill(~_drawn(whole, top_k, top_p), torch.inf).amin(-1)
    parts = [torch.empty_like(least) for _ in range(ranks)]
    dist.all_gather(parts, least, group)
    return {"keep_above": torch.cat(parts)[: flat.shape[0]].view(rows)}


def _drawn(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which columns top-k and then top-p sampling can draw, bool.

    Of top-p, the columns whose probabilities, added up from the smallest, pass 1 - p.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if top_k > 0:
        keep = logits >= logits.topk(top_k, -1).values[..., -1:]
    if top_p != 1.0:
        ascending, order = logits.masked_fill(~keep, -torch.inf).sort(-1)
        tail = ascending.softmax(-1, torch.float32).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False
        keep &= ~torch.empty_like(tail).scatter_(-1, order, tail)
    return keep
