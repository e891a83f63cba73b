"""Where documents start, by all that a batch of Transformers may mark them with; in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irl_ops.debug.arrays import as_is


def documents(batch: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """Ids [B, T] of ``batch["labels"]``'s rows; None where nothing marks them.

    ``seq_idx`` or ``cu_seq_lens_q`` say it; or else positions that do not increase by one, and an
    ``attention_mask`` that numbers documents 1..n. Beside padding (mask 0) no document starts: the
    last padding on the left scores the first token.
    """
    seq_idx, ends = batch.get("seq_idx"), batch.get("cu_seq_lens_q")
    shape = tuple(int(n) for n in batch["labels"].shape)
    if seq_idx is not None:
        return np.broadcast_to(np.asarray(as_is(seq_idx), np.int64), shape)
    if ends is not None:
        rows = np.searchsorted(as_is(ends)[1:], np.arange(shape[-1]), side="right")
        return np.broadcast_to(rows, shape)
    mask, positions = as_is(batch.get("attention_mask")), as_is(batch.get("position_ids"))
    if mask is None or mask.shape != shape or mask.dtype.kind not in "iu":
        mask = np.ones(shape, np.int64)
    beside = (mask[..., 1:] != 0) & (mask[..., :-1] != 0)
    starts = beside & (np.diff(mask, axis=-1) != 0)
    known = bool(mask.max(initial=1) > 1)
    if positions is not None and positions.ndim == 2:  # 3-d: time, height and width, for images
        starts = starts | (beside & (np.diff(np.broadcast_to(positions, shape), axis=-1) != 1))
        known = True
    first = np.zeros((*shape[:-1], 1), np.int64)
    return np.concatenate([first, starts.cumsum(-1)], -1) if known else None
