"""The Triton row kernels on torch tensors: one launch for all rows, and no copy of the logits.

Triton is imported at the first launch; TRITON_INTERPRET has to be set by then to have an effect.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irl_ops.kernels.reference.measures import RowMeasures, Slopes
from irl_ops.kernels.triton import dispatch

DEVICES = ("cuda", "xpu")  # to torch, AMD's GPUs are cuda as well
GROUP_BYTES = 16


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run pip install 'triton>=3.6'"
    if device.type in DEVICES or (device.type == "cpu" and interpreted()):
        return None
    if device.type == "cpu":
        return "Triton compiles for GPUs; with TRITON_INTERPRET=1 it interprets on a CPU, slowly"
    return f"Triton compiles for devices of the types {' and '.join(DEVICES)}"


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, in the words that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def row_stats(
    logits: Tensor, labels: Tensor, entropy: bool, **readout: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``."""
    row_max, logsum, picked = (_row_vector(logits) for _ in range(3))
    h = _row_vector(logits) if entropy else None
    with current(logits.device):
        launch_row_stats(logits, labels.contiguous(), row_max, logsum, picked, h, **readout)
    return row_max, logsum, picked, h


def row_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dlogits: Tensor,
    **readout: Any,
) -> None:
    """Writes ``(p_j (A + B log p_j) + C 1{j = label}) dq/dx`` into ``dlogits``."""
    given = (x.contiguous() for x in (labels, row_max, logsum, a, b, c))
    block = dispatch.row_grad(_family(logits.device))
    with current(logits.device):
        for q, d, *vectors in planes((logits, dlogits), *given):
            _kernel("row_grad")[(_rows(q), block.programs(q.shape[-1]))](
                q, *vectors, *_sizes(q), *_strides(q), *_strides(d), d,
                EDGES=_edges(q, d), MATCHED=_matched(q, d), **block.launch, **constants(**readout),
                enable_fp_fusion=True,
            )  # fmt: skip


def row_stats_grad(
    logits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    entropy_weight: Tensor | None,
    dlogits: Tensor,
    **readout: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, entropy)``; writes the gradient into ``dlogits``, which may be logits."""
    row_max, logsum = _row_vector(logits), _row_vector(logits)
    entropy, weight = None, None
    if entropy_weight is not None:
        entropy, weight = _row_vector(logits), entropy_weight.contiguous()
    given = (alpha.contiguous(), beta.contiguous(), weight)
    with current(logits.device):
        launch_row_stats_grad(logits, dlogits, *given, row_max, logsum, entropy, **readout)
    return row_max, logsum, entropy


def label_logit(logits: Tensor, labels: Tensor, **readout: Any) -> Tensor:
    """``q[label]`` in float32: 0 without a label, NaN for a bad one."""
    picked = _row_vector(logits)
    with current(logits.device):
        launch_label_logit(logits, labels.contiguous(), picked, **readout)
    return picked


def set_label_(
    dlogits: Tensor,
    labels: Tensor,
    elements: Tensor,
    label_logit: Tensor | None = None,
    **readout: Any,
) -> None:
    """Writes one element per row, rounded once; rows without a good label keep what they have."""
    label_logit = None if label_logit is None else label_logit.contiguous()
    given = (labels.contiguous(), elements.contiguous(), label_logit)
    with current(dlogits.device):
        launch_set_label(dlogits, *given, **readout)


def row_measures(
    logits: Tensor, ids: Tensor, wanted: tuple[str, ...] = (), **view: Any
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``."""
    seen, rows = View(**view), functools.partial(_row_vector, logits)
    mean = "mean_logit" in wanted
    found = RowMeasures(
        rows(),
        rows(),
        ids.new_empty(ids.shape, dtype=torch.float32),
        rows() if "entropy" in wanted else None,
        rows() if "log_sum_sq" in wanted else None,
        rows().long() if "top1" in wanted else None,
        rows() if mean else None,
        rows() if mean else None,
    )
    extras = bool(set(wanted) - {"entropy"})
    tiles = dispatch.row_measures(logits.shape[-1], _family(logits.device), extras)
    with current(logits.device):
        for q, *others in planes((logits, *seen.mask), ids.contiguous(), *seen.vectors, *found):
            mask, (y, scale, above, *out) = seen.split(others)
            _kernel("measures", "row_measures")[(_rows(q),)](
                q, y, scale, mask, above, *_sizes(q), *_strides(q), *_mask_strides(mask),
                ids.shape[-1], *out,
                EDGES=_edges(q), ENTROPY=found.entropy is not None,
                SQUARES=found.log_sum_sq is not None, TOP=found.top1 is not None, MEAN=mean,
                **seen.flags, **tiles.launch, enable_fp_fusion=True,
            )  # fmt: skip
    return found


def row_measures_grad(
    logits: Tensor,
    ids: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    slopes: Slopes,
    dlogits: Tensor,
    **view: Any,
) -> None:
    """Writes the gradient into ``dlogits``, which may be logits."""
    seen = View(**view)
    given = (None if x is None else x.contiguous() for x in (ids, row_max, logsum, *slopes))
    block = dispatch.row_measures_grad(_family(logits.device))
    with current(logits.device):
        for q, d, *others in planes((logits, dlogits, *seen.mask), *given, *seen.vectors):
            mask, vectors = seen.split(others)
            *coefficients, scale, above = vectors
            _kernel("measures", "row_measures_grad")[(_rows(q), block.programs(q.shape[-1]))](
                q, *coefficients, scale, mask, above, *_sizes(q), *_strides(q),
                *_mask_strides(mask), *_strides(d), ids.shape[-1], d,
                EDGES=_edges(q, d), MATCHED=_matched(q, d),
                B=slopes.b is not None, D=slopes.d is not None, E=slopes.e is not None,
                **seen.flags, **block.launch, enable_fp_fusion=True,
            )  # fmt: skip


class View:
    """What each row has of its own when it is read, as launches take it; and the readout."""

    def __init__(
        self,
        row_scale: Tensor | None = None,
        keep_mask: Tensor | None = None,
        keep_above: Tensor | None = None,
        **readout: Any,
    ) -> None:
        self.mask: tuple[Tensor, ...] = ()
        if keep_mask is not None:
            kept = keep_mask if keep_mask.stride(-1) == 1 else keep_mask.contiguous()
            self.mask = (kept.view(torch.uint8),)
        self.vectors = [None if x is None else x.contiguous() for x in (row_scale, keep_above)]
        self.flags = {
            "MASK": keep_mask is not None,
            "ABOVE": keep_above is not None,
            "SCALED": row_scale is not None,
            **constants(**readout),
        }

    def split(self, others: list[Any]) -> tuple[Tensor | None, list[Any]]:
        """The mask, if there is one, and what comes behind it."""
        return (others[0], others[1:]) if self.mask else (None, others)


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor``; the device looks at the factor and does nothing where it is 1."""
    block = dispatch.row_grad(_family(dlogits.device))
    with current(dlogits.device):
        for (d,) in planes((dlogits,)):
            _kernel("scale")[(min(_rows(d), dispatch.SCALE_PROGRAMS),)](
                factor, _rows(d), *_sizes(d), *_strides(d), d,
                EDGES=_edges(d), **block.launch, enable_fp_fusion=True,
            )  # fmt: skip


def constants(logit_scale: float = 1.0, softcap: float | None = None) -> dict[str, float]:
    """The constants of a kernel that say how it reads logits."""
    return {"SCALE": logit_scale, "SOFTCAP": softcap or 0.0}


def launch_row_stats(logits: Tensor, labels: Tensor, *out: Tensor | None, **readout: Any) -> None:
    """Vectors here and below are contiguous, with one element per row or more."""
    tiles = dispatch.row_stats(logits.shape[-1], _family(logits.device))
    for q, *vectors in planes((logits,), labels, *out):
        _kernel("row_stats")[(_rows(q),)](
            q, vectors[0], *_sizes(q), *_strides(q), *vectors[1:],
            ENTROPY=out[-1] is not None, EDGES=_edges(q), **tiles.launch, **constants(**readout),
            enable_fp_fusion=True,
        )  # fmt: skip


def launch_row_stats_grad(
    logits: Tensor, dlogits: Tensor, *vectors: Tensor | None, **readout: Any
) -> None:
    """``vectors``: alpha, beta, entropy_weight; row_max, logsum, entropy."""
    entropy, family = vectors[-1] is not None, _family(logits.device)
    capped = readout.get("softcap") is not None
    for q, d, a, b, w, *out in planes((logits, dlogits), *vectors):
        form = dispatch.row_stats_grad(
            q.shape[-1], q.itemsize, entropy, family, _matched(q, d), capped
        )
        name = "resident" if isinstance(form, dispatch.Resident) else "two_pass"
        _kernel(name, "row_stats_grad")[(_rows(q),)](
            q, a, b, w, *_sizes(q), *_strides(q), *_strides(d), *out, d,
            ENTROPY=entropy, EDGES=_edges(q, d), MATCHED=_matched(q, d),
            **form.launch, **constants(**readout), enable_fp_fusion=True,
        )  # fmt: skip


def launch_label_logit(logits: Tensor, labels: Tensor, picked: Tensor, **readout: Any) -> None:
    """Writes ``q[label]`` of each row into ``picked``."""
    block = dispatch.LABELS
    for q, y, out in planes((logits,), labels, picked):
        _kernel("labels", "label_logit")[(block.programs(_rows(q)),)](
            q, y, _rows(q), *_sizes(q), *_strides(q), out,
            **block.launch, **constants(**readout), enable_fp_fusion=True,
        )  # fmt: skip


def launch_set_label(
    dlogits: Tensor,
    labels: Tensor,
    elements: Tensor,
    label_logit: Tensor | None = None,
    **readout: Any,
) -> None:
    """Writes each row's element at its label into ``dlogits``."""
    block = dispatch.LABELS
    for d, y, x, q in planes((dlogits,), labels, elements, label_logit):
        _kernel("labels", "set_label")[(block.programs(_rows(d)),)](
            y, x, _rows(d), *_sizes(d), *_strides(d), d,
            label_logit=None if readout.get("softcap") is None else q,
            **block.launch, **constants(**readout), enable_fp_fusion=True,
        )  # fmt: skip


@functools.cache
def _kernel(module: str, function: str | None = None) -> Any:
    """The row kernel of that name, to be launched."""
    found = importlib.import_module(f"irl_ops.kernels.triton.{module}")
    return getattr(found, function or module)


@functools.cache
def _family(device: torch.device) -> str:
    """The device's rows in the tables of ``dispatch``."""
    if device.type == "cpu":
        return dispatch.OTHER  # interpreted
    import triton

    with current(device):
        target = triton.runtime.driver.active.get_current_target()
    return dispatch.family(target.backend, target.arch, triton.__version__)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current stream of the current device, wherever the tensors are."""
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter's NumPy warns where GPUs are silent
    return torch.accelerator.device_index(device.index)


def planes(matrices: tuple[Tensor, ...], *vectors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The matrices as [outer, inner, V] without a copy, and the vectors where their rows begin.

    Almost always one set of views, and then the vectors are as they came; one set for each index of
    the leading axes where the strides of these do not fold into one. None stays None.
    """
    folded = _folded(matrices)
    if folded is not None:
        yield (*folded, *vectors)
        return
    count = math.prod(matrices[0].shape[:-1])
    flat = [None if x is None else _by_row(x, count) for x in vectors]
    rows = math.prod(matrices[0].shape[1:-1])
    for index in range(matrices[0].shape[0]):
        begin = index * rows
        there = (None if x is None else x[begin : begin + rows] for x in flat)
        yield from planes(tuple(x[index] for x in matrices), *there)


def _by_row(x: Tensor, count: int) -> Tensor:
    """Rows on the first axis: of one element, behind which others may follow, or of several."""
    several = count > 0 and math.prod(x.shape[:-1]) == count
    return x.view(count, -1) if several else x.view(-1)


def _folded(matrices: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Three axes of each, or None where two leading axes have unrelated strides."""
    while (axes := matrices[0].dim()) != 3:
        if axes < 3:
            matrices = tuple(x.unsqueeze(0) for x in matrices)
            continue
        try:
            matrices = tuple(x.view(-1, *x.shape[2:]) for x in matrices)
        except RuntimeError:
            return None
    return matrices


def _rows(logits: Tensor) -> int:
    return logits.shape[0] * logits.shape[1]


def _sizes(logits: Tensor) -> tuple[int, int]:
    return logits.shape[2], logits.shape[1]


def _strides(logits: Tensor) -> tuple[int, int]:
    return logits.stride(0), logits.stride(1)


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else _strides(mask)


def _edges(*tensors: Tensor) -> bool:
    """Whether some row starts or ends off a 16-byte boundary."""
    return any(
        x.data_ptr() % GROUP_BYTES or any(n * x.itemsize % GROUP_BYTES for n in _reach(x))
        for x in tensors
    )


def _reach(logits: Tensor) -> tuple[int, ...]:
    """V, and the strides of those axes along which there is a second row."""
    steps = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    return (logits.shape[-1], *(stride for stride, size in steps if size > 1))


def _matched(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether each row starts equally far from a 16-byte boundary in both."""
    apart = (dlogits.data_ptr() - logits.data_ptr()) % GROUP_BYTES
    steps = zip(_reach(logits), _reach(dlogits), strict=True)
    return not apart and not any((s - d) * logits.itemsize % GROUP_BYTES for s, d in steps)


def _row_vector(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)
