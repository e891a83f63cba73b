"""Programs compiled for TPUs that are not here: a training step, and a gradient on its own.

libtpu holds the compilers of all generations, and describes devices without having any.
``aot_tpu.py`` sets the environment that it needs, before jax is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import irl_ops.jax as irl
from irl_ops import algebra

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
BATCH, LENGTH, WIDTH = 4, 1024, 2048
ROWS, DEEP, TALL, CHUNK = 16384, 4096, 128256, 1024  # of logits that are never stored
LAM, GAMMA = 0.1, 0.99
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Compiled(NamedTuple):
    """What the compiler says of a program, in multiples of its logits."""

    temporaries: float
    bytes: float  # read and written, those of a kernel as its blocks have them
    kernels: int  # Mosaic kernels in the lowered program


def compiled(
    program: Callable[..., Any], on: str, dtype: str, vocab: int, width: int = WIDTH
) -> Compiled:
    """``program(hidden, weight, labels)`` on one device of a generation."""
    sharding = SingleDeviceSharding(topology(on).devices[0])

    def like(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    given = like(BATCH, LENGTH, width), like(width, vocab), like(BATCH, LENGTH, dtype="int32")
    lowered = jax.jit(program).lower(*given)
    executable = lowered.compile()
    size = BATCH * LENGTH * vocab * jnp.dtype(dtype).itemsize
    return Compiled(
        executable.memory_analysis().temp_size_in_bytes / size,
        executable.cost_analysis()["bytes accessed"] / size,
        lowered.as_text().count("@tpu_custom_call"),
    )


class Chunked(NamedTuple):
    """What the compiler says of a loss in chunks."""

    temporaries: float  # in multiples of the logits
    products: float  # the operations of one chunk in every loop


def linear(on: str, reduction: str) -> Chunked:
    """Loss and gradients of a last layer in bfloat16, whose logits are never stored."""
    sharding = SingleDeviceSharding(topology(on).devices[0])

    def like(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    given = like(BATCH, ROWS // BATCH, DEEP), like(TALL, DEEP)
    labels = like(BATCH, ROWS // BATCH, dtype="int32")
    options = dict(lam=LAM, gamma=GAMMA, chunk_size=CHUNK, accumulate="weight")

    def loss(*layer: jax.Array) -> jax.Array:
        return irl.linear_iqlearn_loss(*layer, reduction=reduction, **options).sum()

    executable = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given, labels).compile()
    return Chunked(
        executable.memory_analysis().temp_size_in_bytes / (ROWS * TALL * 2),
        executable.cost_analysis()["flops"] / (2 * CHUNK * TALL * DEEP),
    )


@functools.cache
def topology(on: str) -> Any:
    return topologies.get_topology_desc(TOPOLOGIES[on], platform="tpu")


def step(loss: Loss) -> Callable[..., Any]:
    """Loss and gradients of a last layer, whose logits come from a matmul and go into two."""

    def of_logits(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        return loss(hidden @ weight, labels)

    return jax.value_and_grad(of_logits, argnums=(0, 1))


def logits_alone(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    """What comes before a gradient on its own."""
    return hidden @ weight


def gradient_alone(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    """Loss and gradient of the logits in a single pass, for a reader that is not a matmul."""
    loss = functools.partial(irl.iqlearn_loss, lam=LAM, gamma=GAMMA, inplace=True)
    logits = logits_alone(hidden, weight, labels)
    value_and_gradient: tuple[Any, ...] = jax.value_and_grad(loss)(logits, labels)
    return value_and_gradient


fused = functools.partial(irl.iqlearn_loss, lam=LAM, gamma=GAMMA)


def selecting(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss in plain jnp, the label's logit selected by a comparison with an iota."""
    q = logits.astype(jnp.float32)
    at_label = jnp.arange(q.shape[-1], dtype=labels.dtype) == labels[..., None]
    return _plain(q, labels, jnp.where(at_label, q, 0.0).sum(-1))


def gathering(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss in plain jnp as it is usually written."""
    q = logits.astype(jnp.float32)
    return _plain(q, labels, jnp.take_along_axis(q, labels[..., None], -1)[..., 0])


def _plain(q: jax.Array, labels: jax.Array, label_logit: jax.Array) -> jax.Array:
    rows = algebra.align(jnp, labels, q.shape[-1], algebra.Sequence())
    value, correct = jax.nn.logsumexp(q, -1), jnp.zeros(labels.shape, bool)
    return _iqlearn(
        rows, algebra.Statistics(value, label_logit, label_logit - value, None, correct)
    )


def _iqlearn(rows: algebra.Rows, stats: algebra.Statistics) -> jax.Array:
    terms = algebra.Terms(td=LAM, gamma=GAMMA)
    loss = algebra.weigh(jnp, rows.kind, terms, algebra.Weighting())
    step = algebra.transition(jnp, rows.kind, stats, GAMMA, algebra.Heads())
    return algebra.row_losses(jnp, loss, stats, step).sum()
