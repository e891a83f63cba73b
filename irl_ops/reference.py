"""The losses in float64 NumPy: the specification that runs.

The functions of ``irl_ops.torch`` under the same names and with the same arguments, from the same
algebra and the row kernels of ``irl_ops.kernels.reference``. They return the gradients beside the
loss, since NumPy has no autograd. Every backend is tested against these numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from irl_ops import algebra, terms
from irl_ops.algebra import Coefficients, Finished, Rows
from irl_ops.arguments import Arguments
from irl_ops.call import read_loss, read_stats
from irl_ops.kernels import reference as kernels
from irl_ops.kernels.reference.measures import row_measures
from irl_ops.measures import EXTRAS, Measures
from irl_ops.options import IQLearnOptions, MLEOptions, OnlineOptions, StatsOptions
from irl_ops.readout import Readout

Float = NDArray[np.float64]


class Result(NamedTuple):
    """A loss, its gradients and statistics; float64, except for ``kind``."""

    loss: Float  # 0-d, or [..., T] for reduction="none"
    dlogits: Float  # [..., T, V]: gradient of the loss, or of sum(grad_output * loss)
    dvalues: Float | None
    dnext_values: Float | None
    metrics: dict[str, Float]


class TokenStats(NamedTuple):
    """Statistics of every row, ``[..., T]``."""

    value: Float
    logprob: Float
    entropy: Float | None
    reward: Float
    next_value: Float
    kind: NDArray[np.int8]
    correct: NDArray[np.bool_]
    extra_logprob: Float | None = None  # [..., T, K]
    log_sum_sq: Float | None = None
    top1: NDArray[np.int64] | None = None
    mean_logit: Float | None = None


def iqlearn_loss(
    logits: ArrayLike, labels: ArrayLike, *, grad_output: ArrayLike = 1.0, **options: Any
) -> Result:
    """Offline IQLearn (Eq. 14); see ``irl_ops.torch.iqlearn_loss``.

    Args:
        logits: ``[..., T, V]``.
        labels: integers ``[..., T]``.
        grad_output: the gradient that comes from above, a number, or ``[..., T]`` for
            reduction="none".
        **options: those of the torch function; the metrics are always returned, and ``inplace`` and
            ``backend`` change nothing.
    """
    return _loss(
        "iqlearn_loss", IQLearnOptions, terms.iqlearn, logits, labels, options, grad_output
    )


def mle_loss(
    logits: ArrayLike, labels: ArrayLike, *, grad_output: ArrayLike = 1.0, **options: Any
) -> Result:
    """MLE, and entropy-regularised MLE (Eq. 18); see ``irl_ops.torch.mle_loss``."""
    return _loss("mle_loss", MLEOptions, terms.mle, logits, labels, options, grad_output)


def online_iqlearn_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    is_expert: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    **options: Any,
) -> Result:
    """Online IQLearn (Eqs. 15-17); see ``irl_ops.torch.online_iqlearn_loss``."""
    return _loss(
        "online_iqlearn_loss",
        OnlineOptions,
        terms.online_iqlearn,
        logits,
        labels,
        options,
        grad_output,
        np.asarray(is_expert),
    )


def token_stats(logits: ArrayLike, labels: ArrayLike, **options: Any) -> TokenStats:
    """Row statistics, the extracted reward and the kind of every row."""
    q, y = _float(logits), np.asarray(labels)
    call = read_stats("token_stats", StatsOptions, arguments, q, y, _arrays(options))
    rows = algebra.align(xp, y, q.shape[-1], call.sequence)
    more: dict[str, Any] = {}
    with np.errstate(all="ignore"):  # what is infinite, or no number, is meant to be
        if call.measures.plain:
            found = kernels.row_stats(q, rows.labels, call.entropy, **call.readout.keywords)
            stats = algebra.statistics(xp, rows.labels, *found)
        else:
            stats, more = _measured(call, q, rows)
        step = algebra.transition(xp, rows.kind, stats, call.gamma, _heads(call.heads))
    return TokenStats(
        step.value,
        stats.logprob,
        stats.entropy,
        step.reward,
        step.next_value,
        rows.kind,
        stats.correct,
        **more,
    )


def _measured(call: Any, q: Float, rows: Rows) -> tuple[algebra.Statistics, dict[str, Any]]:
    """The statistics, and the fields beyond them."""
    asked: Measures = call.measures
    heat = asked.temperature
    ids = algebra.aligned_ids(
        xp, rows.labels, asked.extra_ids, q.shape[-1], call.sequence.ignore_index
    )
    found = row_measures(
        q,
        ids,
        asked.wanted(call.entropy),
        row_scale=None if heat is None else np.broadcast_to(1 / _float(heat), rows.labels.shape),
        keep_mask=asked.keep_mask,
        keep_above=None if asked.keep_above is None else _float(asked.keep_above),
        **call.readout.keywords,
    )
    stats, extra = algebra.measured(
        xp, ids, found.row_max, found.logsum, found.picked, found.entropy
    )
    more = {name: getattr(found, name) for name in EXTRAS}
    return stats, more | {"extra_logprob": None if asked.extra_ids is None else extra}


class NumpyArguments(Arguments):
    """The checks for NumPy arrays, whose values can always be looked at."""

    array, noun = "numpy.ndarray", "array"
    floats = (np.dtype("float64"),)
    integers = tuple(
        map(np.dtype, ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"))
    )
    weights = tuple(map(np.dtype, ("float16", "float32", "float64"))) + integers
    flags = (np.dtype("bool"),)

    def is_array(self, x: Any) -> bool:
        """Whether ``x`` is an array, and not a scalar."""
        return isinstance(x, np.ndarray)

    def is_real(self, x: Any) -> bool:
        """Whether an array holds floats or integers."""
        return x.dtype.kind in "fiu"

    def peek(self, x: Any) -> float | None:
        """The value of a 0-d array."""
        return float(x)

    def peek_list(self, x: Any) -> list[int] | None:
        """The values of an array."""
        listed: list[int] = x.tolist()
        return listed


arguments = NumpyArguments()


class Dense:
    """The pass over whole logits."""

    def __init__(self, logits: Float, readout: Readout) -> None:
        self.logits, self.readout = logits, readout.keywords

    def label_logit(self, labels: Any) -> Float:
        """``q[label]``."""
        picked: Float = kernels.label_logit(self.logits, labels, **self.readout)
        return picked

    def stats_grad(self, labels: Any, given: Coefficients, finish: Any) -> tuple[Float, Finished]:
        """The gradient, and what was finished, in one window."""
        row_max, logsum, entropy, dlogits = kernels.row_stats_grad(
            self.logits, *given, **self.readout
        )
        picked = self.label_logit(labels)
        done = finish(lambda x: x, row_max, logsum, picked, entropy, 0.0)
        return kernels.set_label(dlogits, labels, done.element, picked, **self.readout), done


def _loss(
    caller: str,
    group: type,
    terms_of: Any,
    logits: ArrayLike,
    labels: ArrayLike,
    options: dict[str, Any],
    grad_output: ArrayLike,
    is_expert: Any = None,
) -> Result:
    q, y = _float(logits), np.asarray(labels)
    options = _arrays(options)
    call = read_loss(caller, group, arguments, terms_of, q, y, options, True, is_expert)
    rows: Rows = algebra.align(xp, y, q.shape[-1], call.sequence)
    weighting = call.weighting
    given = weighting.token_weights
    weighting = weighting._replace(
        token_weights=np.ones(y.shape) if given is None else _float(given)
    )
    loss = algebra.weigh(xp, rows.kind, call.terms, weighting)
    above = algebra.weigh(xp, rows.kind, call.terms, weighting, _float(grad_output))
    heads = _heads(call.heads)
    with np.errstate(all="ignore"):  # what is infinite, or no number, is meant to be
        out = algebra.loss_and_grad(xp, Dense(q, call.readout), rows, above, heads)
        per_row = algebra.row_losses(xp, loss, out.done.stats, out.done.step)
    total = per_row if weighting.reduction == "none" else np.sum(per_row)
    return Result(total, out.gradient, out.dvalues, out.dnext_values, out.metrics)


def _float(x: ArrayLike) -> Float:
    return np.asarray(x, dtype=np.float64)


def _heads(heads: algebra.Heads) -> algebra.Heads:
    values, next_values = (
        None if x is None else _float(x) for x in (heads.values, heads.next_values)
    )
    return heads._replace(values=values, next_values=next_values)


def _arrays(options: dict[str, Any]) -> dict[str, Any]:
    """Options that are arrays may come as lists; a temperature may be a number as well."""
    names: tuple[str, ...] = (
        "where", "segment_ids", "position_ids", "cu_seqlens", "truncated", "token_weights",
        "values", "next_values", "extra_ids", "keep_mask", "keep_above",
    )  # fmt: skip
    if isinstance(options.get("temperature"), list):
        names += ("temperature",)
    return {
        name: np.asarray(option) if name in names and option is not None else option
        for name, option in options.items()
    }
