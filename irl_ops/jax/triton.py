"""The Triton row kernels in JAX programs for NVIDIA's GPUs, through jax-triton.

Kernels are compiled when a program is lowered, for the GPUs of the running backend. A program that
is lowered where there is none is compiled for IRL_OPS_COMPUTE_CAPABILITY, such as 9.0.

The functions are those of ``irl_ops.kernels.reference``. A gradient takes the storage of the
logits; where somebody reads them later, XLA copies them first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from irl_ops.jax import measured, private
from irl_ops.jax.columns import operations
from irl_ops.jax.operation import Function, array_like, device, vector_like
from irl_ops.kernels import reference
from irl_ops.kernels.reference.measures import RowMeasures
from irl_ops.kernels.triton import dispatch

WANTED = (
    "jax-triton >= 0.3.1, < 0.4; run pip install 'jax-triton>=0.3.1,<0.4' 'triton>=3.6' absl-py"
)


def unavailable(platform: str) -> str | None:
    """Why this backend cannot serve ``platform``, or None."""
    if platform not in ("cuda", "gpu"):
        return "jax-triton compiles the kernels for NVIDIA's GPUs"
    for name in ("jax_triton", "triton", "absl"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; it needs {WANTED}"
    version = importlib.metadata.version("jax-triton")
    if not (0, 3, 1) <= tuple(int(part) for part in version.split(".")[:3]) < (0, 4):
        return f"jax-triton is {version}; it needs {WANTED}"
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return "JAX has no CUDA plugin, which jax-triton needs; run pip install 'jax[cuda12]'"
    return private.missing()


# --- What an operation becomes for a compute capability; jax-triton puts results behind inputs ---


def _row_stats_on(ctx: Any) -> Function:
    capability = _capability(ctx)

    def run(q: jax.Array, labels: jax.Array, entropy: bool = False, **readout: Any) -> Any:
        out = [vector_like(q)] * (4 if entropy else 3)
        launch = dict(dispatch.row_stats(q.shape[-1], _family(capability)).launch)
        if not entropy:
            launch["entropy"] = None
        return _call(
            ("row_stats", "row_stats"), capability, q, [labels, *_sizes(q), *_strides(q)], out,
            grid=(_rows(q),), ENTROPY=entropy, EDGES=_edges(q), **launch, **readout,
        )  # fmt: skip

    return run


def _row_grad_on(ctx: Any) -> Function:
    capability = _capability(ctx)

    def run(q: jax.Array, *vectors: jax.Array, **readout: Any) -> Any:
        block = dispatch.row_grad(_family(capability))
        return _call(
            ("row_grad", "row_grad"), capability, q,
            [*vectors, *_sizes(q), *_strides(q), *_strides(q)], [array_like(q)],
            grid=(_rows(q), block.programs(q.shape[-1])), aliases={0: 0},
            EDGES=_edges(q), MATCHED=True, **block.launch, **readout,
        )[0]  # fmt: skip

    return run


def _row_stats_grad_on(ctx: Any) -> Function:
    capability = _capability(ctx)

    def run(
        q: jax.Array, alpha: jax.Array, beta: jax.Array, *weight: jax.Array, **readout: Any
    ) -> Any:
        entropy, capped = bool(weight), readout.get("softcap") is not None
        itemsize, of = q.dtype.itemsize, _family(capability)
        form = dispatch.row_stats_grad(q.shape[-1], itemsize, entropy, of, softcap=capped)
        name = "resident" if isinstance(form, dispatch.Resident) else "two_pass"
        # a vector of its own stands in for the entropy that is not computed: places have to match
        given = [alpha, beta, *(weight or (alpha,))]
        row_max, logsum, h, dlogits = _call(
            (name, "row_stats_grad"), capability, q,
            [*given, *_sizes(q), *_strides(q), *_strides(q)],
            [*[vector_like(q)] * 3, array_like(q)],
            grid=(_rows(q),), aliases={0: 3},
            ENTROPY=entropy, EDGES=_edges(q), MATCHED=True, **form.launch, **readout,
        )  # fmt: skip
        return row_max, logsum, h if entropy else None, dlogits

    return run


def _label_logit_on(ctx: Any) -> Function:
    """Gathered: a GPU reads single elements. By the kernel where logits are bent, whose tanh the
    others' is.
    """

    def run(q: jax.Array, labels: jax.Array, **readout: Any) -> Any:
        if not readout:
            return gathered(q, labels)
        block = dispatch.LABELS
        return _call(
            ("labels", "label_logit"), _capability(ctx), q,
            [labels, _rows(q), *_sizes(q), *_strides(q)], [vector_like(q)],
            grid=(block.programs(_rows(q)),), **block.launch, **readout,
        )[0]  # fmt: skip

    return run


def gathered(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """``q[label]`` of logits that are not bent."""
    vocab = logits.shape[-1]
    inside = jnp.clip(labels, 0, vocab - 1)[..., None]
    picked = jnp.take_along_axis(logits, inside, -1)[..., 0].astype(jnp.float32)
    return jnp.where(labels < 0, 0.0, jnp.where(labels >= vocab, jnp.nan, picked))


def scattered(
    dlogits: jax.Array,
    labels: jax.Array,
    elements: jax.Array,
    label_logit: jax.Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """The gradient with the elements at the labels replaced; others are dropped."""
    elements = reference.through_cap(elements, label_logit, logit_scale, softcap)
    vocab = dlogits.shape[-1]
    rows = dlogits.reshape(-1, vocab)
    column = jnp.where(labels < 0, vocab, labels).reshape(-1)
    values = elements.astype(dlogits.dtype).reshape(-1)
    places = rows.at[jnp.arange(len(rows)), column]  # one per row, so that no order is needed
    return places.set(values, mode="drop", unique_indices=True).reshape(dlogits.shape)


def _row_measures_on(ctx: Any) -> Function:
    capability = _capability(ctx)

    def run(
        q: jax.Array, ids: jax.Array, *given: jax.Array,
        names: tuple[str, ...] = (), wanted: tuple[str, ...] = (), **readout: Any,
    ) -> RowMeasures:  # fmt: skip
        types = measured.results(q, ids, wanted)
        nothing = jax.ShapeDtypeStruct((1,), jnp.float32)  # type: ignore[no-untyped-call]
        extras = bool(set(wanted) - {"entropy"})
        tiles = dispatch.row_measures(q.shape[-1], _family(capability), extras)
        arrays, flags = _view(dict(zip(names, given, strict=True)), ids)
        out = _call(
            ("measures", "row_measures"), capability, q,
            [ids, *arrays, *_sizes(q), *_strides(q), *_strides(q), ids.shape[-1]],
            [types.get(name, nothing) for name in RowMeasures._fields],
            grid=(_rows(q),), EDGES=_edges(q),
            ENTROPY="entropy" in types, SQUARES="log_sum_sq" in types, TOP="top1" in types,
            MEAN="kept" in types, **flags, **tiles.launch, **readout,
        )  # fmt: skip
        found = dict(zip(RowMeasures._fields, out, strict=True))
        return measured.named({name: found[name] for name in types})

    return run


def _row_measures_grad_on(ctx: Any) -> Function:
    capability = _capability(ctx)

    def run(
        q: jax.Array, ids: jax.Array, row_max: jax.Array, logsum: jax.Array, a: jax.Array,
        c: jax.Array, *given: jax.Array, names: tuple[str, ...] = (), **readout: Any,
    ) -> Any:  # fmt: skip
        block = dispatch.row_measures_grad(_family(capability))
        named = dict(zip(names, given, strict=True))
        arrays, flags = _view(named, ids)
        b, d, e = (named.get(name, ids) for name in ("b", "d", "e"))
        return _call(
            ("measures", "row_measures_grad"), capability, q,
            [ids, row_max, logsum, a, b, c, d, e, *arrays,
             *_sizes(q), *_strides(q), *_strides(q), *_strides(q), ids.shape[-1]],
            [array_like(q)],
            grid=(_rows(q), block.programs(q.shape[-1])), aliases={0: 0},
            EDGES=_edges(q), MATCHED=True, B="b" in named, D="d" in named, E="e" in named,
            **flags, **block.launch, **readout,
        )[0]  # fmt: skip

    return run


def _view(named: dict[str, jax.Array], ids: jax.Array) -> tuple[list[jax.Array], dict[str, Any]]:
    """What each row has of its own, and the flags; ``ids`` stand in for what it has not."""
    flags = {"row_scale": "SCALED", "keep_mask": "MASK", "keep_above": "ABOVE"}
    return [named.get(n, ids) for n in flags], {flag: n in named for n, flag in flags.items()}


def _call(
    name: tuple[str, str],
    capability: int,
    q: jax.Array,
    given: list[Any],
    out: list[Any],
    grid: tuple[int, ...],
    aliases: dict[int, int] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **launch: Any,
) -> tuple[jax.Array, ...]:
    import jax_triton

    module, function = name
    kernel = getattr(importlib.import_module(f"irl_ops.kernels.triton.{module}"), function)
    made: tuple[jax.Array, ...] = jax_triton.triton_call(
        q, *given, kernel=kernel, out_shape=tuple(out), grid=grid, name=f"irl_{function}",
        compute_capability=capability, input_output_aliases=aliases,
        SCALE=logit_scale, SOFTCAP=softcap or 0.0, **launch,  # jax-triton knows no defaults
    )  # fmt: skip
    return made


def _capability(ctx: Any) -> int:
    """10 times the compute capability that is lowered for."""
    target = device(ctx, "gpu") or device(ctx, "cuda")
    named = os.environ.get("IRL_OPS_COMPUTE_CAPABILITY")
    if target is not None:
        named = str(target.compute_capability)
    if named is None:
        raise ValueError(
            "backend 'triton' compiles for the GPU at hand, and there is none: set "
            "IRL_OPS_COMPUTE_CAPABILITY to that of the GPU to lower for, such as 9.0"
        )
    return round(10 * float(named))


@functools.cache
def _family(capability: int) -> str:
    import triton  # its own word: packages' metadata may be of another one on the path

    return dispatch.family("cuda", capability, triton.__version__)


def _rows(q: jax.Array) -> int:
    return math.prod(q.shape[:-1])


def _sizes(q: jax.Array) -> tuple[int, int]:
    """V, and how many rows share the inner stride: all."""
    return q.shape[-1], _rows(q)


def _strides(q: jax.Array) -> tuple[int, int]:
    return 0, q.shape[-1]


def _edges(q: jax.Array) -> bool:
    """Whether some row starts or ends off a 16-byte boundary."""
    return bool(q.shape[-1] * q.dtype.itemsize % 16)


KERNELS: dict[str, Callable[[Any], Function]] = {
    "row_stats": _row_stats_on,
    "row_grad": _row_grad_on,
    "row_stats_grad": _row_stats_grad_on,
    "label_logit": _label_logit_on,
    "set_label": lambda ctx: scattered,
    "row_measures": _row_measures_on,
    "row_measures_grad": _row_measures_grad_on,
}


def _every(ctx: Any) -> dict[str, Function]:
    return {name: kernel(ctx) for name, kernel in KERNELS.items()}


(row_stats, row_grad, row_stats_grad, label_logit, set_label, row_measures, row_measures_grad) = (
    operations(_every, cuda=lambda name: KERNELS[name])
)
