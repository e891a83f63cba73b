"""The options of a loss as the stages take them, each named once; arrays have shape ``[..., T]``.

What the fields mean is said where users meet them, in ``irl_ops.torch.iqlearn_loss``. A record is
normalised: ``eos_token_id`` is a tuple, and a term that is absent is None, not 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
Scalar = Any  # a Python number or a 0-d array


class Sequence(NamedTuple):
    """Which rows carry a label, and which row follows which."""

    ignore_index: int = -100
    shift: bool = False
    eos_token_id: tuple[int, ...] | None = None
    boundary: str = "terminal"
    where: Array | None = None  # bool
    segment_ids: Array | None = None
    position_ids: Array | None = None
    cu_seqlens: Array | None = None  # [S + 1]
    truncated: Array | None = None  # bool, or [...]: one flag per sequence


class Weighting(NamedTuple):
    """How rows are averaged."""

    token_weights: Array | None = None
    num_items: tuple[Scalar, Scalar] | None = None  # of the expert's rows, of the agent's
    reduction: str = "mean"


class Terms(NamedTuple):
    """A loss: the weight of each term in a row, in units of the row's share w/N.

    ``mle``, ``td`` and ``agent_td`` are numbers, or arrays with a number per row. MLE is
    ``Terms()``, offline IQLearn ``Terms(td=lam, gamma=gamma)``.
    """

    mle: Scalar | Array = 1.0  # of the expert's rows, which are all where is_expert is None
    td: Scalar | Array | None = None  # None: the loss has no TD term at all
    agent_td: Scalar | Array = 0.0
    is_expert: Array | None = None  # bool, or [...]: one flag per sequence
    gamma: Scalar = 1.0
    entropy_coef: Scalar | None = None
    z_loss: Scalar | None = None


class Heads(NamedTuple):
    """Where values come from, other than the logits."""

    values: Array | None = None
    next_values: Array | None = None
    detach_next: bool = False
