"""The options of a run, tried before there is a batch."""

from __future__ import annotations

from typing import Any

import torch

from irl_ops.torch import iqlearn_loss


def try_options(options: dict[str, Any]) -> None:
    """Two rows through ``iqlearn_loss``, which raises for values that it does not accept.

    The model's vocabulary is not known here: these rows have columns for all end tokens.
    """
    ends = options.get("eos_token_id")
    listed = ends if isinstance(ends, list | tuple) else [ends]
    columns = 1 + max((token for token in listed if isinstance(token, int)), default=1)
    logits = torch.zeros(1, 2, max(columns, 2))
    iqlearn_loss(logits, torch.zeros(1, 2, dtype=torch.long), **options)
