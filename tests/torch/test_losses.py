"""The losses of irl_ops.torch against naive float64 formulas and their autograd."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irl_ops.torch as irl

from .. import naive
from ..cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    Case,
    assert_close,
    cases,
    check,
    differentiate,
    magnitude,
    slack,
    tolerance,
    undecided,
)

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@given(case=cases())
@settings(max_examples=200)
def test_loss_and_gradients(backend: str, case: Case) -> None:
    check(partial(getattr(irl, case.name), backend=backend), case)


@given(case=cases(names=("iqlearn_loss",)))
def test_module(backend: str, case: Case) -> None:
    check(irl.IQLearnLoss(**case.options, backend=backend), case)


@given(case=cases(garbage=False))
@settings(max_examples=100)
def test_metrics(backend: str, case: Case) -> None:
    options = {**case.options, "backend": backend, "return_metrics": True}
    leaf = case.leaf.clone().requires_grad_()
    loss, metrics = getattr(irl, case.name)(case.view(leaf), case.labels, **options)
    with torch.no_grad():  # other kernels run, and no metric depends on that
        _, others = getattr(irl, case.name)(case.view(leaf), case.labels, **options)
    coefficient = options["entropy_coef"]
    expected, batch = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
    assert_close(loss.detach(), expected, tolerance(case).loss, 1)
    with_entropy = isinstance(coefficient, torch.Tensor) or coefficient != 0
    zeta = options.get("z_loss", 0.0)
    with_z = not isinstance(zeta, float) or zeta != 0
    expected = naive.metrics(batch, case.name, with_entropy, with_z)
    assert set(metrics) == set(others) == set(expected)
    size = magnitude(case)
    for name, number in expected.items():
        for metric in (metrics[name], others[name]):
            assert metric.shape == () and metric.dtype == torch.float32
            assert not metric.requires_grad
            error = 2 * EPS * size  # of one value; that of its square is 2 |delta| as large
            if name in ("td", "z"):
                error *= 2 * number**0.5 + error
            if name == "accuracy":
                error = undecided(case).sum().item() / max(1.0, expected["tokens"])
            assert abs(metric.item() - number) <= error + EPS * abs(number)


@given(case=cases(names=("iqlearn_loss",), garbage=False), entropy=st.booleans())
@settings(max_examples=100)
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

    stats = fused(case.logits, case.labels, **case.options)
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
    assert stats.kind.dtype == torch.int8 and torch.equal(stats.kind.long(), expected["kind"])
    assert (stats.entropy is None) == (not entropy)
    error = 2 * EPS * magnitude(case)
    for name in names:
        actual = getattr(stats, name)
        assert actual.dtype == torch.float32 and actual.shape == case.labels.shape
        torch.testing.assert_close(actual.double(), expected[name].double(), rtol=EPS, atol=error)
    # the label's logit never exceeds V by more than the rounding of a logarithm
    assert (stats.logprob <= 0).all()
    if entropy:
        # logsum and the sum of p (q - max) cancel in a confident row
        within = (stats.entropy >= -error) & (stats.entropy <= math.log(vocab(case)) + error)
        assert within.all()

    def summed(stats: Any) -> Any:
        get = stats.get if isinstance(stats, dict) else partial(getattr, stats)
        return sum((upstream[name] * get(name)).sum() for name in names)

    actual = differentiate(lambda *a, **k: summed(fused(*a, **k)), case)
    expected = differentiate(
        lambda *a, **k: summed(naive.token_stats(*a, **k)), case, torch.float64
    )
    # upstream gradients are of order 1; those of one row and of its neighbour meet
    error = torch.full_like(
        actual.logits, slack(case) * 20 * EPS * (1 + math.log(vocab(case))), dtype=float
    )
    assert_close(actual.logits, expected.logits, error, 1)
    error = torch.full_like(case.labels, 20 * EPS, dtype=float)
    assert_close(actual.values, expected.values, error, 1)
    assert_close(actual.next_values, expected.next_values, error, 1)


def vocab(case: Case) -> int:
    return case.logits.shape[-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_large_vocabulary(backend: str, vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    leaf = (4 * torch.randn(2, 3, vocab + 3, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (2, 3), generator=generator)
    labels[1, 2] = -100
    options = dict(lam=0.2, gamma=0.95, entropy_coef=0.1, boundary="bootstrap", backend=backend)
    for name, reduction, upstream in (
        ("iqlearn_loss", "sum", 1.0),
        ("iqlearn_loss", "none", torch.randn(2, 3, generator=generator)),
    ):
        case = Case(
            name,
            leaf,
            LAYOUTS["padded columns"][1],
            labels,
            {**options, "reduction": reduction},
            upstream,
        )
        check(getattr(irl, name), case)
