"""The linear losses of irl_ops.jax against naive float64 formulas of logits that are stored."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irl_ops.jax as irl

from .. import layer_cases, naive
from ..cases import Case, cases
from .jax_cases import array, arrays

WIDTH = 6
NAMES = ("iqlearn_loss", "mle_loss", "online_iqlearn_loss")
# Of the loss: float32 rounds logits, whose error the TD term multiplies. In half precision also of
# every gradient, by norm: it rounds logits (2^-9, 2^-12 of numbers up to 10) and those of a chunk.
WITHIN = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@st.composite
def layers(draw: Any, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """hidden, weight and maybe bias in float64, and the layer's options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vocab = case.logits.shape[-1]

    def random(*shape: int) -> torch.Tensor:  # exact in every dtype
        return torch.randint(-8, 9, shape, generator=generator).double() / 8

    parts = {"hidden": random(*case.labels.shape, WIDTH), "weight": random(vocab, WIDTH)}
    if draw(st.booleans()):
        parts["bias"] = random(vocab)
    options = {
        "chunk_size": draw(st.sampled_from([None, 1, 2, 3, 7])),
        "accumulate": draw(st.sampled_from([None, "float32", "weight"])),
        "drop_rows": draw(st.sampled_from([None, True, False])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5])),
        "softcap": draw(st.sampled_from([None, None, 1.5])),
    }
    return parts, options


def logits_of(parts: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    x = parts["hidden"] @ parts["weight"].T + parts.get("bias", 0.0)
    x, cap = options["logit_scale"] * x, options["softcap"]
    return x if cap is None else cap * torch.tanh(x / cap)


def heads(case: Case) -> dict[str, torch.Tensor]:
    names = ("values", "next_values")
    return {n: case.options[n].double() for n in names if case.options.get(n) is not None}


def wanted(case: Case, parts: dict, options: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    leaves = {n: x.clone().requires_grad_() for n, x in (parts | heads(case)).items()}
    rest = case.options | {n: leaves[n] for n in heads(case)}
    loss, _ = naive.loss(case.name, logits_of(leaves, options), case.labels, **rest)
    total = (loss * case.upstream).sum() + 0 * sum(x.sum() for x in leaves.values())
    total.backward()
    return loss.detach(), {n: x.grad for n, x in leaves.items()}


def check(case: Case, parts: dict, options: dict, dtype: str, **more: Any) -> None:
    _, labels, rest = arrays(case)
    expected, gradients = wanted(case, parts, options)
    leaves = {n: jnp.asarray(x.numpy(), dtype) for n, x in parts.items()}
    leaves |= {n: jnp.asarray(array(x)) for n, x in heads(case).items()}
    function = getattr(irl, f"linear_{case.name}")

    @jax.jit
    def run(leaves: dict[str, Any], upstream: Any) -> Any:
        def loss(leaves: dict[str, Any]) -> Any:
            given = {n: x for n, x in leaves.items() if n not in ("hidden", "weight")}
            all_options = {**rest, **options, **given, **more}
            first = [all_options.pop("is_expert")] if "is_expert" in all_options else []
            return function(leaves["hidden"], leaves["weight"], labels, *first, **all_options)

        out, pull = jax.vjp(loss, leaves)
        return (
            loss(leaves),
            out,
            *pull(jnp.broadcast_to(jnp.asarray(upstream, out.dtype), out.shape)),
        )

    alone, loss, actual = run(leaves, array(case.upstream))
    limit = WITHIN[dtype]
    # a square of a sum of logits that nearly cancel is measured by the sum of its terms
    size = 1 + float(expected.abs().sum())
    np.testing.assert_allclose(loss, expected, atol=limit * size, rtol=limit)
    np.testing.assert_allclose(alone, expected, atol=limit * size, rtol=limit)
    readout = {name: options[name] for name in ("logit_scale", "softcap")}
    terms = layer_cases.sizes(case, parts, **readout)
    for name, x in gradients.items():
        assert actual[name].dtype == leaves[name].dtype, name
        found = torch.from_numpy(np.asarray(actual[name], np.float64))
        if dtype == "float32":
            bound = layer_cases.allowed(case, parts, **readout)[1][name]
            layer_cases.assert_within(name, found, x, bound)
        error, most = (found - x).norm(), limit * terms[name].norm()
        assert error <= most + 1e-37, (name, error, most, x.norm())


@given(data=st.data(), case=cases(garbage=False, readout=False))
@settings(max_examples=8)
def test_float64(data: Any, case: Case) -> None:
    """The formulas, without roundings: every option, every chunk size."""
    parts, options = data.draw(layers(case))
    for name, option in case.options.items():
        # values and weights, and lam: the naive loss divides it in its own dtype
        if isinstance(option, torch.Tensor) and option.is_floating_point():
            case.options[name] = option.double()
    with jax.enable_x64(True):
        check(case, parts, options, "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(data=st.data(), case=cases(garbage=False, readout=False))
@settings(max_examples=3)
def test_row_kernels_in_chunks(dtype: str, data: Any, case: Case) -> None:
    parts, options = data.draw(layers(case))
    backend = data.draw(st.sampled_from(["auto", "native", "reference"]))
    check(case, parts, options, dtype, backend=backend)


HIDDEN = jax.random.normal(jax.random.key(0), (3, 8, WIDTH))
WEIGHT = jax.random.normal(jax.random.key(1), (33, WIDTH))
LABELS = jax.random.randint(jax.random.key(2), (3, 8), 0, 33).at[0].set(-100)
loss = partial(irl.linear_iqlearn_loss, lam=0.3, gamma=0.9, chunk_size=4)


def dense(hidden: Any, weight: Any, labels: Any = LABELS, **options: Any) -> torch.Tensor:
    q = torch.from_numpy(np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T)
    labels = torch.from_numpy(np.array(labels))
    return naive.loss("iqlearn_loss", q, labels, lam=0.3, gamma=0.9, **options)[0]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_token_stats(entropy: bool, chunk_size: int | None) -> None:
    names = ["value", "logprob", "reward", "next_value"] + ["entropy"] * entropy
    h, w = (torch.from_numpy(np.array(x, np.float64)).requires_grad_() for x in (HIDDEN, WEIGHT))
    expected = naive.token_stats(h @ w.T, torch.from_numpy(np.array(LABELS)), gamma=0.9)
    upstream = {n: torch.randn(3, 8, generator=torch.Generator().manual_seed(3)) for n in names}
    sum((upstream[n] * expected[n]).sum() for n in names).backward()

    def stats(hidden: Any, weight: Any) -> Any:
        return irl.linear_token_stats(
            hidden, weight, LABELS, gamma=0.9, entropy=entropy, chunk_size=chunk_size
        )

    out = stats(HIDDEN, WEIGHT)
    for name in names:
        np.testing.assert_allclose(
            getattr(out, name), expected[name].detach(), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(out.kind, expected["kind"])
    right = (h @ w.T).argmax(-1).numpy() == np.asarray(LABELS)
    np.testing.assert_array_equal(out.correct, right)

    def summed(hidden: Any, weight: Any) -> Any:
        out = stats(hidden, weight)
        return sum((upstream[n].numpy() * getattr(out, n)).sum() for n in names)

    for actual, leaf in zip(jax.grad(summed, (0, 1))(HIDDEN, WEIGHT), (h, w), strict=True):
        np.testing.assert_allclose(actual, leaf.grad, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_confident_rows_are_at_most_0() -> None:
    """The label's logit comes from the chunk, rounded as the others are."""
    weight = (10 * WEIGHT).astype("bfloat16")
    hidden = (3 * HIDDEN).astype("bfloat16")
    labels = jnp.argmax(hidden @ weight.T, -1)
    stats = irl.linear_token_stats(hidden, weight, labels, chunk_size=4)
    assert (stats.logprob <= 0).all() and (stats.logprob > -1).any() and stats.correct.all()
    _, metrics = irl.linear_mle_loss(hidden, weight, labels, return_metrics=True)
    assert metrics["accuracy"] == 1 and metrics["nll"] >= 0


def test_chunks_that_nobody_needs_are_left_out() -> None:
    hidden = HIDDEN.at[0].set(jnp.nan)  # two chunks of ignored rows, and then rows of labels
    total, (dhidden, dweight) = jax.value_and_grad(loss, (0, 1))(hidden, WEIGHT, LABELS)
    np.testing.assert_allclose(total, dense(HIDDEN, WEIGHT), rtol=1e-5)
    assert not dhidden[0].any() and np.isfinite(dweight).all() and dhidden[1:].any()
    for drop in (None, True, False):
        program = jax.grad(partial(loss, drop_rows=drop, backend="reference"))
        text = str(jax.make_jaxpr(program)(hidden, WEIGHT, LABELS))
        assert ("cond[" in text) == (drop is not False) and "scan[" in text


def test_transformations() -> None:
    total = partial(loss, reduction="sum")
    expected = [
        float(dense(h, WEIGHT, y, reduction="sum")) for h, y in zip(HIDDEN, LABELS, strict=True)
    ]
    by_row = jax.vmap(total, (0, None, 0))
    np.testing.assert_allclose(by_row(HIDDEN, WEIGHT, LABELS), expected, rtol=1e-5)
    plain = jax.grad(total, (0, 1))(HIDDEN, WEIGHT, LABELS)

    def scanned(hidden: Any, weight: Any) -> Any:
        one = jax.checkpoint(total)
        return jax.lax.scan(
            lambda c, row: (c + one(row[0], weight, row[1]), None), 0.0, (hidden, LABELS)
        )[0]

    mapped = lambda h, w: by_row(h, w, LABELS).sum()  # noqa: E731
    for other in (mapped, scanned, jax.jit(mapped), jax.jit(scanned)):
        for x, y in zip(jax.grad(other, (0, 1))(HIDDEN, WEIGHT), plain, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    each = jax.vmap(jax.grad(total, 1), (0, None, 0))(HIDDEN, WEIGHT, LABELS)
    np.testing.assert_allclose(each.sum(0), plain[1], rtol=1e-4, atol=1e-4)


def test_derivatives_that_are_not_there() -> None:
    of_hidden = jax.grad(lambda h: loss(h, WEIGHT, LABELS))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(lambda h: of_hidden(h).sum())(HIDDEN)
    for name, what in (("lam", "differentiated"), ("logit_scale", "traced"), ("softcap", "traced")):
        with pytest.raises(ValueError, match=f"{name} is {what}"):
            jax.grad(lambda x, name=name: loss(HIDDEN, WEIGHT, LABELS, **{name: x}))(0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_logits_are_stored(dtype: str) -> None:
    rows, width, vocab, chunk = 1024, 16, 8192, 64
    given = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, width), (vocab, width))]
    labels = jnp.zeros(rows, jnp.int32)
    program = jax.value_and_grad(partial(loss, chunk_size=chunk), (0, 1))
    compiled = jax.jit(lambda h, w: program(h, w, labels)).lower(*given).compile()
    logits = rows * vocab * jnp.dtype(dtype).itemsize
    # on a CPU products are made in float32 and never added in place: two chunks of that and a few
    # arrays of the weight's size
    limit = (3 * chunk * vocab * 4 + 6 * vocab * width * 4) / logits
    assert limit < 0.8
    assert compiled.memory_analysis().temp_size_in_bytes <= limit * logits


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=[1.0]), TypeError, r"hidden is a list; accepted: a jax\.Array"),
        (
            dict(hidden=jnp.zeros(3)),
            ValueError,
            r"hidden has shape \[3\]; accepted: \[\.\.\., T, D",
        ),
        (dict(weight=WEIGHT.T), ValueError, r"weight has shape \[6, 33\]; accepted: \[V, 6\]"),
        (
            dict(weight=WEIGHT.astype("bfloat16")),
            TypeError,
            "weight is bfloat16; accepted: float32",
        ),
        (dict(labels=LABELS[:, 1:]), ValueError, r"labels has shape \[3, 7\]; accepted: \[3, 8\]"),
        (dict(bias=jnp.zeros(6)), ValueError, r"bias has shape \[6\]; accepted: \[33\]"),
        (dict(chunk_size=0), ValueError, "chunk_size is 0; accepted: an int of 1 or more"),
        (dict(chunk_size=True), ValueError, "chunk_size is True; accepted: an int of 1 or more"),
        (
            dict(accumulate="bf16"),
            ValueError,
            "accumulate is 'bf16'; accepted: 'float32', 'weight'",
        ),
        (
            dict(accumulate=jnp.zeros((33, 6))),
            TypeError,
            "accumulate is an array, which JAX cannot add to in place; accepted: 'float32', 'wei",
        ),
        (dict(softcap=0), ValueError, "softcap is 0; accepted: a number above 0, or None"),
        (dict(softcap=-1.0), ValueError, r"softcap is -1\.0; accepted: a number above 0"),
        (dict(logit_scale="1"), TypeError, "logit_scale is '1'; accepted: a number"),
        (dict(z_coef=1.0), TypeError, "linear_.* has no option 'z_coef'"),
        (dict(eos_token_id=33), ValueError, "eos_token_id is 33; accepted: tokens from 0 to 32"),
        (dict(backend="triton"), ValueError, "backend 'triton' cannot serve logits on cpu"),
    ],
)
@pytest.mark.parametrize("name", [*NAMES, "token_stats"])
def test_bad_input(name: str, change: dict[str, Any], error: type, message: str) -> None:
    given = dict(hidden=HIDDEN, weight=WEIGHT, labels=LABELS) | change
    if name.startswith("online"):
        given["is_expert"] = jnp.array([True, False, True])
    with pytest.raises(error, match=f"^{message}"):
        getattr(irl, f"linear_{name}")(**given)


@pytest.mark.parametrize("name", [*NAMES, "token_stats"])
def test_options_are_those_of_the_dense_twin_and_of_the_layer(name: str) -> None:
    ours = inspect.signature(getattr(irl, f"linear_{name}")).parameters
    twin = inspect.signature(getattr(irl, name)).parameters
    layer = dict(bias=None, chunk_size=None, accumulate=None)
    layer |= {} if name == "token_stats" else dict(drop_rows=None)
    assert set(ours) == (set(twin) - {"logits"}) | {"hidden", "weight"} | set(layer)
    defaults = {n: p.default for n, p in twin.items() if n != "logits"} | layer
    assert all(ours[n].default == x for n, x in defaults.items())
