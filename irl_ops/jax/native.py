"""The C++ row kernels in JAX programs on CPUs.

XLA calls the kernels itself, on its own buffers and with its own threads. A build of the extension
without XLA's headers, or with newer ones than the running jaxlib's, is reached by a callback to
Python: the results are the same bits, and the gradient is copied once more.

The functions are those of ``irl_ops.kernels.reference``. A gradient takes the storage of the
logits; where somebody reads them later, XLA copies them first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from irl_ops.jax import measured, private
from irl_ops.jax.columns import operations
from irl_ops.jax.operation import Function, array_like, vector_like
from irl_ops.kernels.reference.measures import RowMeasures

try:
    from irl_ops import _native
except ImportError as error:  # a source tree that was not built; unavailable() says so
    _import_error: ImportError | None = error
else:
    _import_error = None


def unavailable(platform: str) -> str | None:
    """Why this backend cannot serve ``platform``, or None."""
    if _import_error is not None:
        return (
            f"the extension irl_ops._native does not load ({_import_error}); "
            "run pip install . in a clone of irl_ops"
        )
    if platform != "cpu":
        return "the C++ kernels run on the CPU"
    if private.missing() is None and not called_by_xla():
        return private.callback_missing()
    return private.missing()


# --- What an operation becomes: a call from XLA, or a call through Python ---


def _run_row_stats(q: jax.Array, labels: jax.Array, entropy: bool = False, **readout: Any) -> Any:
    return _call("row_stats", [vector_like(q)] * (4 if entropy else 3), q, labels, **readout)


def _run_row_grad(q: jax.Array, *vectors: jax.Array, **readout: Any) -> Any:
    return _call("row_grad", [array_like(q)], q, *vectors, aliases={0: 0}, **readout)[0]


def _run_row_stats_grad(q: jax.Array, *coefficients: jax.Array, **readout: Any) -> Any:
    out = [vector_like(q)] * 2 + [array_like(q)] + [vector_like(q)] * (len(coefficients) - 2)
    row_max, logsum, dlogits, *h = _call(
        "row_stats_grad", out, q, *coefficients, aliases={0: 2}, **readout
    )
    return row_max, logsum, *h, dlogits


def _run_label_logit(q: jax.Array, labels: jax.Array, **readout: Any) -> Any:
    return _call("label_logit", [vector_like(q)], q, labels, **readout)[0]


def _run_set_label(y: jax.Array, *vectors: jax.Array, **readout: Any) -> Any:
    return _call("set_label", [array_like(y)], y, *vectors, aliases={0: 0}, **readout)[0]


def _run_row_measures(
    q: jax.Array,
    ids: jax.Array,
    *given: jax.Array,
    names: tuple[str, ...] = (),
    wanted: tuple[str, ...] = (),
    **readout: Any,
) -> RowMeasures:
    types = measured.results(q, ids, wanted)
    words = {"given": " ".join(names), "wanted": " ".join(list(types)[3:])}
    found = _call("row_measures", list(types.values()), q, ids, *given, words=words, **readout)
    return measured.named(dict(zip(types, found, strict=True)))


def _run_row_measures_grad(
    q: jax.Array, *given: jax.Array, names: tuple[str, ...] = (), **readout: Any
) -> Any:
    words = {"given": " ".join(names)}
    out = [array_like(q)]
    return _call("row_measures_grad", out, q, *given, aliases={0: 0}, words=words, **readout)[0]


def _call(
    name: str,
    out: list[Any],
    q: jax.Array,
    *given: jax.Array,
    aliases: dict[int, int] | None = None,
    words: dict[str, str] | None = None,
    **readout: Any,
) -> tuple[jax.Array, ...]:
    told: dict[str, Any] = {key: np.float32(x or 0.0) for key, x in readout.items()}  # 0: no cap
    told |= words or {}
    if called_by_xla():
        target = jax.ffi.ffi_call(f"irl_ops_{name}", out, input_output_aliases=aliases)
        return tuple(target(q, *given, **told))
    from irl_ops.jax.callback import through_python

    return through_python(name, out, q, *given, **told)


@functools.cache
def called_by_xla() -> bool:
    """Whether XLA can call the kernels itself; if so, they are made known to it."""
    built = _native.xla_api
    if built is None:
        return False
    running = _running_api()
    # XLA takes targets that were built with its own headers or older ones
    if built[0] != running[0] or built[1] > running[1]:
        return False
    for name, target in _native.xla_targets().items():
        jax.ffi.register_ffi_target(f"irl_ops_{name}", target, platform="cpu")
    return True


def _running_api() -> tuple[int, int]:
    """The version of XLA's FFI in the jaxlib that runs."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


RUN: dict[str, Any] = {
    "row_stats": _run_row_stats,
    "row_grad": _run_row_grad,
    "row_stats_grad": _run_row_stats_grad,
    "label_logit": _run_label_logit,
    "set_label": _run_set_label,
    "row_measures": _run_row_measures,
    "row_measures_grad": _run_row_measures_grad,
}


def _on_cpu(run: Function) -> Callable[[Any], Function]:
    def choose(ctx: Any) -> Function:
        if private.partitions(ctx) > 1 and not called_by_xla():
            raise NotImplementedError(
                "XLA cannot call this build of irl_ops._native itself, and JAX cannot partition a "
                "callback over devices; accepted: shard_map, backend='reference', or a build with "
                "XLA's headers (see IRL_OPS_XLA_INCLUDE in setup.py)"
            )
        return run

    return choose


(row_stats, row_grad, row_stats_grad, label_logit, set_label, row_measures, row_measures_grad) = (
    operations(lambda ctx: RUN, cpu=lambda name: _on_cpu(RUN[name]))
)
