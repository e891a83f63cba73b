"""Sequences that accelerate spreads over processes: which rows a forward has, and whose they are.

With ``ParallelismConfig(cp_size=...)`` torch's ``context_parallel`` cuts what the Trainer gives to
the model, and takes pieces from the head and the tail of the sequence where it can. With
``sp_size=...`` DeepSpeed's data loader cuts, in the order of the ranks. Both shift labels first.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from irl_ops.integrations import batches
from irl_ops.torch import collectives
from irl_ops.torch.parallel import Cut, outside_of_graphs
from irl_ops.torch.rows import Gather, own


class Part(NamedTuple):
    """The rows of a batch [B, T / ranks] that this process has."""

    cut: Cut
    rows: int  # of the whole sequence, T

    @property
    def ranks(self) -> int:
        """How many processes have rows of these sequences."""
        return dist.get_world_size(self.cut.group)

    @property
    def options(self) -> dict[str, Any]:
        """What a loss of ``irl_ops.torch`` is told."""
        return {"sequence_group": self.cut.group, "sequence_order": self.cut.order}

    def local(self, x: Any) -> Any:
        """The rows here of an array [B, T]; one of rows that are here, or of none, as it is."""
        if isinstance(x, Tensor) and x.ndim == 2 and x.shape[-1] == self.rows:
            return own(self.cut, x, -1)
        return x


def sizes() -> tuple[int, int]:
    """Over how many processes accelerate spreads a sequence: ``(cp_size, sp_size)``."""
    state = sys.modules.get("accelerate.state")  # who spreads has imported it
    config = None if state is None else state.AcceleratorState._shared_state.get(CONFIG)
    return (1, 1) if config is None else (config.cp_size, config.sp_size)


CONFIG = "parallelism_config"


def refuse(caller: str, given: tuple[int, int]) -> None:
    """For those who want all rows of a sequence in one process.

    Raises:
        ValueError: a size of ``given``, as ``sizes`` returns them, is more than 1.
    """
    for name, size in zip(("cp_size", "sp_size"), given, strict=True):
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name}={size} splits sequences over ranks, and {caller} takes "
                "whole ones; accepted: 1, or a Trainer with apply_iqlearn(model, ...)"
            )


def part_of(labels: Tensor, training: bool) -> Part | None:
    """The part of a batch that labels [B, T / ranks] belong to; None where they are whole.

    Args:
        labels: of the rows that are here.
        training: whether the model is in training mode, outside of which DeepSpeed cuts nothing.

    Raises:
        ValueError: the ranks have unequal numbers of rows.
        NotImplementedError: this version of torch does not say how it cuts.
    """
    cp, sp = sizes()
    if cp == sp == 1:
        return None
    return _part_of(labels, training, cp)


@outside_of_graphs
def _part_of(labels: Tensor, training: bool, cp: int) -> Part | None:
    rows = labels.shape[-1]
    if cp > 1:
        attention = _context_parallel()
        if F.scaled_dot_product_attention not in attention._replaced_functions:
            return None  # outside of the context nothing is cut
        mesh = sys.modules["accelerate.state"].AcceleratorState._shared_state["device_mesh"]
        group, order = mesh["cp"].get_group(), None
        if attention._cp_options.enable_load_balance:
            order = _head_and_tail(rows, group).to(labels.device)
    elif training:
        groups = import_module("deepspeed.utils").groups
        group, order = groups._get_sequence_parallel_group(), None
    else:
        return None
    facts = {"the number of rows": tuple(labels.shape)}
    collectives.agree(group, "accelerate's group", "apply_iqlearn", facts, labels.device)
    cut = Cut("sequence_group", group, -1, order)
    return Part(cut, rows * dist.get_world_size(group))


def _context_parallel() -> Any:
    """What torch's ``context_parallel`` sees, in a module that moves between versions."""
    from torch.distributed.tensor.experimental import context_parallel

    seen = SimpleNamespace(**inspect.unwrap(context_parallel).__globals__)
    if not (hasattr(seen, "_replaced_functions") and hasattr(seen, "_cp_options")):
        raise NotImplementedError(
            f"cp_size > 1 with torch {torch.__version__}: its context_parallel does not say in "
            "which order it cuts sequences; accepted: torch 2.11 to 2.13, or cp_size=1"
        )
    return seen


def _head_and_tail(rows: int, group: Any) -> Tensor:
    """The index in the whole of the rows here: rank k has pieces k and 2 r - 1 - k of 2 r."""
    rank, ranks, piece = dist.get_rank(group), dist.get_world_size(group), rows // 2
    index = torch.arange(piece)
    return torch.cat([index + rank * piece, index + (2 * ranks - 1 - rank) * piece])


@outside_of_graphs
def segment_ids(inputs: dict[str, Any], part: Part) -> Tensor | None:
    """``irl_ops.integrations.batches.segment_ids`` of the whole sequence, at the rows here.

    Where a document starts is told by a row and the one before it, which another rank may have.
    """
    labels = inputs["labels"]
    marks = {
        name: x
        for name in ("position_ids", "attention_mask")
        if isinstance(x := inputs.get(name), Tensor) and x.shape[-1] == labels.shape[-1]
    }
    if any(x.ndim != 2 for x in marks.values()):
        raise NotImplementedError(
            "position_ids or an attention_mask that are no [B, T], over ranks that have parts of "
            "the sequences; accepted: those of [B, T], or cp_size=1 and sp_size=1"
        )
    whole = dict(inputs)
    if marks:
        axes = (-1,) * len(marks)
        _, _, *found = Gather.apply(part.cut, 0, False, axes, *marks.values())  # type: ignore[no-untyped-call]
        whole |= zip(marks, found, strict=True)
    whole["labels"] = labels.new_empty(()).expand(labels.shape[0], part.rows)
    ids = batches.segment_ids(whole)
    return None if ids is None else own(part.cut, ids, -1)


class Shared(torch.autograd.Function):
    """A loss that all ranks of a group have, and that each of them puts into a loss of its own.

    What is meant is the sum over ranks of what they make of it: the loss's gradient is the sum of
    theirs, whatever the weight that a trainer gives to each rank.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: Any) -> Tensor:
        """As it is."""
        ctx.group = group
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        """The sum over the group; 4 bytes, and no host waits."""
        total = above.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@outside_of_graphs
def share_of(loss: Tensor, part: Part, summed: bool) -> Tensor:
    """What a rank returns of a loss [] of the whole, where gradients are averaged over ranks.

    Args:
        loss: of the whole sequences, alike on all ranks.
        part: what is here.
        summed: whether the ranks' losses are added up, as where ``num_items_in_batch`` counts for
            all; otherwise they are averaged.
    """
    shared: Tensor = Shared.apply(loss, part.cut.group)  # type: ignore[no-untyped-call]
    return shared / part.ranks if summed else shared
