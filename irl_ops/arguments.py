"""Which arguments the losses accept, for the arrays of any framework.

Bad input raises at once, and the message names the argument, what came and what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

Boundary = Literal["terminal", "bootstrap", "drop"]
Reduction = Literal["mean", "sum", "none"]


class Arguments:
    """The checks; a framework says what its arrays are.

    Attributes:
        array: what an array is called, such as "torch.Tensor".
        noun: the same in a sentence, "tensor" or "array".
        floats: dtypes of logits and values.
        integers: dtypes of labels and segments.
        weights: dtypes of token weights.
        flags: dtypes of masks.
    """

    array: str
    noun: str
    floats: tuple[Any, ...]
    integers: tuple[Any, ...]
    weights: tuple[Any, ...]
    flags: tuple[Any, ...]

    def is_array(self, x: Any) -> bool:
        """Whether ``x`` is an array of the framework."""
        raise NotImplementedError

    def is_real(self, x: Any) -> bool:
        """Whether an array holds floats or integers."""
        raise NotImplementedError

    def check_place(self, name: str, x: Any, other: Any) -> None:
        """``x`` is where ``other`` is, in frameworks whose arrays have a place."""

    def check_constant(self, name: str, x: Any) -> None:
        """No gradient by ``x`` is asked for, in frameworks that can tell beforehand."""

    def check_logits(self, logits: Any, labels: Any) -> None:
        """Logits ``[..., T, V]`` in a float dtype, labels ``[..., T]`` in an integer one."""
        self._check_array("logits", logits, self.floats)
        self._check_array("labels", labels, self.integers)
        if logits.ndim < 2 or logits.shape[-1] == 0:
            raise ValueError(
                f"logits has shape {list(logits.shape)}; accepted: [..., T, V] with V of 1 or more"
            )
        rows = logits.shape[:-1]
        _check_shape("labels", labels, rows, "the shape of logits without its last axis")
        self.check_place("labels", labels, logits)

    def check_sequence(
        self,
        labels: Any,
        *,
        ignore_index: Any,
        where: Any,
        shift: Any,
        segment_ids: Any,
        position_ids: Any,
        cu_seqlens: Any,
        eos_token_id: Any,
        boundary: Any,
        truncated: Any,
    ) -> None:
        """The options that say which row follows which."""
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise TypeError(f"ignore_index is {ignore_index!r}; accepted: an int")
        self.check_switches(shift=shift)
        markers = dict(segment_ids=segment_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
        given = [name for name, marker in markers.items() if marker is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given; accepted: at most one of {', '.join(markers)}"
            )
        for name in ("segment_ids", "position_ids"):
            if markers[name] is not None:
                self._check_rows(name, markers[name], labels, self.integers)
        if cu_seqlens is not None:
            self._check_array("cu_seqlens", cu_seqlens, self.integers)
            self.check_place("cu_seqlens", cu_seqlens, labels)
            if labels.ndim != 1 or cu_seqlens.ndim != 1:
                raise ValueError(
                    f"cu_seqlens has shape {list(cu_seqlens.shape)} and labels "
                    f"{list(labels.shape)}; accepted: cu_seqlens [S+1] with logits [N, V], "
                    "labels [N]"
                )
        if where is not None:
            self._check_rows("where", where, labels, self.flags)
        if truncated is not None:
            self.check_flags("truncated", truncated, labels)
        _check_choice("boundary", boundary, get_args(Boundary))
        if eos_token_id is not None and not _is_token(eos_token_id):
            tokens = eos_token_id
            if not isinstance(tokens, Sequence) or not tokens or not all(map(_is_token, tokens)):
                raise TypeError(
                    f"eos_token_id is {eos_token_id!r}; accepted: an int, a sequence of ints, None"
                )

    def check_weights(
        self, labels: Any, *, token_weights: Any, num_items: Any, reduction: Any
    ) -> None:
        """The options that say how rows are averaged; ``num_items`` as one number or a tuple."""
        _check_choice("reduction", reduction, get_args(Reduction))
        if token_weights is not None:
            self._check_rows("token_weights", token_weights, labels, self.weights)
            self.check_constant("token_weights", token_weights)
        if num_items is None:
            return
        if reduction != "mean":
            raise ValueError(f"num_items is given with reduction={reduction!r}; accepted: 'mean'")
        for items in num_items if isinstance(num_items, tuple) else (num_items,):
            self.check_scalar("num_items", items, labels, 0, math.inf)

    def check_pair(self, num_items: Any) -> None:
        """``num_items`` of a loss over two groups."""
        pair = isinstance(num_items, tuple | list) and len(num_items) == 2
        if num_items is not None and not pair:
            raise TypeError(
                f"num_items is {num_items!r}; accepted: the pair (expert, agent), or None"
            )

    def check_values(self, labels: Any, *, next_values: Any, values: Any) -> None:
        """The arrays of values, float ``[..., T]``."""
        for name, x in (("next_values", next_values), ("values", values)):
            if x is not None:
                self._check_rows(name, x, labels, self.floats)

    def check_scalar(
        self, name: str, x: Any, logits: Any, low: float, high: float, *, open_end: bool = False
    ) -> None:
        """A number within [low, high], or a 0-d array, whose value is not looked at."""
        if self.is_array(x):
            if x.ndim != 0:
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; accepted: a number, a 0-d {self.noun}"
                )
            if not self.is_real(x):
                article = "an" if self.noun == "array" else "a"
                raise TypeError(
                    f"{name} is {x.dtype}; accepted: {article} {self.noun} of floats or integers"
                )
            if self.is_array(logits):
                self.check_place(name, x, logits)
            self.check_constant(name, x)
            return
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise TypeError(f"{name} is {x!r}; accepted: a number or a 0-d {self.noun}")
        open_end = open_end or high == math.inf
        if not math.isfinite(x) or not (low <= x < high if open_end else low <= x <= high):
            end = ")" if open_end else "]"
            raise ValueError(f"{name} is {x}; accepted: [{low}, {high}{end}")

    def check_switches(self, **switches: Any) -> None:
        """Options that are True or False."""
        for name, x in switches.items():
            if not isinstance(x, bool):
                raise TypeError(f"{name} is {x!r}; accepted: True or False")

    def check_flags(self, name: str, x: Any, labels: Any) -> None:
        """A bool a sequence or a bool a row."""
        if self.is_array(x) and x.shape == labels.shape[:-1] and x.dtype in self.flags:
            return self.check_place(name, x, labels)
        return self._check_rows(name, x, labels, self.flags, "or that without its last axis")

    def _check_rows(
        self, name: str, x: Any, labels: Any, dtypes: Sequence[Any], also: str = ""
    ) -> None:
        """An array of the labels' shape and place."""
        self._check_array(name, x, dtypes)
        _check_shape(name, x, labels.shape, f"the shape of labels {also}".strip())
        self.check_place(name, x, labels)

    def _check_array(self, name: str, x: Any, dtypes: Sequence[Any]) -> None:
        if not self.is_array(x):
            raise TypeError(f"{name} is a {type(x).__name__}; accepted: a {self.array}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} is {x.dtype}; accepted: {', '.join(map(str, dtypes))}")


def _is_token(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check_choice(name: str, x: Any, choices: Sequence[str]) -> None:
    if x not in choices:
        raise ValueError(f"{name} is {x!r}; accepted: {', '.join(map(repr, choices))}")


def _check_shape(name: str, x: Any, shape: Sequence[int], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {list(shape)}, {meaning}")
