"""The losses of irl_ops.jax.sft against plain float64 formulas and their autograd."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import irl_ops.jax as irl
from irl_ops.jax import sft

from .. import naive_sft
from ..sft_cases import SFTCase, check, sft_cases
from .jax_cases import array, tensor

NAMES = sorted(naive_sft.FORMULAS)
V = 20


@given(case=sft_cases())
@settings(max_examples=15)  # each is a program of its own to compile
def test_loss_and_gradient(case: SFTCase) -> None:
    function, labels = getattr(sft, case.name), array(case.labels)
    options = {name: array(x) for name, x in case.options.items()}
    loss, pull = jax.vjp(lambda x: function(x, labels, **options), array(case.logits))
    (gradient,) = pull(jnp.broadcast_to(jnp.asarray(array(case.upstream), loss.dtype), loss.shape))
    check(tensor(loss), tensor(gradient), case)


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = rng.integers(V, size=(2, 6))
    labels[:, :1] = -100
    return rng.normal(scale=2.0, size=(2, 6, V)).astype(np.float32), labels


def extra(name: str, x: Any) -> dict[str, Any]:
    key = naive_sft.OTHER.get(name)
    return {} if key is None else {key: x}


def test_all_in_one_program_from_one_pass_over_a_linear_layer() -> None:
    """Jitted, of statistics in the place of logits, which are never stored."""
    _, labels = batch()
    rng = np.random.default_rng(6)
    hidden, weight = (rng.normal(size=s).astype(np.float32) for s in ((2, 6, 9), (V, 9)))
    other = np.full((2, 6), -1.5, np.float32)

    @jax.jit
    def total(hidden: Any, weight: Any) -> Any:
        stats = irl.linear_token_stats(hidden, weight, labels, shift=True, chunk_size=4)
        losses = {
            name: getattr(sft, name)(
                stats, **extra(name, other), **({"vocab_size": V} if name == "eaft_loss" else {})
            )
            for name in NAMES
        }
        return sum(losses.values()), losses

    (_, losses), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)
    h, w = (torch.from_numpy(x).double().requires_grad_() for x in (hidden, weight))
    y = torch.from_numpy(labels)
    plain = {
        name: naive_sft.loss(name, h @ w.T, y, shift=True, **extra(name, torch.from_numpy(other)))[
            0
        ]
        for name in NAMES
    }
    # a dozen float32 roundings of sums of nine products, through slopes of a few units
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name in NAMES:
        np.testing.assert_allclose(losses[name], plain[name].item(), **close)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(sum(plain.values()), (h, w)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, **close)


def test_endogenous_reward() -> None:
    logits, labels = batch()
    stats = irl.token_stats(logits, labels, gamma=0.9)
    np.testing.assert_array_equal(sft.endogenous_reward(logits, labels, gamma=0.9), stats.reward)
    np.testing.assert_array_equal(sft.endogenous_reward(stats), stats.reward)


def test_errors() -> None:
    logits, labels = batch()
    stats = irl.token_stats(logits, labels, entropy=False)
    other = np.zeros((2, 6), np.float32)
    for wrong, message in (
        (lambda: sft.dft_loss(logits), "labels are missing"),
        (lambda: sft.dft_loss(stats, labels), "labels beside statistics"),
        (lambda: sft.eaft_loss(stats), "vocab_size is missing"),
        (lambda: sft.eaft_loss(stats, vocab_size=V), "entropy=True"),
        (lambda: sft.power_loss(logits, labels, q=-0.5), "q is -0.5"),
        (lambda: sft.psft_loss(logits, labels, old_logprob=other[:1]), "old_logprob has shape"),
        (
            lambda: jax.grad(lambda x: sft.asft_loss(logits, labels, reference_logprob=x))(other),
            "reference_logprob is differentiated",
        ),
        (lambda: sft.endogenous_reward(logits), "labels are missing"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
