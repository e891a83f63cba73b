"""What a trainer's batch says: where documents start, which labels count, and how they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def segment_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """What marks the documents of a packed batch, as ids [B, T]; None if nothing does.

    It reads ``seq_idx`` or ``cu_seq_lens_q``, or else ``position_ids`` and ``attention_mask``
    together: a document starts where positions do not increase by one, where the mask changes from
    one of its ids 1..n to another (Axolotl and LLaMA-Factory number documents in it), and where a
    mask [B, 1, T, T] keeps a row from the row before.

    Positions start no document beside padding: a left-padded row has positions 1 1 1 0 1 2, and in
    Transformers its last padding predicts the first token. For the same reason the 0 of a mask
    counts as 1.
    """
    labels, mask, seq_idx = inputs["labels"], inputs.get("attention_mask"), inputs.get("seq_idx")
    if isinstance(seq_idx, Tensor):
        return seq_idx
    if (ends := inputs.get("cu_seq_lens_q")) is not None:
        rows = torch.arange(labels.shape[-1], device=ends.device, dtype=ends.dtype)
        return torch.searchsorted(ends[1:].contiguous(), rows, right=True)[None]
    if not isinstance(mask, Tensor) or mask.shape[-1] != labels.shape[-1]:
        mask = None  # a prefix before the tokens makes it longer
    starts = None
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 2:  # 3-d: time, height and width, for images
        starts = positions.diff() != 1
        if mask is not None and mask.ndim == 2:
            starts = starts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if mask is not None and (parted := _parted(mask)) is not None:
        starts = parted if starts is None else starts | parted
    if starts is None:
        return None
    return F.pad(starts.cumsum(-1), (1, 0)).expand(labels.shape[0], -1)


def _parted(mask: Tensor) -> Tensor | None:
    """Whether row t + 1 is of another document than row t, [B, T - 1]; None if no mask says so."""
    if mask.ndim == 2 and mask.dtype in (torch.int32, torch.int64):
        return mask.clamp(min=1).diff() != 0
    if mask.ndim == 4 and mask.shape[-1] == mask.shape[-2]:
        before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)  # what t + 1 sees of t
        return ~before if mask.dtype == torch.bool else before < 0
    return None


def count_labels(
    batch: Mapping[str, Any] | Tensor, *, shift: bool, ignore_index: int = -100
) -> Tensor:
    """How many rows carry a label, 0-d: what a sum over them has to be divided by.

    With ``shift`` the first label of each document is scored by no row, and is not counted.

    Args:
        batch: labels [B, T], or a mapping that has them as "labels" beside what marks documents
            (``segment_ids``, or what ``segment_ids()`` of this module reads).
        shift: whether the labels are still to be shifted, as in Hugging Face's convention.
        ignore_index: the label of rows that carry none.
    """
    if not isinstance(batch, Mapping):
        batch = {"labels": batch}
    labelled: Tensor = batch["labels"] != ignore_index
    if shift:
        segments = batch.get("segment_ids")
        if segments is None:
            segments = segment_ids(batch)
        labelled = labelled[..., 1:]
        if segments is not None:
            labelled = labelled & (segments.diff() == 0)
    return labelled.sum()


def check_alignment(ids: Tensor, labels: Tensor, *, shift: bool, ignore_index: int = -100) -> None:
    """Raises where labels [B, T] lie one row away from what the loss will take them for.

    It compares them with the tokens ``ids`` [B, T]: unshifted labels are the tokens themselves,
    shifted ones the tokens one row later. Labels that are neither, or both, pass. It waits for the
    device, so it is for a first step.

    Raises:
        ValueError: the labels are shifted where they should not be, or not where they should.
    """
    if ids.shape != labels.shape or torch.compiler.is_compiling():
        return
    labelled = labels != ignore_index
    here = ((labels == ids) | ~labelled).all()
    ahead = ((labels[:, :-1] == ids[:, 1:]) | ~labelled[:, :-1]).all() & labelled[:, :-1].any()
    same, next_one = torch.stack([here & labelled.any(), ahead]).tolist()
    if shift and next_one and not same:
        raise ValueError(
            "labels[:, t] == input_ids[:, t + 1] throughout the batch: the labels are shifted "
            "already, and would be shifted a second time; accepted: labels[:, t] == "
            "input_ids[:, t], with -100 where there is none"
        )
    if not shift and same and not next_one:
        raise ValueError(
            "labels == input_ids throughout the batch: the labels are not shifted, and each row "
            "would predict its own token; accepted: labels[:, t] == input_ids[:, t + 1]"
        )
