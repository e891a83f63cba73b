"""The losses of irl_ops.jax against naive float64 formulas and their autograd."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irl_ops.jax as irl
import irl_ops.torch

from . import naive
from .cases import DTYPES, EPS, LAYOUTS, Case, assert_close, cases, magnitude, tolerance
from .cases import differentiate as differentiate_torch
from .jax_cases import BACKENDS, arrays, check, differentiate, tensor

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@given(case=cases())
@settings(max_examples=60)  # each is a program of its own to compile
def test_loss_and_gradients(backend: str, case: Case) -> None:
    check(partial(getattr(irl, case.name), backend=backend), case)


@given(case=cases())
@settings(max_examples=20)
def test_gradient_in_the_forward_pass(case: Case) -> None:
    """What inplace=True asks for, of every dtype."""
    inplace = case.options["reduction"] != "none"
    check(partial(getattr(irl, case.name), inplace=inplace), case)


@given(case=cases())
@settings(max_examples=20)
def test_with_64_bit_types(case: Case) -> None:
    with jax.enable_x64(True):
        check(getattr(irl, case.name), case)


@every_backend
@given(case=cases(garbage=False))
@settings(max_examples=30)
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
    expected = naive.metrics(batch, case.name, with_entropy)
    assert set(metrics) == set(others) == set(expected)
    size = magnitude(case)
    for name, number in expected.items():
        for metric in (metrics[name], others[name]):
            assert metric.shape == () and metric.dtype == np.float32
            error = 2 * EPS * size  # of one value; that of its square is 2 |delta| as large
            if name == "td":
                error *= 2 * number**0.5 + error
            assert abs(float(metric) - number) <= error + EPS * abs(number)


@every_backend
@given(case=cases(names=("iqlearn_loss",), garbage=False), entropy=st.booleans())
@settings(max_examples=40)
def test_token_stats(backend: str, case: Case, entropy: bool) -> None:
    """Outputs, and the gradient of a random sum of them."""
    kept = "ignore_index shift where segment_ids position_ids cu_seqlens eos_token_id boundary"
    kept += " truncated gamma detach_next values next_values"
    case.options = {k: v for k, v in case.options.items() if k in kept.split()}
    case.upstream = 1.0
    names = ["value", "logprob", "reward", "next_value"] + ["entropy"] * entropy
    generator = torch.Generator().manual_seed(case.labels.numel())
    upstream = {n: torch.randn(case.labels.shape, generator=generator) for n in names}
    fused = partial(irl.token_stats, entropy=entropy, backend=backend)

    logits, labels, options = arrays(case)
    stats = fused(logits, labels, **options)
    expected = naive.token_stats(case.logits.double(), case.labels, **case.options)
    assert stats._fields == ("value", "logprob", "entropy", "reward", "next_value", "kind")
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
    error = torch.full_like(actual.logits, 20 * EPS * (1 + math.log(vocab)), dtype=float)
    assert_close(actual.logits, expected.logits, error, 1)
    error = torch.full_like(case.labels, 20 * EPS, dtype=float)
    assert_close(actual.values, expected.values, error, 1)
    assert_close(actual.next_values, expected.next_values, error, 1)


@given(case=cases(garbage=False))
@settings(max_examples=30)
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
