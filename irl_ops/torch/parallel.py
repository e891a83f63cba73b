"""Where a call's logits are: which columns and which rows of the batch this process holds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from irl_ops.call import Parallel
from irl_ops.measures import Measures
from irl_ops.options import Function
from irl_ops.torch.arguments import TorchArguments
from irl_ops.torch.collectives import Group

REASON = "irl_ops: the ranks of a group meet outside of compiled graphs"


def outside_of_graphs(function: Function) -> Function:
    """For the functions of parallel calls: a compiler ends its graph there, and begins another.

    As ``torch.compiler.disable``, which would import the compiler, and Triton with it.
    """

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **named)
        return _disabled(function)(*args, **named)

    vars(run).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=REASON)
    return run  # type: ignore[return-value]


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compiler.disable(function, reason=REASON)  # type: ignore[no-untyped-call]
    return found


ANY_LABEL = 2**31 - 1  # the number of columns while it is not known


class Columns(NamedTuple):
    """The columns ``start`` to ``start + width`` of the vocabulary; padding is behind them."""

    group: Group
    start: int
    width: int
    size: int | None  # of the whole vocabulary without padding; None: what the shards add up to


class Cut(NamedTuple):
    """One axis of the rows that is cut among processes."""

    name: str  # for messages
    group: Group
    axis: int  # of the rows [..., T], from their end: -1 is T
    order: Tensor | None = None  # index in the whole sequence of the rows here; None: contiguous
    sizes: tuple[int, ...] | None = None  # rows of each rank; None: alike


class Shards(NamedTuple):
    """What this process holds of a call's logits."""

    columns: Columns | None
    cuts: tuple[Cut, ...]

    @property
    def groups(self) -> tuple[tuple[str, Group], ...]:
        """The groups and their names, each rank's in the same order."""
        own = () if self.columns is None else (("vocab_group", self.columns.group),)
        return own + tuple((cut.name, cut.group) for cut in self.cuts)


class ParallelArguments(TorchArguments):
    """The checks for one process's part of the logits, of which there may be no column.

    Attributes:
        rows: the length of the whole sequence, which ``cu_seqlens`` are offsets of.
        columns: how many of the vocabulary are here, padding included.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns = 0

    def remembers(self) -> bool:
        """Each call has an object of its own."""
        return False

    def check_logits(self, logits: Any, labels: Any) -> None:
        """``logits`` stand for the shape of the whole; they themselves were checked before."""
        self._check_array("labels", labels, self.integers)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; accepted: {list(logits.shape[:-1])}, the "
                "rows that are here"
            )
        self.check_place("labels", labels, logits)

    def check_local(self, logits: Any, labels: Any) -> None:
        """The logits that are here: ``[..., T, V]``, V may be 0; and their labels."""
        self._check_array("logits", logits, self.floats)
        if logits.ndim < 2:
            raise ValueError(f"logits has shape {list(logits.shape)}; accepted: [..., T, V]")
        if logits.shape[-1]:
            super().check_logits(logits, labels)
        else:
            self.check_logits(logits, labels)

    def measures(self, logits: Any, labels: Any, given: Measures) -> tuple[Any, Measures]:
        """The checks of all frameworks; a mask is one of the columns that are here."""
        return super().measures(Whole(logits, self.columns), labels, given)

    def check_elements(self, temperature: Any) -> None:
        """Later: other ranks have other rows, and would wait for one that raises alone."""

    def _check_offsets(self, cu_seqlens: Any, labels: Any) -> None:
        whole = labels if labels.ndim != 1 else labels.new_empty(()).expand(self.rows)
        super()._check_offsets(cu_seqlens, whole)


class Whole:
    """The shape and place of the whole of logits, or hidden states, that are on many devices."""

    def __init__(self, here: Any, columns: int) -> None:
        self.shape = (*here.shape[:-1], columns)
        self.ndim, self.dtype, self.device = len(self.shape), here.dtype, here.device


def is_parallel(logits: Any, options: dict[str, Any]) -> bool:
    """Whether a call says that other processes have parts of its logits."""
    named = options and any(options.get(name) is not None for name in Parallel._fields)
    return bool(named) or is_dtensor(logits)


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor; who has one has imported its module, which takes time."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def shards_of(given: Parallel, columns: int, labels: Tensor) -> Shards:
    """What the options say of this process's ``columns`` and rows.

    Raises:
        TypeError, ValueError: an option's type or value, or one without its group.
    """
    cuts: tuple[Cut, ...] = ()
    if given.sequence_group is not None:
        group = process_group("sequence_group", given.sequence_group)
        order = given.sequence_order
        if order is not None:
            _check_order(order, labels)
        cuts = (Cut("sequence_group", group, -1, order),)
    elif given.sequence_order is not None:
        raise ValueError("sequence_order is given without sequence_group; accepted: both, or none")
    for name in ("vocab_start", "vocab_size"):
        x = getattr(given, name)
        if x is None:
            continue
        if given.vocab_group is None:
            raise ValueError(f"{name} is given without vocab_group; accepted: both, or none")
        least = 0 if name == "vocab_start" else 1
        if not isinstance(x, int) or isinstance(x, bool) or x < least:
            raise ValueError(f"{name} is {x!r}; accepted: an int of {least} or more, None")
    if given.vocab_group is None:
        return Shards(None, cuts)
    group = process_group("vocab_group", given.vocab_group)
    start = given.vocab_start
    if start is None:
        start = dist.get_rank(group) * columns
    return Shards(columns_at(group, start, columns, given.vocab_size), cuts)


def columns_at(group: Group, start: int, columns: int, size: int | None) -> Columns:
    """The columns of this process, without those of padding."""
    return Columns(
        group, start, columns if size is None else max(0, min(columns, size - start)), size
    )


def process_group(name: str, given: Any) -> Group:
    """The group that an option names.

    Raises:
        TypeError: neither a process group nor a mesh.
        ValueError: a mesh of several dimensions, or a group without this process.
    """
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"{name} is a mesh of {given.ndim} dimensions; accepted: one, such as mesh['tp']"
            )
        return given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(
            f"{name} is {given!r}; accepted: a torch.distributed.ProcessGroup, a DeviceMesh of one "
            "dimension, None"
        )
    if dist.get_rank(given) < 0:
        raise ValueError(f"{name} is a group without this process; accepted: a group with it")
    return given


def whole_columns(shards: Shards, here: int) -> int:
    """The number of columns of the vocabulary, ANY_LABEL where the shards have yet to say."""
    return here if shards.columns is None else shards.columns.size or ANY_LABEL


def whole_rows(shards: Shards, labels: Tensor) -> int:
    """The number of rows along T in the whole sequence."""
    rows = labels.shape[-1]
    for cut in shards.cuts:
        if cut.axis == -1:
            rows = sum(cut.sizes) if cut.sizes else rows * dist.get_world_size(cut.group)
    return rows


def _check_order(order: Any, labels: Any) -> None:
    if not isinstance(order, Tensor) or order.dtype not in (torch.int32, torch.int64):
        what = order.dtype if isinstance(order, Tensor) else f"a {type(order).__name__}"
        raise TypeError(f"sequence_order is {what}; accepted: a tensor of int32 or int64")
    shape = list(labels.shape)
    if list(order.shape) not in (shape, shape[-1:]):
        raise ValueError(
            f"sequence_order has shape {list(order.shape)}; accepted: {shape[-1:]} or {shape}, "
            "the index in the whole sequence of every row that is here"
        )
    if order.device != labels.device:
        raise ValueError(
            f"sequence_order is on {order.device}; accepted: {labels.device}, where the labels are"
        )
