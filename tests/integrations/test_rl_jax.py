"""The functions under the names of RL trainers in JAX, against their documented formula."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from irl_ops.integrations import rl_jax


def test_selective_log_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(2, 5, 300)).astype(np.float32)
    ids, above = rng.integers(300, size=(2, 5)), rng.normal(size=(2, 5))

    @jax.jit
    def run(logits: jax.Array) -> jax.Array:
        logprobs = rl_jax.selective_log_softmax(logits, ids)
        return (logprobs * above).sum(), logprobs

    (_, logprobs), gradient = jax.value_and_grad(run, has_aux=True)(jnp.asarray(logits))
    wide = torch.from_numpy(logits).double().requires_grad_()
    plain = wide.log_softmax(-1).gather(-1, torch.from_numpy(ids)[..., None])[..., 0]
    (slope,) = torch.autograd.grad((plain * torch.from_numpy(above)).sum(), wide)
    # float32 roundings of logits of a few units, by rows of 300
    np.testing.assert_allclose(logprobs, plain.detach(), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=2e-6)
