"""irl_ops.jax under JAX's transformations, and the derivatives that are refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irl_ops.jax as irl
from irl_ops import reference

from .jax_cases import BACKENDS

LOGITS = 3 * jax.random.normal(jax.random.key(0), (4, 6, 33))
LABELS = jax.random.randint(jax.random.key(1), (4, 6), 0, 33).at[0, 2].set(-100)
OPTIONS = dict(lam=0.3, gamma=0.9, entropy_coef=0.1)
WANTED = reference.iqlearn_loss(np.asarray(LOGITS), np.asarray(LABELS), **OPTIONS)
SUMMED = reference.iqlearn_loss(np.asarray(LOGITS), np.asarray(LABELS), reduction="sum", **OPTIONS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# a few roundings of numbers up to 10
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def loss(backend: str, **options: Any) -> Any:
    return partial(irl.iqlearn_loss, backend=backend, **{**OPTIONS, **options})


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jit_and_eager(backend: str, reduction: str) -> None:
    def total(logits: Any) -> Any:
        out = loss(backend, reduction=reduction)(logits, LABELS)
        return out / WANTED.metrics["tokens"] if reduction == "none" else out

    def unjitted(logits: Any) -> Any:
        with jax.disable_jit():
            return gradient(logits)

    gradient = jax.value_and_grad(lambda q: total(q).sum())
    for run in (gradient, jax.jit(gradient), unjitted):
        value, dlogits = run(LOGITS)
        close(value, WANTED.loss)
        close(dlogits, WANTED.dlogits)
    close(jax.grad(lambda q: -3.0 * total(q).sum())(LOGITS), -3 * WANTED.dlogits)


@every_backend
def test_vmap(backend: str) -> None:
    one = loss(backend, reduction="sum")
    close(jax.vmap(one)(LOGITS, LABELS).sum(), SUMMED.loss)
    close(jax.vmap(jax.grad(one))(LOGITS, LABELS), SUMMED.dlogits)
    close(jax.grad(lambda q: jax.vmap(one)(q, LABELS).sum())(LOGITS), SUMMED.dlogits)
    nested = jax.vmap(jax.vmap(jax.grad(one)))
    two = nested(LOGITS.reshape(2, 2, 6, 33), LABELS.reshape(2, 2, 6))
    close(two.reshape(LOGITS.shape), SUMMED.dlogits)
    # along another axis, and with an argument that is not mapped
    close(jax.vmap(jax.grad(one), (1, None), 1)(LOGITS[:1].swapaxes(0, 1), LABELS[0])[:, 0],
          jax.grad(one)(LOGITS[0], LABELS[0]))  # fmt: skip
    stats = jax.vmap(partial(irl.token_stats, backend=backend, gamma=0.9))(LOGITS, LABELS)
    expected = reference.token_stats(np.asarray(LOGITS), np.asarray(LABELS), gamma=0.9)
    close(stats.reward, expected.reward)
    numbers = jnp.array([0.0, 0.5])
    losses = jax.vmap(lambda lam: loss(backend, lam=lam)(LOGITS, LABELS))(numbers)
    close(losses, [loss(backend, lam=lam)(LOGITS, LABELS) for lam in numbers])


@every_backend
def test_scan_and_checkpoint(backend: str) -> None:
    one = jax.checkpoint(loss(backend, reduction="sum"))

    @jax.jit
    def total(logits: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            return carry + one(*row), None

        return jax.lax.scan(body, 0.0, (logits, LABELS))[0]

    value, dlogits = jax.value_and_grad(total)(LOGITS)
    close(value, SUMMED.loss)
    close(dlogits, SUMMED.dlogits)


@every_backend
def test_logits_that_live_on_are_left_alone(backend: str) -> None:
    @jax.jit
    def run(logits: Any) -> Any:
        value, dlogits = jax.value_and_grad(loss(backend))(logits, LABELS)
        return value, dlogits, logits + 0

    before = np.array(LOGITS)
    _, dlogits, kept = run(LOGITS)
    close(dlogits, WANTED.dlogits)
    np.testing.assert_array_equal(kept, before)
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ["iqlearn_loss", "mle_loss", "online_iqlearn_loss", "token_stats"])
def test_the_gradient_takes_the_storage_of_dead_logits(
    name: str, entropy_coef: float, dtype: str
) -> None:
    logits = jax.ShapeDtypeStruct((2, 64, 4096), dtype)
    labels = jnp.zeros((2, 64), jnp.int32)

    def total(logits: Any) -> Any:
        if name == "token_stats":
            return irl.token_stats(logits, labels).reward.sum()
        expert = [jnp.array([True, False])] if name.startswith("online") else []
        return getattr(irl, name)(logits, labels, *expert, entropy_coef=entropy_coef)

    program = jax.jit(jax.value_and_grad(total), donate_argnums=0).lower(logits).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= logits.size * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < 0.02 * memory.alias_size_in_bytes


def test_numbers_may_be_traced_and_compile_nothing_anew() -> None:
    traces = 0

    @jax.jit
    def step(logits: Any, lam: Any, gamma: Any, kappa: Any, items: Any) -> Any:
        nonlocal traces
        traces += 1
        return irl.iqlearn_loss(
            logits, LABELS, lam=lam, gamma=gamma, entropy_coef=kappa, num_items=items
        )

    for lam in (0.0, 0.1, 0.5):
        expected = reference.iqlearn_loss(
            np.asarray(LOGITS),
            np.asarray(LABELS),
            lam=lam,
            gamma=1 - lam,
            entropy_coef=lam,
            num_items=7,
        )
        close(step(LOGITS, lam, 1 - lam, lam, 7), expected.loss)
    assert traces == 1


def test_eager_calls_compile_once_for_all_numbers() -> None:
    from irl_ops.jax.forward import _run

    irl.iqlearn_loss(LOGITS, LABELS, lam=0.25)
    before = _run._cache_size()
    for lam in (0.0, 0.1, 0.5):
        irl.iqlearn_loss(LOGITS, LABELS, lam=lam, gamma=1 - lam)
    assert _run._cache_size() == before


@every_backend
def test_only_the_labels_segments_and_flags_have_to_be_arrays(backend: str) -> None:
    """NumPy arrays serve as well."""
    value = loss(backend)(np.asarray(LOGITS), np.asarray(LABELS, np.int64), num_items=np.int32(23))
    close(value * 23, SUMMED.loss)


# Derivatives that are not there


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(backend: str, reduction: str) -> None:
    def total(logits: Any) -> Any:
        return loss(backend, reduction=reduction)(logits, LABELS).sum()

    def of_gradient(logits: Any) -> Any:
        return (jax.grad(total)(logits) ** 2).sum()

    def of_entropy(logits: Any) -> Any:
        stats = lambda q: irl.token_stats(q, LABELS, backend=backend).entropy.sum()  # noqa: E731
        return jax.grad(stats)(logits).sum()

    message = "irl_ops: second derivatives are not implemented"
    for run in (jax.hessian(total), jax.grad(of_gradient), jax.jit(jax.grad(of_entropy))):
        with pytest.raises(NotImplementedError, match=message):
            run(LOGITS)


@every_backend
def test_forward_mode_is_refused(backend: str) -> None:
    stats = partial(irl.token_stats, labels=LABELS, backend=backend)
    for run in (partial(loss(backend), labels=LABELS), lambda q: stats(q).value):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(run, (LOGITS,), (LOGITS,))


CONSTANTS = {
    "lam": 0.1,
    "gamma": 0.9,
    "entropy_coef": 0.1,
    "z_loss": 0.1,
    "num_items": 3.0,
    "token_weights": jnp.ones(LABELS.shape),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_derivative_by_an_option_is_refused(name: str, reduction: str) -> None:
    if name == "num_items" and reduction == "none":
        return

    def total(option: Any) -> Any:
        return irl.iqlearn_loss(LOGITS, LABELS, reduction=reduction, **{name: option}).sum()

    for run in (jax.grad(total), jax.jit(jax.grad(total))):
        with pytest.raises(ValueError, match=f"{name} is differentiated.*stop_gradient"):
            run(CONSTANTS[name])
    stopped = jax.grad(lambda option: total(jax.lax.stop_gradient(option)))(CONSTANTS[name])
    assert not np.any(stopped)


def test_a_derivative_by_alpha_or_by_the_discount_of_rewards_is_refused() -> None:
    expert = jnp.array([True, False, True, False])
    with pytest.raises(ValueError, match="alpha is differentiated"):
        jax.grad(lambda alpha: irl.online_iqlearn_loss(LOGITS, LABELS, expert, alpha=alpha))(0.1)
    with pytest.raises(ValueError, match="gamma is differentiated"):
        jax.grad(lambda gamma: irl.token_stats(LOGITS, LABELS, gamma=gamma).reward.sum())(0.9)
