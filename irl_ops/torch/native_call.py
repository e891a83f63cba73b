"""A call's records as the C++ code takes them."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.algebra import Heads, Sequence, Terms, Weighting
from irl_ops.call import Call, StatsCall
from irl_ops.torch import native
from irl_ops.torch.arguments import arguments


def fields_of(call: Call | StatsCall, labels: Tensor) -> Fields:
    """The options of a whole call; calls without arrays share those of an equal one."""
    return _plain_fields(call) if call.plain else _all_fields(call, labels.shape)


def _all_fields(call: Call | StatsCall, shape: torch.Size) -> Fields:
    fields = Fields(shape)
    fields.sequence(call.sequence)
    fields.heads(call.heads)
    if isinstance(call, Call):
        fields.weighting(call.weighting)
        fields.terms(call.terms)
    else:
        fields.call.gamma = float(call.gamma)
    return fields


@functools.lru_cache(256)
def _plain_fields(call: Call | StatsCall) -> Fields:
    return _all_fields(call, torch.Size())


class Fields:
    """The options of a call in C++, and the tensors that have to live as long."""

    def __init__(self, shape: torch.Size) -> None:
        self.call: Any = native._native.Call()
        self.shape = shape  # of the labels
        self.kept: list[Tensor] = []

    def address(self, x: Tensor, dtype: torch.dtype) -> int:
        """The address of the array's elements, contiguous and in that dtype."""
        self.kept.append(x := contiguous(x, dtype))
        return x.data_ptr()

    def array(self, name: str, x: Tensor | None, dtype: torch.dtype) -> None:
        """A field that is an address, 0 where there is no array."""
        if x is not None:
            setattr(self.call, name, self.address(x, dtype))

    def flags(self, name: str, x: Tensor | None) -> None:
        """One flag per row, or one per sequence."""
        if x is not None:
            by_row = x.shape == self.shape
            getattr(self.call, f"set_{name}")(self.address(x, torch.bool), by_row)

    def numbers(self, name: str, x: Any) -> None:
        """A number, or one per row."""
        if isinstance(x, Tensor) and x.ndim > 0:
            rows = x.expand(self.shape)
            getattr(self.call, f"set_{name}")(0.0, self.address(rows, torch.float32))
        else:
            getattr(self.call, f"set_{name}")(float(x), 0)

    def sequence(self, given: Sequence) -> None:
        """Which row follows which."""
        self.call.ignore_index, self.call.shift = given.ignore_index, given.shift
        self.call.boundary = given.boundary
        if given.eos_token_id is not None:
            self.call.eos_token_id = given.eos_token_id
        if given.cu_seqlens is not None:
            self.call.cu_seqlens = given.cu_seqlens.tolist()
        self.array("where", given.where, torch.bool)
        self.array("segment_ids", given.segment_ids, torch.int64)
        self.array("position_ids", given.position_ids, torch.int64)
        self.flags("truncated", given.truncated)

    def weighting(self, given: Weighting) -> None:
        """How rows are averaged."""
        self.call.mean = given.reduction == "mean"
        self.array("token_weights", given.token_weights, torch.float32)
        if given.num_items is not None:
            expert, agent = given.num_items
            self.call.set_num_items(float(expert), float(agent))

    def terms(self, given: Terms) -> None:
        """The weights of the terms."""
        self.numbers("mle", given.mle)
        if given.td is not None:
            self.call.has_td = True
            self.numbers("td", given.td)
            self.numbers("agent_td", given.agent_td)
        self.flags("is_expert", given.is_expert)
        self.call.gamma = float(given.gamma)
        if given.entropy_coef is not None:
            self.call.set_entropy_coef(float(given.entropy_coef))
        if given.z_loss is not None:
            self.call.set_z_loss(float(given.z_loss))

    def heads(self, given: Heads) -> None:
        """Where values come from, other than the logits."""
        self.array("values", given.values, torch.float32)
        self.array("next_values", given.next_values, torch.float32)
        self.call.detach_next = given.detach_next


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The array as the C++ code takes it; itself where it is so already."""
    if x.dtype is dtype and x.is_contiguous():
        return x
    return x.detach().to(dtype).contiguous()


def row_vector(labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for a number per row, contiguous."""
    return torch.empty_like(labels, dtype=dtype, memory_format=torch.contiguous_format)


def readout_of(call: Call | StatsCall) -> tuple[float, float]:
    """How logits become Q-values, 0 standing for no soft cap."""
    scale, cap = call.readout
    return scale, cap or 0.0


def refuse_label(row: int, labels: Tensor, logits: Tensor, sequence: Sequence) -> NoReturn:
    """The IndexError for the label of that row."""
    aligned = torch.zeros(labels.shape, dtype=torch.int64)
    aligned.view(-1)[row] = algebra.BAD_LABEL
    arguments.refuse_label(aligned, labels, logits.shape[-1], sequence)
