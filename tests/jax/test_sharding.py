"""Logits that are spread over devices: four of them, on one CPU.

pytest starts this file as a program: the number of devices is fixed when JAX is first used.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

B, T, V = 4, 8, 256


def main(backend: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import irl_ops.jax as irl
    from irl_ops import reference

    assert len(jax.devices()) == 4
    logits = 3 * jax.random.normal(jax.random.key(0), (B, T, V))
    labels = jax.random.randint(jax.random.key(1), (B, T), 0, V).at[1, 3].set(-100)
    options = dict(lam=0.3, gamma=0.9, entropy_coef=0.1)
    wanted = reference.iqlearn_loss(np.asarray(logits), np.asarray(labels), **options)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # a few roundings
    loss = partial(irl.iqlearn_loss, backend=backend, **options)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    over_rows = [("data",), (("data", "model"),), ("data", "model")]
    for axes in [*over_rows, (None, None, "model"), ("data", None, "model")]:
        q, y = place(logits, *axes), place(labels, *axes[:2])
        for run in (
            loss,
            lambda q, y: loss(q, y, reduction="none").sum() / wanted.metrics["tokens"],
        ):
            compiled = jax.jit(jax.value_and_grad(run)).lower(q, y).compile()
            value, dlogits = compiled(q, y)
            close(value, wanted.loss)
            close(dlogits, wanted.dlogits)
            if backend == "pallas" and len(axes) == 3:  # interpreted kernels read whole rows
                continue
            # logits stay where they are: nothing as large as a row, or as its half, is moved
            assert dlogits.sharding.is_equivalent_to(q.sharding, 3), dlogits.sharding
            moves = ("all-gather(", "all-to-all(", "collective-permute(", "all-reduce(")
            lines = [x for x in compiled.as_text().splitlines() if any(m in x for m in moves)]
            assert lines and not [x for x in lines if f",{V}]" in x or f",{V // 2}]" in x], lines
        stats = jax.jit(partial(irl.token_stats, gamma=0.9, backend=backend))(q, y)
        close(stats.reward, reference.token_stats(*map(np.asarray, (q, y)), gamma=0.9).reward)

    # all that token_stats can be asked for, beside ids and a mask that are spread as the logits are
    ids = jax.random.randint(jax.random.key(2), (B, T, 3), 0, V)
    kept = jax.random.bernoulli(jax.random.key(3), 0.8, (B, T, V))
    there = jnp.concatenate([jnp.maximum(labels, 0)[..., None], ids], -1)
    kept |= (jnp.arange(V) == there[..., None]).any(-2)
    heat = 0.5 + jax.random.uniform(jax.random.key(4), (B, T))

    def measured(q: jax.Array, y: jax.Array, i: jax.Array, m: jax.Array, t: jax.Array) -> Any:
        asked = dict(extra_ids=i, keep_mask=m, temperature=t, extras=("log_sum_sq", "top1"))
        stats = irl.token_stats(q, y, backend=backend, **asked)
        total = (stats.logprob + stats.entropy * stats.log_sum_sq).sum()
        return total + stats.extra_logprob.sum(), stats.top1

    def naive(q: jax.Array, y: jax.Array, i: jax.Array, m: jax.Array, t: jax.Array) -> Any:
        z = jnp.where(m, q / t[..., None], -jnp.inf)
        logp = jnp.where(m, jax.nn.log_softmax(z), -100.0)  # exp(-100) is 0 in float32
        picked = jnp.take_along_axis(logp, jnp.concatenate([y[..., None], i], -1), -1)
        entropy, squares = -(jnp.exp(logp) * logp).sum(-1), jnp.log(jnp.exp(2 * logp).sum(-1))
        total = jnp.where(y < 0, 0.0, picked[..., 0]) + entropy * squares
        return total.sum() + picked[..., 1:].sum(), z.argmax(-1)

    (total, top1), gradient = jax.value_and_grad(naive, has_aux=True)(
        logits, labels, ids, kept, heat
    )
    for axes in [("data", "model"), (None, None, "model")]:
        if backend == "pallas":  # whose operations are partitioned by the same code
            continue
        rows = axes[:2]
        given = [
            place(x, *on)
            for x, on in (
                (logits, axes), (labels, rows), (ids, rows), (kept, axes), (heat, rows)
            )
        ]  # fmt: skip
        run = jax.jit(jax.value_and_grad(measured, has_aux=True)).lower(*given).compile()
        (value, top), dlogits = run(*given)
        np.testing.assert_allclose(value, total, rtol=1e-5)
        np.testing.assert_array_equal(top, top1)
        np.testing.assert_allclose(dlogits, gradient, rtol=1e-4, atol=1e-5)
        if len(axes) == 2 or backend in ("auto", "native"):  # nothing as wide as a row is sent
            assert dlogits.sharding.is_equivalent_to(given[0].sharding, 3), dlogits.sharding
            moved = [
                x for x in run.as_text().splitlines() if "all-gather(" in x or "all-to-all(" in x
            ]
            assert not [x for x in moved if f",{V}]" in x or f",{V // 2}]" in x], moved

    # by hand, each device with rows of its own; Pallas's interpreter does not know varying types
    over = PartitionSpec(("data", "model"))
    for check_vma in (True, False) if backend != "pallas" else (False,):

        @partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(over, over),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
        def total(q: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.psum(loss(q, y, reduction="sum"), ("data", "model"))

        value, dlogits = jax.jit(jax.value_and_grad(total))(logits, labels)
        tokens = wanted.metrics["tokens"]
        close(value / tokens, wanted.loss)
        close(dlogits / tokens, wanted.dlogits)
    assert jnp.isfinite(value)


@pytest.mark.parametrize("backend", ["auto", "pallas", "native", "reference"])
def test_rows_stay_where_they_are(backend: str) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-P", __file__, backend],
        env=os.environ | flags,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    main(sys.argv[1])
