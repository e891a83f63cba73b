"""The row measures as torch.library custom operators, and ``token_stats`` on top of them.

As in ``irl_ops.torch.ops``: opaque to a compiler, which traces the algebra around them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from irl_ops import algebra
from irl_ops.call import StatsCall
from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.measures import EXTRAS
from irl_ops.readout import Readout
from irl_ops.torch.backends import BACKENDS
from irl_ops.torch.ops import row_vector
from irl_ops.torch.refusals import refuse_second_derivative

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class View(NamedTuple):
    """What each row has of its own when it is read; None where it has not."""

    row_scale: Tensor | None  # [...]
    keep_mask: Tensor | None  # [..., V]
    keep_above: Tensor | None  # [...]

    def flat(self) -> View:
        """Of rows along one axis."""
        scale, mask, above = self
        return View(
            None if scale is None else scale.flatten(),
            None if mask is None else mask.flatten(0, -2),
            None if above is None else above.flatten(),
        )

    def columns(self, width: int) -> View:
        """Of the first columns."""
        mask = self.keep_mask
        return self._replace(keep_mask=None if mask is None else mask[..., :width])

    def part(self, rows: slice, columns: slice = slice(None)) -> View:
        """Of some of the rows, and of some of the columns."""
        scale, mask, above = (None if x is None else x[rows] for x in self)
        return View(scale, None if mask is None else mask[..., columns], above)


@torch.library.custom_op("irl_ops::row_measures", mutates_args=())
def row_measures(
    logits: Tensor,
    ids: Tensor,
    row_scale: Tensor | None,
    keep_mask: Tensor | None,
    keep_above: Tensor | None,
    wanted: str,
    backend: str,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``RowMeasures``, empty where they are not among the ``wanted``."""
    view, readout = View(row_scale, keep_mask, keep_above), Readout(logit_scale, softcap)
    found = BACKENDS[backend].row_measures(
        logits, ids, names_in(wanted), **view._asdict(), **readout.keywords
    )
    return filled(logits, found)


@row_measures.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    row_scale: Tensor | None,
    keep_mask: Tensor | None,
    keep_above: Tensor | None,
    wanted: str,
    backend: str,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return like_measures(logits, ids, wanted)


@torch.library.custom_op("irl_ops::row_measures_grad", mutates_args=())
def row_measures_grad(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    d: Tensor | None,
    e: Tensor | None,
    row_scale: Tensor | None,
    keep_mask: Tensor | None,
    keep_above: Tensor | None,
    backend: str,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """The gradient by the logits, in their dtype."""
    view, readout = View(row_scale, keep_mask, keep_above), Readout(logit_scale, softcap)
    dlogits = torch.empty_like(logits)
    BACKENDS[backend].row_measures_grad(
        logits, ids, row_max, logsum, Slopes(a, b, c, d, e), dlogits,
        **view._asdict(), **readout.keywords,
    )  # fmt: skip
    return dlogits


@row_measures_grad.register_fake
def _(logits: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("irl_ops::check_ids", mutates_args=())
def check_ids(ids: Tensor, given: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """``ids`` again, or an error that names the bad one among the ``given`` extra ids."""
    error = wrong_id(ids, given, vocab, ignore_index)
    if error is not None:
        raise error
    return ids.clone()


@check_ids.register_fake
def _(ids: Tensor, given: Tensor, vocab: int, ignore_index: int) -> Tensor:
    return torch.empty_like(ids)


def wrong_id(ids: Tensor, given: Tensor, vocab: int, ignore_index: int) -> IndexError | None:
    """The error for the first bad one among the extra ids."""
    bad = ids[..., 1:] == algebra.BAD_LABEL
    if not bad.any():
        return None
    position = tuple(bad.nonzero()[0].tolist())
    return IndexError(
        f"extra_ids[{', '.join(map(str, position))}] is {int(given[position])}; accepted: 0 to "
        f"{vocab - 1} (the logits have {vocab} columns) and ignore_index={ignore_index}"
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    logits, ids, *view, ctx.wanted, ctx.backend, ctx.scale, ctx.cap = inputs
    found = RowMeasures(*output)
    ctx.save_for_backward(
        logits, ids, *view, found.row_max, found.logsum, found.entropy, found.log_sum_sq, found.kept
    )


def _backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    logits, ids, *view, row_max, logsum, entropy, log_sum_sq, kept = ctx.saved_tensors
    slopes = slopes_of(ctx.wanted, entropy, log_sum_sq, kept, above)
    dlogits = row_measures_grad(
        logits, ids, row_max, logsum, *slopes, *view, ctx.backend, ctx.scale, ctx.cap
    )
    return dlogits, *[None] * 8


row_measures.register_autograd(_backward, setup_context=_save)


def slopes_of(
    wanted: str, entropy: Tensor, log_sum_sq: Tensor, kept: Tensor, above: tuple[Tensor, ...]
) -> Slopes:
    """The coefficients of the gradient; ``above`` are the gradients by the measures.

    ``row_max`` is the reference point that logsum is measured from, a constant.
    """
    _, dlogsum, dpicked, dentropy, dlog_sum_sq, _, dmean, _ = above
    names = names_in(wanted)
    a, b, d, e = algebra.measure_slopes(
        xp,
        entropy if "entropy" in names else None,
        log_sum_sq if "log_sum_sq" in names else None,
        kept if "mean_logit" in names else None,
        (dlogsum, dentropy, dlog_sum_sq, dmean),
    )
    return Slopes(a, b, dpicked, d, e)


def ids_of(call: StatsCall, rows: algebra.Rows, vocab: int) -> Tensor:
    """The labels and the extra ids; on a CPU a bad one raises."""
    extra, ignore = call.measures.extra_ids, call.sequence.ignore_index
    ids: Tensor = algebra.aligned_ids(xp, rows.labels, extra, vocab, ignore)
    if extra is None or extra.device.type != "cpu":
        return ids
    checked: Tensor = check_ids(ids, extra, vocab, ignore)
    return checked


def view_of(call: StatsCall, labels: Tensor, dtype: torch.dtype) -> View:
    """What each row has of its own, in the dtype that is computed in."""
    heat, _, mask, above, *_ = call.measures
    if heat is not None:
        heat = torch.as_tensor(heat, dtype=dtype, device=labels.device).expand(labels.shape)
        heat = torch.where(heat > 0, 1 / heat, torch.nan)  # what a temperature cannot be
    return View(heat, mask, None if above is None else above.to(dtype))


def statistics(
    call: StatsCall, logits: Tensor, rows: algebra.Rows, backend: str
) -> tuple[algebra.Statistics, dict[str, Tensor | None]]:
    """Row statistics, and the fields of ``TokenStats`` beyond them; differentiable."""
    dtype = row_vector(logits[:0]).dtype
    ids, view = ids_of(call, rows, logits.shape[-1]), view_of(call, rows.labels, dtype)
    wanted = ",".join(call.measures.wanted(call.entropy))
    found = row_measures(logits, ids, *view, wanted, backend, *call.readout)
    return named(call, ids, RowMeasures(*found))


def named(
    call: StatsCall, ids: Tensor, found: RowMeasures
) -> tuple[algebra.Statistics, dict[str, Tensor | None]]:
    """The measures under their names in ``TokenStats``."""
    entropy = found.entropy if call.entropy else None
    stats, extra = algebra.measured(xp, ids, found.row_max, found.logsum, found.picked, entropy)
    asked = call.measures
    more = {name: getattr(found, name) if name in asked.extras else None for name in EXTRAS}
    return stats, more | {"extra_logprob": None if asked.extra_ids is None else extra}


def present(wanted: tuple[str, ...]) -> set[str]:
    """The fields of ``RowMeasures`` that are not None."""
    found = {"row_max", "logsum", "picked", *wanted}
    return found | {"kept"} if "mean_logit" in wanted else found


def names_in(wanted: str) -> tuple[str, ...]:
    """The names in an operator's string, whose arguments cannot be lists of strings."""
    return tuple(filter(None, wanted.split(",")))


def filled(logits: Tensor, found: RowMeasures) -> Eight:
    """With an empty tensor for each that is None, since an operator returns tensors."""
    nothing = logits.new_empty(0, dtype=torch.float32)
    a, b, c, d, e, f, g, h = (torch.empty_like(nothing) if x is None else x for x in found)
    return a, b, c, d, e, f, g, h


def like_measures(logits: Tensor, ids: Tensor, wanted: str) -> Eight:
    """Tensors of the types that the operator returns."""
    names, vector = names_in(wanted), row_vector(logits)
    mean = "mean_logit" in names
    return filled(
        logits,
        RowMeasures(
            vector,
            torch.empty_like(vector),
            torch.empty_like(ids, dtype=vector.dtype),
            torch.empty_like(vector) if "entropy" in names else None,
            torch.empty_like(vector) if "log_sum_sq" in names else None,
            torch.empty_like(vector, dtype=torch.int64) if "top1" in names else None,
            torch.empty_like(vector) if mean else None,
            torch.empty_like(vector) if mean else None,
        ),
    )
