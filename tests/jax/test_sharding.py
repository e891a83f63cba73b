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


def triton_without_a_gpu() -> None:
    """Lower the operations of "triton" for CPUs, each launch as the reference of the same name.

    A kernel's parameters have the names of the reference's, in the order that jax-triton passes
    them; a flag says whether one that may be missing is there.
    """
    import importlib
    import types
    from inspect import signature

    import jax.numpy as jnp

    from irl_ops.jax import columns, measured, operation, triton
    from irl_ops.kernels import reference
    from irl_ops.kernels.reference import measures

    flags = dict(entropy_weight="ENTROPY", row_scale="SCALED", keep_mask="MASK", keep_above="ABOVE")
    flags |= dict(b="B", d="D", e="E", entropy="ENTROPY")
    extras = dict(ENTROPY="entropy", SQUARES="log_sum_sq", TOP="top1", MEAN="mean_logit")

    def launch(*given: Any, kernel: Any, out_shape: Any, SCALE: float, SOFTCAP: float, **how: Any):
        named = dict(zip(kernel.arg_names, given, strict=False))
        named = {n: x for n, x in named.items() if how.get(flags.get(n), True)}
        named |= dict(wanted=[n for flag, n in extras.items() if how.get(flag)])
        named |= dict(entropy=how.get("ENTROPY"), logit_scale=SCALE, softcap=SOFTCAP or None)
        named["slopes"] = measures.Slopes(*(named.get(n) for n in "abcde"))
        name = kernel.fn.__name__
        function = getattr(measures if name in vars(measures) else reference, name)
        found = function(**{n: named[n] for n in signature(function).parameters if n in named})
        found = found if isinstance(found, tuple) else (found,)
        pairs = zip(found, out_shape, strict=True)
        return tuple(
            jnp.zeros(y.shape, y.dtype) if x is None else x.astype(y.dtype) for x, y in pairs
        )

    def for_cpus(*given: Any, cuda: Any, **options: Any) -> Any:
        return plain(*given, **options, cpu=cuda)

    sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=launch)  # type: ignore[assignment]
    plain, operation.operation = operation.operation, for_cpus
    for module in (measured, columns, triton):
        importlib.reload(module)
    triton.unavailable = lambda platform: None


def main(backend: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import irl_ops.jax as irl
    from irl_ops import reference

    assert len(jax.devices()) == 4
    if backend == "triton":
        triton_without_a_gpu()
    random = np.random.default_rng(0)  # every operation of JAX is a program to compile
    logits = 3 * random.standard_normal((B, T, V), np.float32)
    labels = random.integers(V, size=(B, T), dtype=np.int32)
    labels[1, 3] = -100
    options = dict(lam=0.3, gamma=0.9, entropy_coef=0.1)
    wanted = reference.iqlearn_loss(logits, labels, **options)
    rewards = reference.token_stats(logits, labels, gamma=0.9).reward
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # a few roundings
    loss = partial(irl.iqlearn_loss, backend=backend, **options)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

    def place(x: Any, *axes: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def check_moved(program: Any, q: Any, dlogits: Any) -> None:
        """Logits stay where they are: something is sent, but nothing as wide as a row's part."""
        assert dlogits.sharding.is_equivalent_to(q.sharding, 3), dlogits.sharding
        moves = ("all-gather(", "all-to-all(", "collective-permute(", "all-reduce(")
        lines = [x for x in program.as_text().splitlines() if any(m in x for m in moves)]
        wide = [x for x in lines for part in (1, 2, 4) if f",{V // part}]" in x]
        assert lines and not wide, lines

    def summed(q: jax.Array, y: jax.Array) -> jax.Array:
        return loss(q, y, reduction="none").sum() / wanted.metrics["tokens"]

    # all backends but the reference are partitioned by the same code, and called alike by it
    both, full = ("data", "model"), backend == "auto"
    runs: list[Any] = [(("data", "model"), summed), (("data", None, "model"), loss)]
    runs += [((both,), summed), (("data", "model"), loss), ((None, None, both), summed)] * full
    for axes, run in runs:
        q, y = place(logits, *axes), place(labels, *axes[:2])
        compiled = jax.jit(jax.value_and_grad(run)).lower(q, y).compile()
        value, dlogits = compiled(q, y)
        close(value, wanted.loss)
        close(dlogits, wanted.dlogits)
        if backend != "pallas" or len(axes) < 3:  # interpreted kernels read whole rows
            check_moved(compiled, q, dlogits)
    for axes in [("data", "model"), ("data", None, "model")] * full:
        q, y = place(logits, *axes), place(labels, *axes[:2])
        close(jax.jit(partial(irl.token_stats, gamma=0.9, backend=backend))(q, y).reward, rewards)

    # all that token_stats can be asked for, beside ids and a mask that are spread as the logits are
    ids = random.integers(V, size=(B, T, 3), dtype=np.int32)
    there = np.concatenate([np.maximum(labels, 0)[..., None], ids], -1)
    kept = (random.random((B, T, V)) < 0.8) | (np.arange(V) == there[..., None]).any(-2)
    heat = 0.5 + random.random((B, T), np.float32)

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

    (total, top1), gradient = jax.jit(jax.value_and_grad(naive, has_aux=True))(
        logits, labels, ids, kept, heat
    )
    by_rows, by_columns = ("data", "model"), (None, None, "model")
    measured_over: dict[str, Any] = {"auto": [by_rows, by_columns], "triton": [by_columns]}
    for axes in measured_over.get(backend, []):
        at = axes[:2]
        given = [
            place(x, *on)
            for x, on in (
                (logits, axes), (labels, at), (ids, at), (kept, axes), (heat, at)
            )
        ]  # fmt: skip
        run = jax.jit(jax.value_and_grad(measured, has_aux=True)).lower(*given).compile()
        (value, top), dlogits = run(*given)
        np.testing.assert_allclose(value, total, rtol=1e-5)
        np.testing.assert_array_equal(top, top1)
        np.testing.assert_allclose(dlogits, gradient, rtol=1e-4, atol=1e-5)
        check_moved(run, given[0], dlogits)

    # by hand, each device with rows of its own
    over = PartitionSpec(both)
    for check_vma in [True, False] * full:

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


@pytest.mark.parametrize("backend", ["auto", "pallas", "reference", "triton"])
def test_rows_stay_where_they_are(backend: str) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    flags["IRL_OPS_COMPUTE_CAPABILITY"] = "9.0"
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton: it has releases for Linux alone")
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
