"""The C++ row kernels on torch tensors: addresses, sizes and strides, and no copy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irl_ops.kernels.reference.measures import RowMeasures, Slopes


def _torch_openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch computes with, 0 without one.

    Torch's idle threads spin after each of its loops; threads beside them would lose half a core.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(library)).GOMP_parallel  # found among the library's dependencies
    except (OSError, AttributeError):  # not Linux, or built without OpenMP
        return 0
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


try:
    from irl_ops import _native as _native  # of native_loss as well
except ImportError as error:  # a source tree that was not built; unavailable() says so
    _import_error: ImportError | None = error
else:
    _import_error = None
    _native.use_openmp(_torch_openmp())

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, or None."""
    if _import_error is not None:
        return (
            f"the extension irl_ops._native does not load ({_import_error}); "
            "run pip install . in a clone of irl_ops"
        )
    return None if device.type == "cpu" else "the C++ kernels run on the CPU"


def row_stats(
    logits: Tensor,
    labels: Tensor,
    entropy: bool,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``."""
    row_max, logsum, label_logit = (_row_vector(logits) for _ in range(3))
    h = _row_vector(logits) if entropy else None
    labels = labels.contiguous()  # under a name of its own, so that it lives through the call
    _native.row_stats(
        *_rows(logits),
        _address(labels),
        _address(row_max),
        _address(logsum),
        _address(label_logit),
        _address(h),
        torch.get_num_threads(),
        logit_scale=logit_scale,
        softcap=softcap or 0.0,
    )
    return row_max, logsum, label_logit, h


def row_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    logsum: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dlogits: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Writes ``(p_j (A + B log p_j) + C 1{j = label}) dq/dx`` into ``dlogits``."""
    labels, row_max, logsum = labels.contiguous(), row_max.contiguous(), logsum.contiguous()
    a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
    _native.row_grad(
        *_rows(logits),
        _address(labels),
        _address(row_max),
        _address(logsum),
        _address(a),
        _address(b),
        _address(c),
        _address(dlogits),
        dlogits.stride()[:-1],
        torch.get_num_threads(),
        logit_scale=logit_scale,
        softcap=softcap or 0.0,
    )


def row_stats_grad(
    logits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    entropy_weight: Tensor | None,
    dlogits: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, entropy)``; writes the gradient into ``dlogits``, which may be logits."""
    row_max, logsum = _row_vector(logits), _row_vector(logits)
    entropy = None if entropy_weight is None else _row_vector(logits)
    alpha, beta = alpha.contiguous(), beta.contiguous()
    if entropy_weight is not None:
        entropy_weight = entropy_weight.contiguous()
    _native.row_stats_grad(
        *_rows(logits),
        _address(alpha),
        _address(beta),
        _address(entropy_weight),
        _address(row_max),
        _address(logsum),
        _address(entropy),
        _address(dlogits),
        dlogits.stride()[:-1],
        torch.get_num_threads(),
        logit_scale=logit_scale,
        softcap=softcap or 0.0,
    )
    return row_max, logsum, entropy


def label_logit(
    logits: Tensor, labels: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """``q[label]`` in float32: 0 without a label, NaN for a bad one."""
    picked = _row_vector(logits)
    labels = labels.contiguous()
    _native.label_logit(
        *_rows(logits),
        _address(labels),
        _address(picked),
        logit_scale=logit_scale,
        softcap=softcap or 0.0,
    )
    return picked


def set_label_(
    dlogits: Tensor,
    labels: Tensor,
    elements: Tensor,
    label_logit: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Writes one element per row, rounded once; a row without a valid label stays as it is."""
    labels, elements = labels.contiguous(), elements.contiguous()
    label_logit = None if label_logit is None else label_logit.contiguous()
    _native.set_label(
        *_rows(dlogits),
        _address(labels),
        _address(elements),
        _address(label_logit),
        logit_scale=logit_scale,
        softcap=softcap or 0.0,
    )


def row_measures(
    logits: Tensor, ids: Tensor, wanted: tuple[str, ...] = (), **view: Any
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``."""
    ids = ids.contiguous()
    mean = _row_vector(logits) if "mean_logit" in wanted else None
    out = RowMeasures(
        _row_vector(logits),
        _row_vector(logits),
        logits.new_empty(ids.shape, dtype=torch.float32),
        _row_vector(logits) if "entropy" in wanted else None,
        _row_vector(logits) if "log_sum_sq" in wanted else None,
        logits.new_empty(logits.shape[:-1], dtype=torch.int64) if "top1" in wanted else None,
        mean,
        None if mean is None else torch.empty_like(mean),
    )
    seen = View(**view)
    _native.row_measures(
        *_rows(logits),
        _address(ids),
        ids.shape[-1],
        tuple(map(_address, out)),
        seen.addresses,
        torch.get_num_threads(),
        **seen.readout,
    )
    return out


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
    ids, row_max, logsum = ids.contiguous(), row_max.contiguous(), logsum.contiguous()
    given = [None if x is None else x.contiguous() for x in slopes]
    seen = View(**view)
    _native.row_measures_grad(
        *_rows(logits),
        _address(ids),
        ids.shape[-1],
        _address(row_max),
        _address(logsum),
        tuple(map(_address, given)),
        _address(dlogits),
        dlogits.stride()[:-1],
        seen.addresses,
        torch.get_num_threads(),
        **seen.readout,
    )


class View:
    """What each row has of its own when it is read, as the C++ code takes it; and the readout."""

    def __init__(
        self,
        row_scale: Tensor | None = None,
        keep_mask: Tensor | None = None,
        keep_above: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        scale, above = (None if x is None else x.contiguous() for x in (row_scale, keep_above))
        if keep_mask is not None and keep_mask.stride(-1) != 1:
            keep_mask = keep_mask.contiguous()
        self.kept = (scale, keep_mask, above)  # lives through the call
        strides = () if keep_mask is None else keep_mask.stride()[:-1]
        self.addresses = (_address(scale), _address(keep_mask), strides, _address(above))
        self.readout: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap or 0.0}


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor``; returns at once where the 0-d factor is 1."""
    number = factor.item()
    if number != 1:
        _native.scale(*_rows(dlogits), number, torch.get_num_threads())


def _rows(logits: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...], int]:
    shape = logits.shape
    return logits.data_ptr(), _DTYPES[logits.dtype], shape[:-1], logits.stride()[:-1], shape[-1]


def _row_vector(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
