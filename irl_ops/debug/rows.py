"""The reference's side: float64 statistics of logits that are read in chunks and kept.

The algebra is that of ``irl_ops.reference``, and so are the row kernels. What is added here is that
the logits stay where they are, in their own dtype: a hypothesis about a mistake costs one gather
and no pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np
from numpy.typing import NDArray

from irl_ops import algebra, terms
from irl_ops.algebra import Coefficients, Finished, Rows
from irl_ops.call import read_loss
from irl_ops.debug.arrays import size, to_numpy
from irl_ops.kernels import reference as kernels
from irl_ops.options import IQLearnOptions
from irl_ops.readout import Readout
from irl_ops.reference import arguments

Float = NDArray[np.float64]
Rounding = Callable[[Float], Float]

ELEMENTS = 2**23  # of a chunk: 64 MiB in float64


class Logits:
    """A pass over logits whose statistics are kept, ``[..., T]``.

    Args:
        source: ``[..., T, V]``, an array of any framework.
        readout: how they become Q-values.
        entropy: whether it is needed.
        rounding: what happens to each logit first.
    """

    def __init__(
        self,
        source: Any,
        readout: Readout,
        entropy: bool,
        rounding: Rounding | None = None,
    ) -> None:
        *lead, self.vocab = size(source)
        self.flat = source.reshape(-1, self.vocab)
        self.readout, self.rounding = readout, rounding
        self.index = np.arange(int(np.prod(lead))).reshape(lead)
        self.row_max, self.logsum = np.empty((2, *lead))
        self.entropy = np.empty(lead) if entropy else None
        for rows, q in self.chunks():
            nobody = np.full(len(q), algebra.NO_LABEL)
            row_max, logsum, _, h = kernels.row_stats(q, nobody, entropy, **readout.keywords)
            self.row_max.reshape(-1)[rows], self.logsum.reshape(-1)[rows] = row_max, logsum
            if self.entropy is not None:
                self.entropy.reshape(-1)[rows] = h

    def chunks(self) -> Iterator[tuple[slice, Float]]:
        """Slices of rows with their float64 logits."""
        step = max(1, ELEMENTS // self.vocab)
        for start in range(0, size(self.flat)[0], step):
            rows = slice(start, start + step)
            yield rows, self._rounded(to_numpy(self.flat[rows]))

    def take(self, index: NDArray[np.int64]) -> Logits:
        """The rows of these numbers, in the shape of ``index``."""
        taken = object.__new__(Logits)
        vars(taken).update(vars(self))
        taken.index = self.index.reshape(-1)[index]
        taken.row_max, taken.logsum = (x.reshape(-1)[index] for x in (self.row_max, self.logsum))
        taken.entropy = None if self.entropy is None else self.entropy.reshape(-1)[index]
        return taken

    def label_logit(self, labels: Any) -> Float:
        """``q[label]``; 0 without a label, NaN for one out of range."""
        inside = (labels >= 0) & (labels < self.vocab)
        where = np.stack([self.index, np.where(inside, labels, 0)]).reshape(2, -1)
        picked = self._rounded(to_numpy(self.flat, where))
        column = np.where(labels == algebra.NO_LABEL, algebra.NO_LABEL, np.where(inside, 0, 1))
        found: Float = kernels.label_logit(
            picked[:, None], column.reshape(-1), **self.readout.keywords
        )
        return found.reshape(labels.shape)

    def stats_grad(
        self, labels: Any, given: Coefficients, finish: Any
    ) -> tuple[Coefficients, Finished]:
        """What the gradient is made of, and what was finished, in one window."""
        picked = self.label_logit(labels)
        done = finish(lambda x: x, self.row_max, self.logsum, picked, self.entropy, 0.0)
        return given, done

    def _rounded(self, x: Float) -> Float:
        return x if self.rounding is None else self.rounding(x)


class Batch(NamedTuple):
    """One micro-batch with the options of its loss, ``num_items`` and ``reduction`` left out."""

    logits: Logits
    labels: NDArray[np.int64]
    options: dict[str, Any]

    def but(self, **options: Any) -> Batch:
        """With other options."""
        return self._replace(options=self.options | options)

    def marked(self) -> Batch:
        """With ``segment_ids`` for what marks the documents, in this form or another."""
        joined = algebra.rows.next_row_exists(xp, self.labels, self._call().sequence)
        ids = np.concatenate([joined[..., :1] & False, ~joined[..., :-1]], -1).cumsum(-1)
        return self.but(segment_ids=ids, position_ids=None, cu_seqlens=None)

    def aligned(self) -> Batch:
        """With labels that stand beside their logits, and the marks of ``marked``."""
        sequence = self._call().sequence
        rows = algebra.align(xp, self.labels, self.logits.vocab, sequence)
        missing = rows.labels == algebra.NO_LABEL
        labels = np.where(missing, sequence.ignore_index, rows.labels)
        return self.marked()._replace(labels=labels).but(shift=False, where=None)

    def summed(self) -> Summed:
        """The losses of the rows, of which a total is the sum, and the rows' weights."""
        call, rows, loss = self._objective(1.0)
        out = self._run(rows, loss, call.heads)
        per_row = algebra.row_losses(xp, loss, out.done.stats, out.done.step)
        return Summed(per_row, loss.mle)

    def rows(self) -> Rows:
        """Aligned labels and kinds."""
        return self._objective(1.0)[1]

    def gradient(self, factor: float, cut: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
        """Of ``factor`` times the summed loss by the logits; zero in the rows ``cut``."""
        call, rows, loss = self._objective(factor)
        out = self._run(rows, loss, call.heads)
        element = out.done.element
        given = [None if x is None else x.reshape(-1) for x in out.gradient]
        label, element = rows.labels.reshape(-1), element.reshape(-1)
        picked = self.logits.label_logit(rows.labels).reshape(-1)
        dlogits = np.empty((label.size, self.logits.vocab), np.float32)
        how = self.logits.readout.keywords
        with np.errstate(all="ignore"):
            for at, q in self.logits.chunks():
                alpha, beta, weight = (None if x is None else x[at] for x in given)
                *_, chunk = kernels.row_stats_grad(q, alpha, beta, weight, **how)
                dlogits[at] = kernels.set_label(chunk, label[at], element[at], picked[at], **how)
        if cut is not None:
            dlogits[cut.reshape(-1)] = 0
        return dlogits.reshape(*self.labels.shape, -1)

    def _call(self) -> Any:
        shape = (*self.labels.shape, self.logits.vocab)
        nothing = np.broadcast_to(np.float64(0), shape)  # the checks look at shape and dtype
        options = {"reduction": "sum"} | self.options
        group: Any = IQLearnOptions
        return read_loss(
            "check", group, arguments, terms.iqlearn, nothing, self.labels, options, True
        )

    def _objective(self, factor: float) -> tuple[Any, Rows, Any]:
        call = self._call()
        rows: Rows = algebra.align(xp, self.labels, self.logits.vocab, call.sequence)
        weights = call.weighting.token_weights
        weights = np.ones(self.labels.shape) if weights is None else weights.astype(np.float64)
        weighting = call.weighting._replace(token_weights=weights)
        return call, rows, algebra.weigh(xp, rows.kind, call.terms, weighting, factor)

    def _run(self, rows: Rows, loss: Any, heads: Any) -> Any:
        wide = {
            name: None if x is None else x.astype(np.float64)
            for name, x in (("values", heads.values), ("next_values", heads.next_values))
        }
        over: Any = self.logits
        with np.errstate(all="ignore"):
            return algebra.loss_and_grad(xp, over, rows, loss, heads._replace(**wide))


class Summed(NamedTuple):
    """The rows' losses, unweighted by any N, and their weights; ``[..., T]``."""

    losses: Float
    weights: Float
