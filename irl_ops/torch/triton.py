"""The Triton row kernels on torch tensors: one launch for all rows, and no copy of the logits.

Triton is imported at the first launch; TRITON_INTERPRET has to be set by then to have an effect.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    logits: Tensor, labels: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``."""
    row_max, logsum, picked = (_row_vector(logits) for _ in range(3))
    h = _row_vector(logits) if entropy else None
    for q, y, *out in _planes(logits, labels.contiguous(), row_max, logsum, picked, h):
        tiles = dispatch.row_stats(q.shape[-1], _family(q.device))
        with _current(q.device):
            _kernel("row_stats")[(_rows(q),)](
                q, y, *_sizes(q), *_strides(q), *out,
                ENTROPY=entropy, EDGES=_edges(q), **tiles.launch, enable_fp_fusion=True,
            )  # fmt: skip
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
) -> None:
    """Writes ``p_j (A + B log p_j) + C 1{j = label}`` into ``dlogits``."""
    given = (x.contiguous() for x in (labels, row_max, logsum, a, b, c))
    for q, d, *vectors in _planes(logits, dlogits, *given):
        block = dispatch.row_grad(_family(q.device))
        with _current(q.device):
            _kernel("row_grad")[(_rows(q), block.programs(q.shape[-1]))](
                q, *vectors, *_sizes(q), *_strides(q), *_strides(d), d,
                EDGES=_edges(q, d), MATCHED=_matched(q, d), **block.launch, enable_fp_fusion=True,
            )  # fmt: skip


def row_stats_grad(
    logits: Tensor, alpha: Tensor, beta: Tensor, entropy_weight: Tensor | None, dlogits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(row_max, logsum, entropy)``; writes the gradient into ``dlogits``, which may be logits."""
    row_max, logsum = _row_vector(logits), _row_vector(logits)
    entropy, weight = None, None
    if entropy_weight is not None:
        entropy, weight = _row_vector(logits), entropy_weight.contiguous()
    vectors = (alpha.contiguous(), beta.contiguous(), weight, row_max, logsum, entropy)
    for q, d, a, b, w, *out in _planes(logits, dlogits, *vectors):
        form = dispatch.row_stats_grad(
            q.shape[-1], q.itemsize, weight is not None, _family(q.device), _matched(q, d)
        )
        name = "resident" if isinstance(form, dispatch.Resident) else "two_pass"
        with _current(q.device):
            _kernel(name, "row_stats_grad")[(_rows(q),)](
                q, a, b, w, *_sizes(q), *_strides(q), *_strides(d), *out, d,
                ENTROPY=weight is not None, EDGES=_edges(q, d), MATCHED=_matched(q, d),
                **form.launch, enable_fp_fusion=True,
            )  # fmt: skip
    return row_max, logsum, entropy


def label_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """``q[label]`` in float32: 0 without a label, NaN for a bad one."""
    picked, block = _row_vector(logits), dispatch.LABELS
    for q, y, out in _planes(logits, labels.contiguous(), picked):
        with _current(q.device):
            _kernel("labels", "label_logit")[(block.programs(_rows(q)),)](
                q, y, _rows(q), *_sizes(q), *_strides(q), out,
                **block.launch, enable_fp_fusion=True,
            )  # fmt: skip
    return picked


def set_label_(dlogits: Tensor, labels: Tensor, elements: Tensor) -> None:
    """Writes one element a row, rounded once; rows without a good label keep what they have."""
    block = dispatch.LABELS
    for d, y, x in _planes(dlogits, labels.contiguous(), elements.contiguous()):
        with _current(d.device):
            _kernel("labels", "set_label")[(block.programs(_rows(d)),)](
                y, x, _rows(d), *_sizes(d), *_strides(d), d,
                **block.launch, enable_fp_fusion=True,
            )  # fmt: skip


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor``; the device looks at the factor and does nothing where it is 1."""
    for (d,) in _planes(dlogits):
        block = dispatch.row_grad(_family(d.device))
        with _current(d.device):
            _kernel("scale")[(min(_rows(d), dispatch.SCALE_PROGRAMS),)](
                factor, _rows(d), *_sizes(d), *_strides(d), d,
                EDGES=_edges(d), **block.launch, enable_fp_fusion=True,
            )  # fmt: skip


@functools.cache
def _kernel(module: str, function: str | None = None) -> Any:
    found = importlib.import_module(f"irl_ops.kernels.triton.{module}")
    return getattr(found, function or module)


@functools.cache
def _family(device: torch.device) -> str:
    """The device's rows in the tables of ``dispatch``."""
    if device.type == "cpu":
        return dispatch.OTHER  # interpreted
    import triton

    with _current(device):
        target = triton.runtime.driver.active.get_current_target()
    return dispatch.family(target.backend, target.arch, triton.__version__)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current stream of the current device, wherever the tensors are."""
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter's NumPy warns where GPUs are silent
    return torch.accelerator.device_index(device.index)


def _planes(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same rows as [outer, inner, V] and [outer, inner], without a copy.

    Almost always one set of views; one for each index of the leading axes where these do not fold
    into one. The first tensor has the columns; None stays None.
    """
    first = tensors[0]
    assert first is not None
    axes = first.dim() - 1
    if axes == 2:
        yield tensors
    elif axes < 2:
        yield from _planes(*(None if x is None else x.unsqueeze(0) for x in tensors))
    else:
        try:
            folded = [None if x is None else x.view(-1, *x.shape[2:]) for x in tensors]
        except RuntimeError:  # the two leading axes have unrelated strides
            for index in range(first.shape[0]):
                yield from _planes(*(None if x is None else x[index] for x in tensors))
        else:
            yield from _planes(*folded)


def _rows(logits: Tensor) -> int:
    return logits.shape[0] * logits.shape[1]


def _sizes(logits: Tensor) -> tuple[int, int]:
    return logits.shape[2], logits.shape[1]


def _strides(logits: Tensor) -> tuple[int, int]:
    return logits.stride(0), logits.stride(1)


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
