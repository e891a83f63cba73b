"""The Pallas row kernels as operations that are lowered for the TPU generation at hand.

Which kernel an operation becomes is decided when a program is lowered, by the kind of the devices
that it is lowered for: those of the running backend, or of a topology that is compiled for ahead of
time. A program exported without devices gets what fits every generation. On a CPU the kernels are
interpreted, as they would be compiled for ``INTERPRETED_AS``.

XLA's own code serves where V is no multiple of 128, since XLA lays out such logits by columns, and
a kernel, which wants them by rows, would wait for a copy; and in programs that XLA partitions
over several TPUs, since libtpu partitions no kernels. Inside ``shard_map`` rows are parted already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops.jax import measured, private
from irl_ops.jax.operation import Function, device, operation
from irl_ops.kernels import reference
from irl_ops.kernels.pallas.generations import (
    GENERATIONS,
    MOST_IDS,
    SMALLEST,
    Generation,
    generation,
    in_whole_tiles,
)
from irl_ops.kernels.reference.measures import RowMeasures, Slopes

INTERPRETED_AS = GENERATIONS[-1]
LANES = 128


def unavailable(platform: str) -> str | None:
    """Why this backend cannot serve ``platform``, or None."""
    if platform in ("tpu", "cpu"):
        return private.missing()
    return "the Pallas kernels are compiled for TPUs, and interpreted on a CPU"


def row_stats(
    logits: jax.Array, labels: jax.Array, entropy: bool = False, **readout: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """``(row_max, logsum, label_logit, entropy)``; see ``irl_ops.kernels.reference``."""
    row_max, logsum, picked, h = _row_stats(_widened(logits), labels, entropy, **readout)
    return row_max, logsum, picked, h


def row_grad(
    logits: jax.Array,
    labels: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    b: jax.Array | None,
    c: jax.Array,
    **readout: Any,
) -> jax.Array:
    """``p_j (A + B log p_j) + C 1{j = label}``: by XLA where it fuses that into its readers.

    Where the logits come from a matmul, XLA computes an elementwise gradient inside the two matmuls
    that read it, and the gradient never lies in memory. By the compiler's own count that moves
    fewer bytes than a kernel on v4 to v6e and in float32 on v7x, and more in bfloat16 on v7x. None
    for B is 0, and costs less than an array of zeros.
    """
    vectors = (labels, row_max, logsum, a, c, b)
    made: jax.Array = _row_grad(_widened(logits), *vectors, **readout)
    return made.astype(logits.dtype)


def row_stats_grad(
    logits: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    entropy_weight: jax.Array | None = None,
    **readout: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """``(row_max, logsum, entropy, dlogits)`` in one read and one write."""
    row_max, logsum, h, dlogits = _row_stats_grad(
        _widened(logits), alpha, beta, entropy_weight, **readout
    )
    return row_max, logsum, h, dlogits.astype(logits.dtype)


def row_measures(
    logits: jax.Array, ids: jax.Array, wanted: tuple[str, ...] = (), **view: Any
) -> RowMeasures:
    """See ``irl_ops.kernels.reference.measures``; more than ``MOST_IDS`` a row are left to XLA."""
    found: RowMeasures = _row_measures(_widened(logits), ids, wanted, **view)
    return found


def row_measures_grad(
    logits: jax.Array,
    ids: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    slopes: Slopes,
    **view: Any,
) -> jax.Array:
    """The gradient in the logits' dtype; by XLA where ``row_grad`` is, for the same reason."""
    vectors = (row_max, logsum, slopes)
    made: jax.Array = _row_measures_grad(_widened(logits), ids, *vectors, **view)
    return made.astype(logits.dtype)


def label_logit(logits: jax.Array, labels: jax.Array, **readout: Any) -> jax.Array:
    """``q[label]``: reads one tile per row where the logits consist of whole tiles."""
    pick = _label_logit if in_whole_tiles(logits.shape) else reference.label_logit
    picked: jax.Array = pick(_widened(logits), labels, **readout)
    return picked


def set_label(
    dlogits: jax.Array,
    labels: jax.Array,
    elements: jax.Array,
    label_logit: jax.Array | None = None,
    **readout: Any,
) -> jax.Array:
    """The gradient with the elements at the labels replaced, in its own storage, likewise."""
    tiled = in_whole_tiles(dlogits.shape) and dlogits.dtype != jnp.float16
    replace = _set_label if tiled else reference.set_label
    replaced: jax.Array = replace(dlogits, labels, elements, label_logit, **readout)
    return replaced


def _widened(logits: jax.Array) -> jax.Array:
    """TPUs have no float16; it is computed on in a float32 copy."""
    return logits.astype(jnp.float32) if logits.dtype == jnp.float16 else logits


# --- The kernels, which need Pallas: imported when one of them is lowered ---


Kernel = Callable[[Generation, bool, str], Function | None]
"""For a generation, interpreted or not, and a dtype; None where XLA's own code serves."""


def _operation(plain: Function, kernel: Kernel) -> Function:
    return operation(plain, **_chosen(plain, kernel))


def _chosen(plain: Function, kernel: Kernel) -> dict[str, Any]:
    """What is lowered, by platform; ``plain`` where there are no rows as well."""

    def fits(ctx: Any) -> bool:
        # only the row measures take arrays of integers or masks with one axis more
        logits, given, *_ = ctx.avals_in
        many = given.shape[-1] if given.ndim == logits.ndim else 1
        return 0 not in logits.shape[:-1] and 0 < many <= MOST_IDS

    def compiled(ctx: Any) -> Function:
        vocab = ctx.avals_in[0].shape[-1]
        if not fits(ctx) or vocab % LANES or private.partitions(ctx) > 1:
            return plain
        target = device(ctx, "tpu")
        of = SMALLEST if target is None else generation(target.device_kind)
        return kernel(of, False, ctx.avals_in[0].dtype.name) or plain

    def interpreted(ctx: Any) -> Function:
        if not fits(ctx):
            return plain
        return kernel(INTERPRETED_AS, True, ctx.avals_in[0].dtype.name) or plain

    return {"tpu": compiled, "cpu": interpreted}


def _row_stats_kernel(of: Generation, interpret: bool, dtype: str) -> Function | None:
    from irl_ops.kernels.pallas.row_stats import row_stats

    return functools.partial(row_stats, of=of, interpret=interpret)


def _row_grad_kernel(of: Generation, interpret: bool, dtype: str) -> Function | None:
    from irl_ops.kernels.pallas.row_grad import row_grad

    if dtype in of.gradient_in_xla and not interpret:
        return None

    return functools.partial(_b_last, functools.partial(row_grad, of=of, interpret=interpret))


def _row_grad_in_xla(
    logits: jax.Array,
    labels: jax.Array,
    row_max: jax.Array,
    logsum: jax.Array,
    a: jax.Array,
    c: jax.Array,
    b: jax.Array | None = None,
    **readout: Any,
) -> jax.Array:
    from irl_ops.kernels.pallas.row_grad import row_grad_in_xla

    made: jax.Array = _b_last(row_grad_in_xla, logits, labels, row_max, logsum, a, c, b, **readout)
    return made


def _b_last(
    row_grad: Function,
    q: Any,
    labels: Any,
    row_max: Any,
    logsum: Any,
    a: Any,
    c: Any,
    b: Any = None,
    **readout: Any,
) -> Any:
    """B last: an operation's arguments that are None are left out."""
    return row_grad(q, labels, row_max, logsum, a, b, c, **readout)


def _row_stats_grad_kernel(of: Generation, interpret: bool, dtype: str) -> Function:
    from irl_ops.kernels.pallas.row_stats_grad import row_stats_grad

    return functools.partial(row_stats_grad, of=of, interpret=interpret)


def _row_measures_kernel(of: Generation, interpret: bool, dtype: str) -> Function:
    from irl_ops.kernels.pallas.row_measures import row_measures

    def run(
        q: Any, ids: Any, *given: Any, names: Any = (), wanted: Any = (), **readout: Any
    ) -> RowMeasures:
        view = dict(zip(names, given, strict=True))
        return row_measures(q, ids, wanted, **view, **readout, of=of, interpret=interpret)

    return run


def _row_measures_grad_kernel(of: Generation, interpret: bool, dtype: str) -> Function | None:
    from irl_ops.kernels.pallas.row_measures_grad import row_measures_grad

    if dtype in of.gradient_in_xla and not interpret:
        return None

    def run(
        q: Any, ids: Any, row_max: Any, logsum: Any, a: Any, c: Any, *given: Any,
        names: Any = (), **readout: Any,
    ) -> jax.Array:  # fmt: skip
        slopes, view = measured.slopes_and_view(a, c, dict(zip(names, given, strict=True)))
        options = readout | view | {"of": of, "interpret": interpret}
        return row_measures_grad(q, ids, row_max, logsum, slopes, **options)

    return run


def _label_logit_kernel(of: Generation, interpret: bool, dtype: str) -> Function:
    from irl_ops.kernels.pallas.labels import label_logit

    return functools.partial(label_logit, interpret=interpret)


def _set_label_kernel(of: Generation, interpret: bool, dtype: str) -> Function:
    from irl_ops.kernels.pallas.labels import set_label

    return functools.partial(set_label, interpret=interpret)


_row_stats = _operation(reference.row_stats, _row_stats_kernel)
_row_grad = _operation(_row_grad_in_xla, _row_grad_kernel)
_row_stats_grad = _operation(reference.row_stats_grad, _row_stats_grad_kernel)
_label_logit = _operation(reference.label_logit, _label_logit_kernel)
_set_label = _operation(reference.set_label, _set_label_kernel)
_row_measures = measured.measures_operation(**_chosen(measured.row_measures, _row_measures_kernel))
_row_measures_grad = measured.gradient_operation(
    **_chosen(measured.row_measures_grad, _row_measures_grad_kernel)
)
