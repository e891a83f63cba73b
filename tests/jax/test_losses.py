"""The losses of irl_ops.jax against naive float64 formulas and their autograd."""

import math
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
import irl_ops.torch

from .. import naive
from ..cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    Case,
    assert_close,
    cases,
    magnitude,
    slack,
    tolerance,
    undecided,
)
from ..cases import differentiate as differentiate_torch
from .jax_cases import BACKENDS, arrays, check, differentiate, tensor

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@given(case=cases())
@settings(max_examples=40)  # each is a program of its own to compile
def test_loss_and_gradients(backend: str, case: Case) -> None:
    check(partial(getattr(irl, case.name), backend=backend), case)


@given(case=cases())
@settings(max_examples=15)
def test_gradient_in_the_forward_pass(case: Case) -> None:
    """What inplace=True asks for, of every dtype."""
    inplace = case.options["reduction"] != "none"
    check(partial(getattr(irl, case.name), inplace=inplace), case)


@given(case=cases())
@settings(max_examples=12)
def test_with_64_bit_types(case: Case) -> None:
    with jax.enable_x64(True):
        check(getattr(irl, case.name), case)


@every_backend
@given(case=cases(garbage=False))
@settings(max_examples=20)
def test_metrics(backend: str, case: Case) -> None:
    logits, labels, options = arrays(case)

    def run(logits: Any) -> Any:
        function = getattr(irl, case.name)
        return function(logits, labels, return_metrics=True, backend=backend, **options)

    loss, metrics = run(logits)
    # other kernels run, and no metric depends on that
    _, _, (again, others) = jax.vjp(
        lambda q: (lambda out: (out[0], out))(run(q)), logits, has_aux=True
    )
    np.testing.assert_allclose(again, loss, rtol=1e-5, atol=1e-5)
    coefficient = options["entropy_coef"]
    expected, batch = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
    assert_close(tensor(loss), expected, tolerance(case).loss, 1)
    with_entropy = not isinstance(coefficient, float) or coefficient != 0
    zeta = options.get("z_loss", 0.0)
    with_z = not isinstance(zeta, float) or zeta != 0
    expected = naive.metrics(batch, case.name, with_entropy, with_z)
    rows = zip(
        (r for s in batch for r in s), case.logits.reshape(-1, case.logits.shape[-1]), strict=True
    )
    right = [float(q[r.label] == q.max()) for r, q in rows if r.label is not None]
    expected["accuracy"] = sum(right) / len(right) if right else 0.0
    assert set(metrics) == set(others) == set(expected)
    size = magnitude(case)
    for name, number in expected.items():
        for metric in (metrics[name], others[name]):
            assert metric.shape == () and metric.dtype == np.float32
            error = 2 * EPS * size  # of one value; that of its square is 2 |delta| as large
            if name in ("td", "z"):
                error *= 2 * number**0.5 + error
            if name == "accuracy":
                error = undecided(case).sum().item() / max(1.0, expected["tokens"])
            assert abs(float(metric) - number) <= error + EPS * abs(number)


@every_backend
@given(case=cases(names=("iqlearn_loss",), garbage=False), entropy=st.booleans())
@settings(max_examples=30)
def test_token_stats(backend: str, case: Case, entropy: bool) -> None:
    """Outputs, and the gradient of a random sum of them."""
    kept = "ignore_index shift where segment_ids position_ids cu_seqlens eos_token_id boundary"
    kept += " truncated gamma detach_next values next_values logit_scale softcap temperature"
    case.options = {k: v for k, v in case.options.items() if k in kept.split()}
    case.upstream = 1.0
    names = ["value", "logprob", "reward", "next_value"] + ["entropy"] * entropy
    generator = torch.Generator().manual_seed(case.labels.numel())
    upstream = {n: torch.randn(case.labels.shape, generator=generator) for n in names}
    fused = partial(irl.token_stats, entropy=entropy, backend=backend)

    logits, labels, options = arrays(case)
    stats = fused(logits, labels, **options)
    expected = naive.token_stats(case.logits.double(), case.labels, **case.options)
    assert stats._fields[:7] == (
        "value",
        "logprob",
        "entropy",
        "reward",
        "next_value",
        "kind",
        "correct",
    )
    right = np.asarray(logits, np.float32)
    aligned, _ = naive.align(case.labels, case.options)
    labelled = np.array([[y is not None for y in s] for s in aligned]).reshape(labels.shape)
    column = np.array([[y or 0 for y in s] for s in aligned]).reshape(labels.shape)
    right = np.take_along_axis(right, column[..., None], -1)[..., 0] == right.max(-1)
    assert stats.correct.dtype == bool
    clear = ~undecided(case).numpy()
    np.testing.assert_array_equal(stats.correct[clear], (labelled & right)[clear])
    assert stats.kind.dtype == np.int8
    np.testing.assert_array_equal(stats.kind, expected["kind"].numpy())
    assert (stats.entropy is None) == (not entropy)
    error = 2 * EPS * magnitude(case)
    for name in names:
        actual = tensor(getattr(stats, name))
        assert actual.dtype == torch.float32 and actual.shape == case.labels.shape
        torch.testing.assert_close(actual.double(), expected[name].double(), rtol=EPS, atol=error)

    def summed(stats: Any, upstream: Any) -> Any:
        get = stats.get if isinstance(stats, dict) else partial(getattr, stats)
        return sum((upstream[name] * get(name)).sum() for name in names)

    given = {name: x.numpy() for name, x in upstream.items()}
    actual = differentiate(lambda *a, **k: summed(fused(*a, **k), given), case)
    expected = differentiate_torch(
        lambda *a, **k: summed(naive.token_stats(*a, **k), upstream), case, torch.float64
    )
    # upstream gradients are of order 1; those of one row and of its neighbour meet
    vocab = case.logits.shape[-1]
    error = torch.full_like(
        actual.logits, slack(case) * 20 * EPS * (1 + math.log(vocab)), dtype=float
    )
    assert_close(actual.logits, expected.logits, error, 1)
    error = torch.full_like(case.labels, 20 * EPS, dtype=float)
    assert_close(actual.values, expected.values, error, 1)
    assert_close(actual.next_values, expected.next_values, error, 1)


@given(case=cases(garbage=False))
@settings(max_examples=10)  # both are held to float64 above, and in tests/torch
def test_torch_and_jax_agree(case: Case) -> None:
    ours = differentiate(getattr(irl, case.name), case)
    theirs = differentiate_torch(getattr(irl_ops.torch, case.name), case)
    error = tolerance(case)
    # sums over rows in another order, and two roundings of a gradient that is scaled
    assert_close(ours.loss, theirs.loss.double(), 2 * error.loss, 2)
    assert_close(ours.logits, theirs.logits.double(), 2 * error.logits, 3)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "pallas"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_large_vocabulary(backend: str, vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    leaf = (4 * torch.randn(2, 3, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (2, 3), generator=generator)
    labels[1, 2] = -100
    options = dict(lam=0.2, gamma=0.95, entropy_coef=0.1, boundary="bootstrap")
    for reduction, upstream in (("sum", 1.0), ("none", torch.randn(2, 3, generator=generator))):
        case = Case(
            "iqlearn_loss",
            leaf,
            LAYOUTS["contiguous"][1],
            labels,
            {**options, "reduction": reduction},
            upstream,
        )
        check(partial(irl.iqlearn_loss, backend=backend), case)


@pytest.mark.parametrize("label", [17, -1, 2**31 - 1])
@every_backend
def test_a_label_out_of_range_gives_nan(backend: str, label: int) -> None:
    logits = np.zeros((2, 3, 17), np.float32)
    labels = np.zeros((2, 3), np.int32)
    labels[1, 2] = label
    for run in (irl.iqlearn_loss, irl.mle_loss):
        loss, dlogits = jax.value_and_grad(partial(run, backend=backend))(logits, labels)
        assert np.isnan(loss) and dlogits.shape == logits.shape
        assert np.isnan(run(logits, labels, backend=backend))
    assert np.isnan(irl.token_stats(logits, labels, backend=backend).logprob[1, 2])


@every_backend
@pytest.mark.parametrize(("dtype", "reduction"), [("float32", "mean"), ("float16", "none")])
@pytest.mark.parametrize("name", ["iqlearn_loss", "mle_loss", "online_iqlearn_loss"])
def test_z_loss(backend: str, name: str, dtype: str, reduction: str) -> None:
    """+ zeta w/N V^2 on the labelled rows, those of the expert; torch's autograd in float64."""
    generator = torch.Generator().manual_seed(5)
    q = (3 * torch.randn(2, 4, 17, generator=generator)).to(getattr(torch, dtype))
    labels = torch.randint(17, (2, 4), generator=generator)
    labels[0, 1] = -100
    expert = torch.tensor([True, False])
    online = name.startswith("online")
    leaf = q.double().requires_grad_()
    labelled = (labels != -100) & (expert[:, None] if online else True)
    share = labelled / (labelled.sum() if reduction == "mean" else 1)
    options = dict(lam=0.3, gamma=0.9) if name != "mle_loss" else {}
    rest = naive.loss(
        name,
        leaf,
        labels,
        reduction=reduction,
        **options,
        **({"is_expert": expert} if online else {}),
    )[0]
    added = 0.07 * share * torch.logsumexp(leaf, -1) ** 2
    expected = rest + added if reduction == "none" else rest + added.sum()
    expected.sum().backward()

    def run(q: Any, zeta: Any) -> Any:
        first = [expert.numpy()] if online else []
        return getattr(irl, name)(
            q,
            labels.numpy(),
            *first,
            z_loss=zeta,
            reduction=reduction,
            backend=backend,
            return_metrics=True,
            **options,
        )

    for zeta in (0.07, jnp.array(0.07)):
        (loss, metrics), pull = jax.vjp(lambda q, zeta=zeta: run(q, zeta), q.numpy())
        np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5, atol=1e-5)
        zeros = jax.tree.map(jnp.zeros_like, metrics)
        dlogits = pull((jnp.ones_like(loss), zeros))[0]
        rounding = 1e-5 if dtype == "float32" else 2e-3
        np.testing.assert_allclose(dlogits, leaf.grad, rtol=rounding, atol=rounding)
        z = (torch.logsumexp(q.double(), -1)[labels != -100] ** 2).mean()
        np.testing.assert_allclose(metrics["z"], z, rtol=1e-5)


@given(case=cases())
@settings(max_examples=15)
def test_float64(case: Case) -> None:
    """Everything in float64, by "reference"; JAX without 64-bit types refuses it."""
    logits, labels, _ = arrays(case)
    with pytest.raises(TypeError, match="logits is float64 and JAX's 64-bit types are off"):
        irl.token_stats(logits.astype("float64"), labels)
    if any(case.options.get(n) is not None for n in ("values", "next_values")):
        return  # their gradients are rounded to their own dtypes
    case.leaf = case.leaf.double()
    with jax.enable_x64(True):
        actual = differentiate(getattr(irl, case.name), case)
    expected = differentiate_torch(
        lambda *a, **k: naive.loss(case.name, *a, **k)[0], case, torch.float64
    )
    assert actual.loss.dtype == actual.logits.dtype == torch.float64
    # options that are float32 arrays come as they are; sums of numbers up to 1e8 nearly cancel
    size = 1 + expected.loss.abs().max().item()
    torch.testing.assert_close(actual.loss, expected.loss, rtol=2**-22, atol=2**-22 * size)
    size = 1 + expected.logits.nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2**-22, atol=2**-22 * size)


def test_derivatives_by_finite_differences() -> None:
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(0), (2, 4, 7), "float64")
        labels = jnp.array([[1, 2, -100, 3], [0, 6, 5, 5]])
        for run in (partial(irl.iqlearn_loss, z_loss=0.1, entropy_coef=0.1), irl.mle_loss):
            check_grads(lambda q, run=run: run(q, labels), (logits,), 1, ("rev",))
        check_grads(lambda q: irl.token_stats(q, labels, gamma=0.9)[:5], (logits,), 1, ("rev",))
        for backend in ("native", "pallas"):
            with pytest.raises(
                ValueError, match=f"backend '{backend}' cannot serve float64 logits"
            ):
                irl.iqlearn_loss(logits, labels, backend=backend)


@every_backend
@pytest.mark.parametrize("inplace", [False, True])
def test_a_label_of_probability_0_has_an_infinite_loss(backend: str, inplace: bool) -> None:
    logits = np.array([[0.5, -np.inf, 1.0], [0.0, 1.0, -1.0], [1.0, 0.0, 2.0]], np.float32)
    labels = np.array([1, 0, 2], np.int32)
    run = partial(irl.iqlearn_loss, lam=0.5, inplace=inplace, backend=backend)
    loss, dlogits = jax.value_and_grad(run)(logits, labels)
    assert loss == np.inf
    assert dlogits[0, 1] == -np.inf  # towards the label
    assert np.isfinite(dlogits[0, [0, 2]]).all()
    assert (dlogits[1] == np.inf).all()  # p (A + ...), A = -gamma u = inf; none is NaN
    finite = jax.grad(run)(np.maximum(logits, -5), labels)
    np.testing.assert_allclose(dlogits[2], finite[2], rtol=1e-5)


@every_backend
def test_float16_gradients_whose_parts_overflow(backend: str) -> None:
    """p_a A is beyond float16, p_a A + C is not: the label's element is rounded once."""
    logits = np.zeros((1, 2, 4), np.float16)
    logits[0, 0, 0] = 300  # label's: u_0 = 2 lam (300 - V_1), A_1 = 1 - u_0
    logits[0, 1, 1] = 20
    labels = np.array([[0, 1]], np.int32)
    options = dict(lam=125.0, gamma=1.0, reduction="sum")
    q = torch.from_numpy(logits).double().requires_grad_()
    naive.loss("iqlearn_loss", q, torch.from_numpy(labels), **options)[0].backward()
    run = partial(irl.iqlearn_loss, inplace=True, backend=backend, **options)
    dlogits = np.asarray(jax.grad(run)(logits, labels), np.float64)
    fits = q.grad.abs() < 65504
    assert abs(q.grad[0, 1, 1]) < 65504
    np.testing.assert_allclose(dlogits[fits], q.grad[fits], rtol=2e-3, atol=1)
