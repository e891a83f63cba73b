"""``check``: one batch through a set-up and through the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from irl_ops.debug.arrays import as_is, dtype_name
from irl_ops.debug.callables import see_callable
from irl_ops.debug.explain import explain
from irl_ops.debug.report import Parting, Report
from irl_ops.debug.rows import Batch, Logits
from irl_ops.debug.seen import Part, Seen, known_options
from irl_ops.debug.shares import Counts
from irl_ops.debug.slopes import judge
from irl_ops.options import DEFAULTS, IQLearnOptions, refuse
from irl_ops.readout import Readout

MARKS = ("segment_ids", "position_ids", "cu_seqlens")

# Relative to the sum of the rows' losses. A loss in float32 goes through a handful of roundings of
# 2^-24 in each row. Logits of a second forward in a 16-bit dtype may be rounded another way where
# their products are summed in another order: 2^-9 of each, with signs that mostly cancel.
FINE, COARSE = 5e-6, 1e-3


def check(
    target: Any,
    batch: Any = None,
    *,
    documents: Any = None,
    shift: bool | None = None,
    num_items: float | None = None,
    world_size: int | None = None,
    accumulation_steps: int | None = None,
    gradient: bool = True,
    rtol: float | None = None,
    **options: Any,
) -> Report:
    """Is my loss right? One batch through a set-up and through the float64 reference.

    The loss that the set-up gives is compared with that of ``irl_ops.reference.iqlearn_loss`` for
    the options that you expect, and with what some thirty known mistakes would make of it, so that
    the report says in words what is wrong: labels shifted twice, the next document read, chunks,
    the wrong end, the wrong N, a factor of ranks or micro-batches, rounded logits. The gradient is
    compared row by row, where the set-up shows it. Nothing is trained, and nothing is changed.

    What is the same in the expectation and in the set-up cannot be found: the options given here
    should come from what you know of your data, not from the call that is checked.

    Args:
        target: what is checked:

            - a function ``f(logits, labels, **rest of the batch)``, in torch, JAX or NumPy, or one
              ``f(outputs, labels, num_items_in_batch=None)`` as the Trainer calls it;
            - a ``torch.nn.Module`` whose ``module(**batch)`` holds the loss, such as a model after
              ``apply_iqlearn``; logits are those of a second forward, without the labels;
            - a ``Trainer`` of Transformers or TRL: what its ``training_step`` hands to backward.
        batch: a mapping. For a function it has "logits" [..., T, V], "labels" [..., T] and what
            else it takes by name; for a module its inputs with "labels"; for a Trainer the same, or
            a list of micro-batches, or None for those of its own data loader.
        documents: integers of the labels' shape, the same in rows of the same document. None: as
            the batch marks them (``segment_ids``, ``position_ids``, ``cu_seqlens``, and for
            modules all that Transformers knows), or one document a sequence.
        shift: whether logits[t] should score labels[t + 1]. None: True for modules and Trainers
            whose model is a decoder and whose batch has no ``shift_labels``, else False.
        num_items: N, the number of labels in all micro-batches of all ranks. None: what the Trainer
            or the batch says, or the number of labels of this batch.
        world_size: the number of ranks, so that a factor of it is recognised. None: the Trainer's,
            or 1.
        accumulation_steps: the number of micro-batches of a step, likewise.
        gradient: whether gradients are compared. It takes host memory for some four times the
            logits in float32; the loss alone takes none that grows with them.
        rtol: how far the loss may be off, relative to the sum of the rows' losses. None: 5e-6, and
            1e-3 where the logits are 16-bit and come of a second forward.
        **options: the others of ``iqlearn_loss`` (``lam``, ``gamma``, ``eos_token_id``,
            ``boundary``, ...), as they should be. Those that are left out are as ``apply_iqlearn``
            or ``iqlearn_loss_func`` was given them, or else the defaults.

    Returns:
        A ``Report``: ``report.ok``, ``report.raise_if_wrong()``, and a table to print.

    Raises:
        TypeError: an unknown option; a target, or a loss, of another kind.
        ValueError: a batch without labels (for a function: logits), two marks of documents, and
            what the loss itself raises for.
    """
    for name in options:
        if name not in known_options():
            group: Any = IQLearnOptions
            refuse("check", [name], group)
    for name, number in (("world_size", world_size), ("accumulation_steps", accumulation_steps)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; accepted: 1 or more, or None")
    marked = [name for name in MARKS if options.get(name) is not None]
    if documents is not None and marked:
        raise ValueError(f"documents and {marked[0]} are given; accepted: one of them")
    reduction = options.pop("reduction", "mean")
    seen = _see(target, batch, num_items, reduction, gradient)
    if shift is not None:
        seen.shift = shift
    given: dict[str, Any] = {name: as_is(x) for name, x in options.items()}
    if documents is not None:
        given["segment_ids"] = _integers(documents)
    items = seen.num_items if num_items is None else float(num_items)
    facts = [part.facts.pop("num_items", None) for part in seen.parts]
    if items is None and facts[0] is not None:
        items = float(facts[0])
    counts = Counts(
        num_items=items,
        summed=reduction != "mean",
        world_size=world_size or seen.world_size,
        steps=accumulation_steps or len(seen.parts),
        scale=seen.scale,
    )
    batches = [_batch(part, seen, given) for part in seen.parts]
    if rtol is None:
        wide = dtype_name(batches[0].logits.flat) in ("float32", "float64")
        rtol = FINE if wide or not seen.recomputed else COARSE
    findings = explain(seen.found, seen.dtype, batches, counts, rtol)
    rows = findings.rows
    partings: tuple[Parting, ...] = ()
    if gradient and findings.ok:
        n = sum(float(b.summed().weights.sum()) for b in batches) if items is None else items
        factor = counts.scale / (1.0 if counts.summed else n or 1.0)
        row, partings = judge(batches, [part.slopes for part in seen.parts], factor)
        rows = (*rows, row)
    return Report(seen.found, findings.expected, findings.tolerance, rows, partings)


def _see(target: Any, batch: Any, num_items: Any, reduction: str, gradient: bool) -> Seen:
    """The set-up, by what kind of thing it is."""
    if all(hasattr(target, name) for name in ("training_step", "accelerator", "compute_loss_func")):
        from irl_ops.debug.trainers import see_trainer

        return see_trainer(target, batch, gradient)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.nn.Module) and not _has_logits(batch):
        from irl_ops.debug.modules import see_module

        return see_module(target, batch, gradient)
    if not callable(target):
        raise TypeError(
            f"target is a {type(target).__name__}; accepted: a function of logits and labels, a "
            "torch.nn.Module, a Trainer of Transformers or TRL"
        )
    return see_callable(target, batch, num_items, reduction, gradient)


def _has_logits(batch: Any) -> bool:
    """Whether a module is a loss, such as ``IQLearnLoss``, and not a model."""
    return isinstance(batch, Mapping) and "logits" in batch


def _batch(part: Part, seen: Seen, given: dict[str, Any]) -> Batch:
    """A micro-batch as the reference takes it, with the options that are expected."""
    facts = dict(part.facts)
    if any(given.get(name) is not None for name in MARKS):
        facts = {name: x for name, x in facts.items() if name not in MARKS}
    options = {"shift": seen.shift, **seen.defaults, **facts, **given}
    coef = options.get("entropy_coef", 0.0)
    readout = Readout(*(_number(options.get(n, DEFAULTS[n])) for n in Readout._fields))
    logits = Logits(part.logits, readout, entropy=bool(np.any(coef != 0.0)))
    return Batch(logits, _integers(part.labels), options)


def _number(x: Any) -> Any:
    return None if x is None else float(x)


def _integers(x: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    plain = as_is(x)
    return np.asarray(plain).astype(np.int64)
