"""Loss and gradient in JAX programs on the default device, beside a read and a write, and peers.

Two cases. In a training step nobody reads the logits after the loss: here they are donated to every
program, and the floor negates them in place. Where they live on, every program needs memory for the
gradient beside them, and the floor is a copy.

And a last layer, whose logits are never stored: beside the bare matrix products of the same chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import irl_ops.jax as irl
from irl_ops import reference

from .contest import Contest, Contestant

ON_CPU = jax.default_backend() == "cpu"
SHAPE = (2, 512, 32768) if ON_CPU else (4, 1024, 128256)
WIDTH, CHUNK = (256, 256) if ON_CPU else (4096, 1024)
LAM, GAMMA = 0.1, 1.0


def plain_iqlearn(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss as one would write it in jax.numpy."""
    q = logits.astype(jnp.float32)
    value = jax.nn.logsumexp(q, axis=-1)
    q_a = jnp.take_along_axis(q, labels[..., None], axis=-1)[..., 0]
    ahead = jnp.concatenate([value[..., 1:], jnp.zeros_like(value[..., :1])], axis=-1)
    return jnp.mean(LAM * (q_a - GAMMA * ahead) ** 2 - (q_a - value))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    ).mean()


iqlearn = partial(irl.iqlearn_loss, lam=LAM, gamma=GAMMA)
LOSSES: dict[str, Callable[..., Any]] = {
    "IQLearn": iqlearn,
    "MLE": irl.mle_loss,
    "IQLearn, reference": partial(iqlearn, backend="reference"),
    "IQLearn, plain jnp": plain_iqlearn,
    "optax cross_entropy": cross_entropy,
}


def batch(dtype: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    logits = 3 * jax.random.normal(jax.random.key(0), shape)
    labels = jax.random.randint(jax.random.key(1), shape[:-1], 0, shape[-1])
    return logits.astype(dtype), labels


@pytest.mark.parametrize("case", ["logits are dead", "logits live on"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_in_jax(dtype, case, benchmark, report, pytestconfig) -> None:
    small = batch(dtype, (2, 8, SHAPE[-1]))
    wanted = reference.iqlearn_loss(*(np.asarray(x) for x in small), lam=LAM, gamma=GAMMA)
    for name in ("IQLearn", "IQLearn, reference", "IQLearn, plain jnp"):
        value = jax.jit(LOSSES[name])(*small)
        np.testing.assert_allclose(value, wanted.loss, rtol=1e-5, err_msg=name)

    logits, labels = batch(dtype, SHAPE)
    copy = jax.jit(jnp.copy)
    dead = case == "logits are dead"
    floor = "negated in place" if dead else "copy"
    programs = {floor: lambda q, _: -q if dead else jnp.copy(q)}
    programs |= {name: jax.value_and_grad(loss) for name, loss in LOSSES.items()}

    def contestant(name: str, program: Callable[..., Any]) -> Contestant:
        step = jax.jit(program, donate_argnums=0 if dead else ())
        return Contestant(
            name,
            lambda given: jax.block_until_ready(step(given, labels)),
            lambda: copy(logits).block_until_ready() if dead else logits,
        )

    contest = Contest([contestant(name, program) for name, program in programs.items()])
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results([floor, "MLE", "IQLearn"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    shape, device = " x ".join(map(str, SHAPE)), jax.devices()[0].device_kind
    title = f"loss and gradient, {case}, {dtype} {shape}, {rounds} rounds"
    report(f"JAX {jax.__version__} on {device}: {title}", results)


def products(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Per chunk the product that makes the logits, and the two that take their gradient back."""
    del labels

    def body(dweight: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = rows @ weight.T
        return dweight + logits.T @ rows, logits @ weight

    chunks = hidden.reshape(-1, CHUNK, WIDTH)
    dweight, dhidden = jax.lax.scan(body, jnp.zeros_like(weight), chunks)
    return dhidden.reshape(hidden.shape), dweight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_in_jax(dtype, benchmark, report, pytestconfig) -> None:
    rows, vocab = SHAPE[:-1], SHAPE[-1]
    hidden = jax.random.normal(jax.random.key(0), (*rows, WIDTH)).astype(dtype)
    weight = (jax.random.normal(jax.random.key(1), (vocab, WIDTH)) / WIDTH**0.5).astype(dtype)
    labels = jax.random.randint(jax.random.key(2), rows, 0, vocab)
    ours = partial(irl.linear_iqlearn_loss, lam=LAM, gamma=GAMMA, accumulate="weight")
    losses = {
        "linear IQLearn": partial(ours, chunk_size=CHUNK),
        "linear MLE": partial(irl.linear_mle_loss, accumulate="weight", chunk_size=CHUNK),
        "IQLearn of stored logits": lambda h, w, y: iqlearn(h @ w.T, y),
        "optax cross_entropy": lambda h, w, y: cross_entropy(h @ w.T, y),
    }
    programs: dict[str, Callable[..., Any]] = {"three products": products}
    programs |= {name: jax.value_and_grad(loss, (0, 1)) for name, loss in losses.items()}
    given, logits = (hidden, weight, labels), math.prod(SHAPE) * jnp.dtype(dtype).itemsize
    compiled = {name: jax.jit(run).lower(*given).compile() for name, run in programs.items()}

    memory = {n: p.memory_analysis().temp_size_in_bytes / logits for n, p in compiled.items()}

    def contestant(name: str, program: Callable[..., Any]) -> Contestant:
        return Contestant(name, lambda _: jax.block_until_ready(program(*given)))

    contest = Contest([contestant(*item) for item in compiled.items()], warmup=1)
    rounds = pytestconfig.getoption("--rounds")
    benchmark.pedantic(contest, rounds=rounds + contest.warmup, iterations=1)
    results = contest.results(["three products", "linear MLE"])
    benchmark.extra_info.update({r.name: r.ratios for r in results})
    benchmark.extra_info["XLA's temporary memory / size of the logits"] = memory
    shape, device = f"{' x '.join(map(str, SHAPE))}, width {WIDTH}", jax.devices()[0].device_kind
    title = f"last layer and loss, {dtype} {shape}, chunks of {CHUNK}, {rounds} rounds"
    note = ", ".join(f"{name} {size:.3f}" for name, size in memory.items())
    title = f"JAX {jax.__version__} on {device}: {title}"
    report(f"{title}\nXLA's temporary memory / size of the logits: {note}", results)
