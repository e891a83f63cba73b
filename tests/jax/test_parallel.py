"""Losses over mesh axes that shard the vocabulary and the sequence: four devices, on one CPU.

pytest starts this file as a program, since the number of devices is fixed when JAX is first used. A
program that is compiled for one of the ``FORMS`` is given many random batches; what is expected is
the naive float64 loss of the whole batch, and its autograd.
"""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cases, layer_cases, naive
from . import parallel_measures
from .parallel_promises import B, T, V, check_devices, check_refused, mesh

WIDTH = 6


class Form(NamedTuple):
    """What a program is compiled for."""

    loss: str
    split: tuple[int, int]  # devices that share a row, devices that share a sequence
    options: dict[str, Any]  # the static ones
    arrays: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ("lam", "gamma")
    backend: str = "native"
    check_vma: bool = True
    inside: bool = False  # the gradient is taken inside of shard_map
    padding: int = 0  # columns behind the vocabulary
    dtype: str = "float32"


EVERY = ("where", "truncated", "token_weights", "values", "next_values", "sequence_order")
FORMS = {
    "vocabulary": Form(
        "iqlearn_loss", (4, 1), dict(shift=True, boundary="bootstrap"),
        ("segment_ids",), ("lam", "gamma", "entropy_coef", "z_loss"),
    ),
    "padded columns": Form(
        "mle_loss", (4, 1), dict(softcap=8.0), ("where",), ("entropy_coef", "num_items"),
        padding=4, inside=True,
    ),
    "more padding than a device has": Form(
        "iqlearn_loss", (4, 1), {}, backend="reference", padding=16, check_vma=False,
        dtype="bfloat16",
    ),
    "starts": Form(
        "iqlearn_loss", (4, 1), dict(logit_scale=0.5), ("vocab_start",), padding=8,
    ),
    "sequence": Form(
        "iqlearn_loss", (1, 4), dict(shift=True, eos_token_id=(3, 5)),
        ("truncated", "position_ids", "token_weights"), ("lam", "gamma", "entropy_coef"),
    ),
    "order": Form(
        "online_iqlearn_loss", (1, 4), dict(boundary="drop"),
        ("is_expert", "sequence_order", "values"), ("lam", "gamma", "alpha"), check_vma=False,
    ),
    "rows": Form(
        "iqlearn_loss", (2, 2), dict(reduction="none", boundary="bootstrap"),
        ("next_values", "orders"), ("lam", "gamma", "z_loss"), backend="reference", inside=True,
    ),
    "both": Form(
        "iqlearn_loss", (2, 2), dict(shift=True, boundary="bootstrap", detach_next=True), EVERY,
        ("lam", "gamma", "entropy_coef"), inside=True, padding=2,
    ),
    "pallas": Form(
        "online_iqlearn_loss", (2, 2), dict(boundary="bootstrap"), ("is_expert", "segment_ids"),
        ("lam", "gamma", "entropy_coef", "alpha"), backend="pallas", check_vma=False,
    ),
}  # fmt: skip
LINEAR = {
    "vocabulary": Form(
        "iqlearn_loss", (4, 1), dict(shift=True, softcap=8.0), ("segment_ids", "bias"),
        ("lam", "gamma", "entropy_coef"), padding=4,
    ),
    "sequence": Form(
        "mle_loss", (1, 4), dict(reduction="none"), ("truncated", "bias"), ("entropy_coef",),
        check_vma=False,
    ),
    "order": Form(
        "online_iqlearn_loss", (2, 2), dict(boundary="bootstrap"),
        ("is_expert", "sequence_order", "values"), ("lam", "gamma", "alpha"), inside=True,
    ),
    "both": Form(
        "iqlearn_loss", (2, 2), dict(shift=True, boundary="bootstrap"), ("where", "truncated"),
        ("lam", "gamma", "entropy_coef", "z_loss"), inside=True, padding=2,
    ),
    "values": Form(
        "online_iqlearn_loss", (1, 4), dict(boundary="bootstrap"), ("is_expert", "values"),
        ("lam", "gamma", "alpha"), check_vma=False,
    ),
}  # fmt: skip


def batch(form: Form, seed: int, linear: bool = False) -> cases.Case:
    """A random batch; what is not an option of the losses is kept apart by ``place``."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g)

    labels = torch.randint(V, (B, T), generator=g)
    labels[rand(B, T) < 0.2] = -100
    made: dict[str, Tensor] = {
        "where": rand(B, T) < 0.8,
        "truncated": rand(B, T) < 0.5 if seed % 2 else rand(B, T) < 2.0,
        "segment_ids": (rand(B, T) < 0.3).cumsum(-1),
        "position_ids": torch.arange(T).expand(B, T) % (1 + seed % T),
        "token_weights": torch.rand(B, T, generator=g) * (rand(B, T) < 0.8),
        "is_expert": rand(B, T) < 0.5,
        "values": torch.randn(B, T, generator=g),
        "next_values": torch.randn(B, T, generator=g),
    }
    options: dict[str, Any] = dict(form.options)
    options |= {name: x for name, x in made.items() if name in form.arrays}
    sizes = dict(lam=1.5, gamma=1.0, entropy_coef=0.3, z_loss=0.2, alpha=0.8, num_items=9.0)
    # at least a little, so that a term is never left out by the number 0
    options |= {n: sizes[n] * (0.1 + 0.9 * float(rand())) for n in form.numbers}
    offset, scale = ((0.0, 1.0), (0.0, 6.0), (1e4, 1.0), (-1e4, 1.0))[seed // 2 % 4]
    logits = offset + scale * torch.randn(B, T, V, generator=g)
    if not linear:
        cases.hide(logits, labels, g)
        if seed % 4 == 0:
            cases.spoil(form.loss, logits, labels, options, float("nan"))
    upstream: Any = 1.0
    if form.options.get("reduction") == "none":
        upstream = torch.randn(B, T, generator=g)
    dtype = getattr(torch, form.dtype)
    return cases.Case(form.loss, logits.to(dtype), lambda x: x, labels, options, upstream)


def order_of(form: Form, seed: int) -> Tensor | None:
    """Of the rows as they lie on the devices, one after another."""
    g = torch.Generator().manual_seed(seed + 1)
    if "sequence_order" in form.arrays:
        if seed % 2:
            return torch.randperm(T, generator=g)
        parts = torch.arange(T).view(2 * form.split[1], -1)  # zigzag
        return torch.cat([parts[[i, -1 - i]].flatten() for i in range(form.split[1])])
    if "orders" in form.arrays:
        return torch.rand(B, T, generator=g).argsort(-1)
    return None


def moved(x: Tensor, order: Tensor | None, axis: int = -1) -> Tensor:
    """Rows as they lie on the devices."""
    if order is None:
        return x
    index = (
        order if order.ndim > 1 else order.expand(x.shape[: 1 if x.ndim > 1 else 0] + order.shape)
    )
    if axis == -2:
        index = index[..., None].expand(x.shape)
    return torch.take_along_dim(x, index, axis)


def back(x: Tensor, order: Tensor | None, axis: int = -1) -> Tensor:
    """The inverse."""
    return moved(x, None if order is None else order.argsort(-1), axis)


def specs(arrays: dict[str, Any]) -> dict[str, Any]:
    from jax.sharding import PartitionSpec as P

    every = {"logits": P(None, "s", "v"), "hidden": P(None, "s"), "weight": P("v"), "bias": P("v")}
    every |= {"vocab_start": P("v")}
    return {n: every.get(n, P("s") if x.ndim == 1 else P(None, "s")) for n, x in arrays.items()}


@functools.cache
def program(name: str, linear: bool) -> Any:
    """``run(leaves, rest, numbers, upstream)``: the loss, and the gradients of the leaves."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    form = (LINEAR if linear else FORMS)[name]
    function = getattr(irl, ("linear_" if linear else "") + form.loss)
    static = dict(form.options, backend=form.backend, vocab_axis="v", sequence_axis="s")
    if form.padding:
        static["vocab_size"] = V
    if linear:
        static["chunk_size"] = 4
    first = ("hidden", "weight") if linear else ("logits",)
    whole = P(None, "s") if form.options.get("reduction") == "none" else P()

    def loss(leaves: Any, rest: Any, numbers: Any) -> Any:
        given = {**leaves, **rest, **numbers, **static}
        if "vocab_start" in given:
            given["vocab_start"] = given["vocab_start"][0]
        arrays = [given.pop(n) for n in (*first, "labels")]
        arrays += [given.pop("is_expert")] if "is_expert" in given else []
        return function(*arrays, **given)

    def run(leaves: Any, rest: Any, numbers: Any, upstream: Any) -> Any:
        given = specs(leaves), specs(rest), dict.fromkeys(numbers, P())
        over = functools.partial(jax.shard_map, mesh=mesh(form.split), check_vma=form.check_vma)
        if not form.inside:
            spread = over(lambda *x: loss(*x), in_specs=given, out_specs=whole)
            value, pull = jax.vjp(lambda x: spread(x, rest, numbers), leaves)
            return value, pull(upstream)[0]

        def both(leaves: Any, rest: Any, numbers: Any, upstream: Any) -> Any:
            value, pull = jax.vjp(lambda x: loss(x, rest, numbers), leaves)
            return value, pull(upstream)[0]

        spread = over(both, in_specs=(*given, whole), out_specs=(whole, specs(leaves)))
        return spread(leaves, rest, numbers, upstream)

    return jax.jit(run), form, jnp


def place(name: str, linear: bool, case: cases.Case, seed: int, layer: Any = None) -> Any:
    """Runs a batch; loss and gradients come back in the order of the sequence."""
    from .jax_cases import array, tensor

    run, form, _ = program(name, linear)
    order = order_of(form, seed)
    leaves = {n: x for n, x in case.options.items() if n in ("values", "next_values")}
    rest = {n: x for n, x in case.options.items() if isinstance(x, Tensor) and n not in leaves}
    numbers = {n: x for n, x in case.options.items() if n in form.numbers}
    rest["labels"] = case.labels
    leaves, rest = ({n: moved(x, order) for n, x in d.items()} for d in (leaves, rest))
    if order is not None:
        rest["sequence_order"] = order
    if "vocab_start" in form.arrays:
        rest["vocab_start"] = torch.arange(4) * ((V + form.padding) // 4)
    if layer is None:
        x = moved(case.logits, order, -2)
        padding = x.new_full((B, T, form.padding), torch.nan)
        leaves["logits"] = torch.cat([x, padding], -1)
    else:
        leaves |= {"hidden": moved(layer["hidden"], order, -2)}
        for n in set(layer) - {"hidden"}:
            x = layer[n]
            leaves[n] = torch.cat([x, x.new_ones(form.padding, *x.shape[1:])])
    upstream = case.upstream
    upstream = moved(upstream, order) if isinstance(upstream, Tensor) else torch.tensor(upstream)
    value, gradients = run(
        {n: array(x) for n, x in leaves.items()},
        {n: array(x) for n, x in rest.items()},
        numbers,
        array(upstream),
    )
    value = tensor(value)
    value = back(value, order) if value.ndim else value
    out = {}
    for n, x in gradients.items():
        x = tensor(x)
        if n in ("logits", "weight", "bias"):
            x, behind = (x[..., :V], x[..., V:]) if n == "logits" else (x[:V], x[V:])
            assert not behind.any(), f"{n}: a gradient behind the vocabulary"
        if n not in ("weight", "bias"):
            x = back(x, order, -2 if n in ("logits", "hidden") else -1)
        out[n] = x
    return value, out


def check_dense(name: str, seed: int) -> None:
    case = batch(FORMS[name], seed)

    def run(_: Any, case: cases.Case) -> cases.Outcome:
        value, out = place(name, False, case, seed)
        return cases.Outcome(value, out["logits"], out.get("values"), out.get("next_values"))

    cases.check(lambda: None, case, run)


def check_linear(name: str, seed: int) -> None:
    """As tests/jax/test_linear.py."""
    form = LINEAR[name]
    case, g = batch(form, seed, linear=True), torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=g).float() / 8

    layer = {"hidden": some(B, T, WIDTH), "weight": some(V, WIDTH)}
    if "bias" in form.arrays:
        layer["bias"] = some(V)
    value, out = place(name, True, case, seed, layer)
    leaves = {n: x.double().requires_grad_() for n, x in layer.items()}
    heads = {n: x for n, x in case.options.items() if n in ("values", "next_values")}
    heads = {n: x.double().requires_grad_() for n, x in heads.items()}
    q = leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)
    expected, _ = naive.loss(form.loss, q, case.labels, **{**case.options, **heads})
    (expected * case.upstream).sum().backward()
    within, bounds = layer_cases.allowed(case, layer)
    layer_cases.assert_within("the loss", value, expected, within)
    for n, x in (leaves | heads).items():
        wanted = torch.zeros_like(x) if x.grad is None else x.grad
        layer_cases.assert_within(n, out[n], wanted, bounds[n])


def check_stats(linear: bool) -> None:
    """Every field, and the gradient of a loss on them."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import irl_ops.jax as irl

    torch.manual_seed(0)
    labels = torch.randint(V, (B, T))
    labels[0, 3] = -100
    order = torch.randperm(T)
    layer = torch.randn(B, T, WIDTH), torch.randn(V, WIDTH)
    x = [t.double().requires_grad_() for t in layer]
    q = x[0] @ x[1].T
    options = dict(gamma=0.9, shift=True, boundary="bootstrap")
    wanted = naive.token_stats(q, labels, **options)
    weights = {n: torch.randn(B, T) for n, f in wanted.items() if n != "kind"}
    sum((weights[n].double() * wanted[n]).sum() for n in weights).backward()

    first = layer if linear else (q.detach().float(),)
    function = irl.linear_token_stats if linear else irl.token_stats
    rows = P(None, "s")

    def both(first: Any, labels: Any, order: Any, weights: Any) -> Any:
        def run(first: Any) -> Any:
            stats = function(
                *first, labels, vocab_axis="v", sequence_axis="s", sequence_order=order, **options
            )
            total = sum((weights[n] * getattr(stats, n)).sum() for n in weights)
            return jax.lax.psum(total, "s"), stats

        (_, stats), gradient = jax.value_and_grad(run, has_aux=True)(first)
        return stats, gradient

    over = (rows, P("v")) if linear else (P(None, "s", "v"),)
    run = jax.shard_map(
        both,
        mesh=mesh((2, 2)),
        in_specs=(over, rows, P("s"), rows),
        out_specs=(rows, over),
    )
    given = [moved(first[0], order, -2), *first[1:]]
    stats, gradient = jax.jit(run)(
        tuple(jnp.asarray(x.numpy()) for x in given),
        moved(labels, order).numpy(),
        order.numpy(),
        {n: moved(x, order).numpy() for n, x in weights.items()},
    )
    from .jax_cases import tensor

    for n, expected in wanted.items():
        actual = back(tensor(getattr(stats, n)), order).double()
        torch.testing.assert_close(actual, expected.detach().double(), atol=1e-4, rtol=1e-4)
    expected = [x[0].grad, x[1].grad]
    if not linear:
        leaf = q.detach().requires_grad_()
        again = naive.token_stats(leaf, labels, **options)
        sum((weights[n].double() * again[n]).sum() for n in weights).backward()
        expected = [leaf.grad]
    actual = [back(tensor(gradient[0]), order, -2), *map(tensor, gradient[1:])]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-4, rtol=1e-4)


def main(seed: int, count: int) -> None:
    for linear, forms, check in ((False, FORMS, check_dense), (True, LINEAR, check_linear)):
        for name in forms:
            for i in range(count):
                try:
                    check(name, seed + i)
                except Exception as error:
                    error.add_note(f"{'linear, ' * linear}{name!r}, seed {seed + i}")
                    raise
    for name in parallel_measures.FORMS:
        for i in range(count):
            try:
                parallel_measures.check(name, seed + i)
            except Exception as error:
                error.add_note(f"measures, {name!r}, seed {seed + i}")
                raise
    parallel_measures.check_sent()
    check_stats(False)
    check_stats(True)
    check_devices()
    check_refused()


def on_four_devices(*arguments: str) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jax.test_parallel", *arguments],
        env=os.environ | flags,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


def test_losses_and_gradients() -> None:
    on_four_devices(str(random.SystemRandom().randrange(2**31)), "6")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
