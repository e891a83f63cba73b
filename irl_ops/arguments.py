"""Which arguments the losses accept, for the arrays of any framework.

Bad input raises at once, and the message names the argument, what came and what is accepted. What
is accepted comes back normalised: plain numbers, end tokens as a tuple.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence as ListOf
from typing import Any, get_args

from irl_ops.algebra.options import Heads, Sequence, Weighting
from irl_ops.measures import EXTRAS, Measures
from irl_ops.options import Boundary, Reduction
from irl_ops.readout import Readout

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32, without subnormal numbers


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

    def remembers(self) -> bool:
        """Whether what numbers and names were read as is kept for the next call."""
        return False

    def peek(self, x: Any) -> float | None:
        """The value of a 0-d array, where looking costs nothing; None elsewhere."""
        return None

    def known(self, name: str, x: Any) -> float:
        """The value of a 0-d array that a kernel is made for, wherever it lies."""
        return float(x)

    def peek_list(self, x: Any) -> list[int] | None:
        """The values of a short array of integers, likewise."""
        return None

    def check_logits(self, logits: Any, labels: Any) -> None:
        """Logits ``[..., T, V]`` in a float dtype, labels ``[..., T]`` in an integer one."""
        self._check_array("logits", logits, self.floats)
        self._check_array("labels", labels, self.integers)
        shape = logits.shape
        if len(shape) < 2 or shape[-1] == 0:
            raise ValueError(
                f"logits has shape {list(shape)}; accepted: [..., T, V] with V of 1 or more"
            )
        _check_shape("labels", labels, shape[:-1], "the shape of logits without its last axis")
        self.check_place("labels", labels, logits)

    def sequence(self, labels: Any, vocab: int, given: Sequence) -> Sequence:
        """The options that say which row follows which; end tokens as a tuple."""
        if not isinstance(given.ignore_index, int) or isinstance(given.ignore_index, bool):
            raise TypeError(f"ignore_index is {given.ignore_index!r}; accepted: an int")
        self.check_switches(shift=given.shift)
        names = ("segment_ids", "position_ids", "cu_seqlens")
        marked = [name for name in names if getattr(given, name) is not None]
        if len(marked) > 1:
            raise ValueError(
                f"{' and '.join(marked)} are given; accepted: at most one of {', '.join(names)}"
            )
        if given.segment_ids is not None:
            self._check_rows("segment_ids", given.segment_ids, labels, self.integers)
        if given.position_ids is not None:
            self._check_rows("position_ids", given.position_ids, labels, self.integers)
        if given.cu_seqlens is not None:
            self._check_offsets(given.cu_seqlens, labels)
        if given.where is not None:
            self._check_rows("where", given.where, labels, self.flags)
        if given.truncated is not None:
            self.check_flags("truncated", given.truncated, labels)
        _check_choice("boundary", given.boundary, get_args(Boundary))
        if given.eos_token_id is None:
            return given
        return given._replace(eos_token_id=_tokens(given.eos_token_id, vocab))

    def weighting(self, labels: Any, given: Weighting, pair: bool) -> Weighting:
        """The options that say how rows are averaged; ``num_items`` as a pair."""
        _check_choice("reduction", given.reduction, get_args(Reduction))
        if given.token_weights is not None:
            self._check_rows("token_weights", given.token_weights, labels, self.weights)
            self.check_constant("token_weights", given.token_weights)
        items: Any = given.num_items
        if items is None:
            return given
        if pair and not (isinstance(items, tuple | list) and len(items) == 2):
            raise TypeError(f"num_items is {items!r}; accepted: the pair (expert, agent), or None")
        if given.reduction != "mean":
            raise ValueError(
                f"num_items is given with reduction={given.reduction!r}; accepted: 'mean'"
            )
        if pair:
            first, second = (self.number("num_items", x, labels, 0, math.inf) for x in items)
        else:
            first = second = self.number("num_items", items, labels, 0, math.inf)
        return given._replace(num_items=(first, second))

    def check_given(self, name: str, x: Any, labels: Any) -> None:
        """Floats ``[..., T]`` that another model computed, or this one before."""
        self._check_rows(name, x, labels, self.weights)
        self.check_constant(name, x)

    def heads(self, labels: Any, given: Heads) -> Heads:
        """The arrays of values, float ``[..., T]``."""
        self.check_switches(detach_next=given.detach_next)
        if given.values is not None:
            self._check_rows("values", given.values, labels, self.weights)
        if given.next_values is not None:
            self._check_rows("next_values", given.next_values, labels, self.weights)
        return given

    def readout(self, logits: Any, given: Readout, temperature: Any = 1.0) -> Readout:
        """The options that say how logits become Q-values, as numbers; divided by a temperature."""
        scale, cap = given
        read = Readout(
            self._positive("logit_scale", scale, logits),
            None if cap is None else self._positive("softcap", cap, logits, ", or None"),
        )
        heat = self._positive("temperature", temperature, logits)
        if heat == 1:
            return read
        read = read.over(heat)
        self._positive("logit_scale / temperature", read.logit_scale, logits)
        if read.softcap is not None:
            self._positive("softcap / temperature", read.softcap, logits)
        return read

    def measures(self, logits: Any, labels: Any, given: Measures) -> tuple[Any, Measures]:
        """A temperature of all rows, and what is asked for beside the plain statistics.

        A 0-d temperature is a number where looking costs nothing, and elsewhere one of each row.
        """
        heat, by_row = given.temperature, None
        if self.is_array(heat):
            heat, by_row = self._temperatures(heat, logits, labels)
        if by_row is None and given.keep_above is not None and heat != 1:
            # thresholds are compared with what is not yet divided
            heat, by_row = 1.0, self._positive("temperature", heat, logits)
        self.check_switches(entropy_grad=given.entropy_grad)
        if given.extra_ids is not None:
            self._check_ids(given.extra_ids, labels)
        if given.keep_mask is not None:
            self._check_array("keep_mask", given.keep_mask, self.flags)
            _check_shape("keep_mask", given.keep_mask, logits.shape, "the shape of logits")
            self.check_place("keep_mask", given.keep_mask, labels)
        if given.keep_above is not None:
            self._check_rows("keep_above", given.keep_above, labels, self.weights)
            self.check_constant("keep_above", given.keep_above)
        return heat, given._replace(temperature=by_row, extras=_extras(given.extras))

    def _temperatures(self, heat: Any, logits: Any, labels: Any) -> tuple[Any, Any]:
        """The number of all rows and None, or 1 and the array."""
        if heat.ndim == 0:
            _, seen = self._scalar("temperature", heat, logits)
            return (1.0, heat) if seen is None else (seen, None)
        self._check_rows("temperature", heat, labels, self.weights, "(or a number)")
        self.check_constant("temperature", heat)
        self.check_elements(heat)
        return 1.0, heat

    def check_elements(self, temperature: Any) -> None:
        """Those of a temperature by row are above 0, where looking costs nothing."""
        for x in self.peek_list(temperature.reshape(-1)) or ():
            if not x > 0:
                raise ValueError(f"temperature has the element {x}; accepted: numbers above 0")

    def _check_ids(self, ids: Any, labels: Any) -> None:
        self._check_array("extra_ids", ids, self.integers)
        if ids.ndim != labels.ndim + 1 or ids.shape[:-1] != labels.shape:
            raise ValueError(
                f"extra_ids has shape {list(ids.shape)}; accepted: {[*labels.shape, 'K']}, the "
                "shape of labels and the number of ids"
            )
        self.check_place("extra_ids", ids, labels)

    def number(
        self, name: str, x: Any, logits: Any, low: float, high: float, *, open_end: bool = False
    ) -> Any:
        """A number within [low, high], or a 0-d array: looked at where that costs nothing."""
        x, seen = self._scalar(name, x, logits)
        if seen is None:
            return x
        # comparisons alone: under a compiler the number may be a symbol
        inside = low <= seen < high if open_end else low <= seen <= high
        if not (inside and -math.inf < seen < math.inf):
            end = ")" if open_end or high == math.inf else "]"
            raise ValueError(f"{name} is {seen}; accepted: [{low}, {high}{end}")
        return x

    def _positive(self, name: str, x: Any, logits: Any, also: str = "") -> Any:
        """A number above 0 that float32, which kernels compute in, has too."""
        x, seen = self._scalar(name, x, logits)
        seen = self.known(name, x) if seen is None else seen
        if not SMALLEST <= seen <= LARGEST:
            raise ValueError(
                f"{name} is {seen}; accepted: a number above 0{also} (in float32: "
                f"{SMALLEST:.3g} to {LARGEST:.3g})"
            )
        return float(seen) if isinstance(seen, int) else seen

    def _scalar(self, name: str, x: Any, logits: Any) -> tuple[Any, Any]:
        """A number or 0-d array, and its value; None where looking would cost something."""
        seen = x
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
            seen = self.peek(x)
        elif not isinstance(x, int | float):
            if not isinstance(x, numbers.Real):
                raise TypeError(f"{name} is {x!r}; accepted: a number or a 0-d {self.noun}")
            seen = x = float(x)  # a scalar of NumPy
        elif isinstance(x, bool):
            raise TypeError(f"{name} is {x!r}; accepted: a number or a 0-d {self.noun}")
        return x, seen

    def check_switches(self, **switches: Any) -> None:
        """Options that are True or False."""
        for name, x in switches.items():
            if not isinstance(x, bool):
                raise TypeError(f"{name} is {x!r}; accepted: True or False")

    def check_choice_or_none(self, **switches: Any) -> None:
        """Options that are True or False, or None where the choice is ours."""
        for name, x in switches.items():
            if x is not None and not isinstance(x, bool):
                raise TypeError(f"{name} is {x!r}; accepted: True, False, None")

    def check_flags(self, name: str, x: Any, labels: Any) -> None:
        """One bool per sequence, or one per row."""
        if self.is_array(x) and x.shape == labels.shape[:-1] and x.dtype in self.flags:
            return self.check_place(name, x, labels)
        return self._check_rows(name, x, labels, self.flags, "or that without its last axis")

    def _check_rows(
        self, name: str, x: Any, labels: Any, dtypes: ListOf[Any], also: str = ""
    ) -> None:
        """An array of the labels' shape and place."""
        self._check_array(name, x, dtypes)
        _check_shape(name, x, labels.shape, f"the shape of labels {also}".strip())
        self.check_place(name, x, labels)

    def _check_offsets(self, cu_seqlens: Any, labels: Any) -> None:
        """``[S + 1]`` beside rows ``[N]``; from 0 to N, never decreasing, where it can be seen."""
        self._check_array("cu_seqlens", cu_seqlens, self.integers)
        self.check_place("cu_seqlens", cu_seqlens, labels)
        if labels.ndim != 1 or cu_seqlens.ndim != 1:
            raise ValueError(
                f"cu_seqlens has shape {list(cu_seqlens.shape)} and labels {list(labels.shape)}; "
                "accepted: cu_seqlens [S+1] with logits [N, V], labels [N]"
            )
        offsets = self.peek_list(cu_seqlens)
        if offsets is None:
            return
        rows = labels.shape[0]
        accepted = f"offsets that begin with 0, never decrease and end with the {rows} rows"
        if not offsets or offsets[0] != 0:
            raise ValueError(f"cu_seqlens[0] is {[*offsets, None][0]}; accepted: {accepted}")
        for i in range(1, len(offsets)):
            if offsets[i] < offsets[i - 1]:
                raise ValueError(
                    f"cu_seqlens[{i}] is {offsets[i]} behind {offsets[i - 1]}; accepted: {accepted}"
                )
        if offsets[-1] != rows:
            last = len(offsets) - 1
            raise ValueError(f"cu_seqlens[{last}] is {offsets[-1]}; accepted: {accepted}")

    def _check_array(self, name: str, x: Any, dtypes: ListOf[Any]) -> None:
        if not self.is_array(x):
            raise TypeError(f"{name} is a {type(x).__name__}; accepted: a {self.array}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} is {x.dtype}; accepted: {', '.join(map(str, dtypes))}")


def _tokens(ends: Any, vocab: int) -> tuple[int, ...]:
    """The end tokens, in a tuple."""
    listed: Any = (ends,) if isinstance(ends, numbers.Integral) else ends
    proper = isinstance(listed, ListOf) and len(listed) > 0 and not isinstance(listed, str)
    if not proper or any(
        isinstance(x, bool) or not isinstance(x, numbers.Integral) for x in listed
    ):
        raise TypeError(f"eos_token_id is {ends!r}; accepted: an int, a sequence of ints, None")
    for token in listed:
        if not 0 <= token < vocab:
            raise ValueError(
                f"eos_token_id is {ends!r}; accepted: tokens from 0 to {vocab - 1}, which the "
                f"logits have {vocab} columns for"
            )
    return tuple(int(x) for x in listed)


def _extras(given: Any) -> tuple[str, ...]:
    """The names in ``extras``, each once and in one order."""
    if isinstance(given, str) or not isinstance(given, ListOf):
        raise TypeError(f"extras is {given!r}; accepted: a sequence of {', '.join(EXTRAS)}")
    for name in given:
        if name not in EXTRAS:
            raise ValueError(f"extras has {name!r}; accepted: {', '.join(map(repr, EXTRAS))}")
    return tuple(name for name in EXTRAS if name in given)


def _check_choice(name: str, x: Any, choices: ListOf[str]) -> None:
    if x not in choices:
        raise ValueError(f"{name} is {x!r}; accepted: {', '.join(map(repr, choices))}")


def _check_shape(name: str, x: Any, shape: ListOf[int], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}; accepted: {list(shape)}, {meaning}")
