"""The losses of hidden states and a weight: the dense losses' random batches, in chunks."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.torch import linear_loss, linear_ops

from .. import naive
from ..cases import Case, cases
from ..layer_cases import allowed, assert_within

BACKENDS = irl.available_backends()
D = 6


def layer(case: Case, with_bias: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states, weight and bias for the case's labels and vocabulary."""
    generator = torch.Generator().manual_seed(case.labels.numel())
    vocab = case.logits.shape[-1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    given = {"hidden": random(*case.labels.shape, D), "weight": random(vocab, D)}
    return {**given, "bias": random(vocab)} if with_bias else given


def plain(case: Case, given: dict[str, Tensor], scale: float, softcap: float | None) -> Tensor:
    """The naive loss of whole float64 logits."""
    x = given["hidden"] @ given["weight"].mT + given.get("bias", 0.0)
    q = scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)
    return naive.loss(case.name, q, case.labels, **case.options)[0]


def ours(case: Case, given: dict[str, Tensor], **options: Any) -> Tensor:
    function = getattr(irl, f"linear_{case.name}")
    rest = dict(given)
    hidden, weight = rest.pop("hidden"), rest.pop("weight")
    return function(hidden, weight, case.labels, **rest, **case.options, **options)


def gradients(loss: Tensor, case: Case, leaves: list[Tensor]) -> list[Tensor]:
    total = (loss * torch.as_tensor(case.upstream, dtype=loss.dtype)).sum()
    total = total + 0 * sum(x.nan_to_num().sum() for x in leaves)  # terms of weight 0 have no graph
    return list(torch.autograd.grad(total, leaves))


READOUTS = st.sampled_from([(1.0, None), (1.0, None), (0.7, None), (0.7, 2.0)])


@settings(max_examples=60)
@given(
    case=cases(garbage=False, readout=False),
    chunk=st.sampled_from([None, 1, 2, 3, 7]),
    with_bias=st.booleans(),
    drop=st.sampled_from([None, True, False]),
    readout=READOUTS,
)
def test_against_float64(
    case: Case, chunk: int, with_bias: bool, drop: bool | None, readout: Any
) -> None:
    """In float64, where nothing but the mathematics is tested."""
    scale, softcap = readout
    given = layer(case, with_bias, torch.float64)
    heads = ("values", "next_values")
    for name, option in case.options.items():
        if isinstance(option, Tensor) and option.is_floating_point():  # lam, weights, values
            case.options[name] = option.double()
    for name in heads:
        if case.options.get(name) is not None:
            case.options[name] = case.options[name].requires_grad_()
    leaves = [x.requires_grad_() for x in given.values()]
    leaves += [case.options[name] for name in heads if case.options.get(name) is not None]
    expected = plain(case, given, scale, softcap)
    options = dict(chunk_size=chunk, drop_rows=drop, logit_scale=scale, softcap=softcap)
    loss = ours(case, given, **options)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    # num_items may be float32 numbers: 2^-24 of themselves
    for actual, exact in zip(
        gradients(loss, case, leaves), gradients(expected, case, leaves), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(
    case=cases(garbage=False, readout=False),
    chunk=st.sampled_from([1, 2, 5, 100]),
    with_bias=st.booleans(),
    readout=READOUTS,
)
def test_every_backend(backend: str, case: Case, chunk: int, with_bias: bool, readout: Any) -> None:
    """In float32, whose products and sums round: relative to the sizes of what is added up."""
    scale, softcap = readout
    given = layer(case, with_bias, torch.float32)
    for name in ("values", "next_values"):
        if case.options.get(name) is not None:
            case.options[name] = case.options[name].float()
    leaves = [x.requires_grad_() for x in given.values()]
    options = dict(chunk_size=chunk, logit_scale=scale, softcap=softcap, backend=backend)
    loss = ours(case, given, **options)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    expected = plain(case, exact, scale, softcap)
    within, bounds = allowed(case, given, logit_scale=scale, softcap=softcap)
    assert_within("the loss", loss, expected, within)
    wanted = gradients(expected, case, list(exact.values()))
    for name, actual, right in zip(given, gradients(loss, case, leaves), wanted, strict=True):
        assert_within(name, actual, right, bounds[name])


def confident(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = 4 * torch.randn(2, 12, 16, generator=generator)
    weight = 4 * torch.randn(40, 16, generator=generator)
    labels = (hidden @ weight.mT).argmax(-1)
    return hidden.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_log_probability_above_0(dtype: torch.dtype) -> None:
    """The label's logit is the chunk's, rounded as V's are, and not an exact product."""
    hidden, weight, labels = confident(dtype)
    stats = irl.linear_token_stats(hidden, weight, labels, chunk_size=5)
    assert (stats.logprob <= 0).all() and stats.correct.float().mean() > 0.9


def test_the_error_is_no_larger_than_the_dense_one() -> None:
    hidden, weight, labels = confident(torch.bfloat16)
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    irl.iqlearn_loss(exact[0] @ exact[1].mT, labels).backward()

    def error(actual: Tensor) -> float:
        return (actual.double() - exact[0].grad).norm().item()

    irl.iqlearn_loss(h @ w.mT, labels).backward()
    dense, h.grad = error(h.grad), None
    irl.linear_iqlearn_loss(h, w, labels, chunk_size=5).backward()
    assert error(h.grad) <= 1.05 * dense  # both round the same logits and the same gradient


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_chunk_sizes_agree(reduction: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 10, D), torch.randn(50, D)
    labels = torch.randint(50, (3, 10))
    found = []
    for chunk in (1, 4, 30):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = irl.linear_iqlearn_loss(h, w, labels, chunk_size=chunk, reduction=reduction)
        loss.sum().backward()
        found.append((loss.detach(), h.grad, w.grad))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("drop", [None, True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_nobody_needs_meet_no_product(
    monkeypatch: pytest.MonkeyPatch, reduction: str, drop: bool | None
) -> None:
    seen: list[int] = []

    class Watched(linear_loss.Linear):
        def __init__(self, kernels: Any, layer: Any, *rest: Any) -> None:
            seen.append(layer.hidden.shape[0])
            super().__init__(kernels, layer, *rest)

    for module in (linear_loss, linear_ops):
        monkeypatch.setattr(module, "Linear", Watched)
    hidden = torch.randn(2, 100, D, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(30, D, dtype=torch.float64), torch.full((2, 100), -100)
    labels[0, 40:45] = 3
    labels[1, 99] = 4
    options = dict(boundary="bootstrap", reduction=reduction)
    loss = irl.linear_iqlearn_loss(hidden, weight, labels, drop_rows=drop, **options)
    (actual,) = torch.autograd.grad(loss.sum(), hidden)
    with torch.no_grad():
        alone = irl.linear_iqlearn_loss(hidden, weight, labels, drop_rows=drop, **options)
    # six labels, and the row that the last of the five bootstraps from
    rows = 200 if drop is False else 5 + 1 + 1
    assert seen == [rows] * (2 if reduction == "mean" else 3)
    dense = naive.loss("iqlearn_loss", hidden @ weight.mT, labels, **options)[0]
    for x in (loss, alone):
        torch.testing.assert_close(x, dense)
    torch.testing.assert_close(actual, torch.autograd.grad(dense.sum(), hidden)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_that_anybody_needs(reduction: str) -> None:
    hidden = torch.randn(2, 5, D, requires_grad=True)
    weight, labels = torch.randn(30, D, requires_grad=True), torch.full((2, 5), -100)
    options = dict(reduction=reduction, entropy_coef=0.1)
    loss = irl.linear_iqlearn_loss(hidden, weight, labels, drop_rows=True, **options)
    found = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert not any(x.count_nonzero() for x in (loss, *found))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_product(frozen: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, D, requires_grad=frozen != "hidden")
    weight = torch.randn(30, D, requires_grad=frozen != "weight")
    labels = torch.randint(30, (2, 5))
    with torch.profiler.profile() as profile:
        irl.linear_iqlearn_loss(hidden, weight, labels).backward()
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    products = sum(name in ("aten::mm", "aten::addmm", "aten::addmm_") for name in names)
    assert products == 2  # the logits, and one of the two ways back


def test_float16_meets_a_loss_scale_before_it_is_rounded() -> None:
    """1/N of many rows alone is below what float16 holds."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, D).half(), torch.randn(20, D).half()
    labels, items, scale = torch.randint(20, (4,)), 2.0**22, 2.0**16
    h = hidden.clone().requires_grad_()
    (scale * irl.linear_iqlearn_loss(h, weight, labels, num_items=items)).backward()
    exact = hidden.double().requires_grad_()
    loss = irl.iqlearn_loss(exact @ weight.double().mT, labels, num_items=items)
    (scale * loss).backward()
    error = (h.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2**-8  # a few roundings of 2^-11


def test_tied_weight_and_checkpointing() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(30, D)
    ids, labels = torch.randint(30, (2, 5)), torch.randint(30, (2, 5))

    def loss(fused: bool) -> Tensor:
        hidden = embedding(ids).tanh()
        if fused:
            return irl.linear_iqlearn_loss(hidden, embedding.weight, labels, chunk_size=3)
        return irl.iqlearn_loss(hidden @ embedding.weight.mT, labels)

    found = []
    for run in (
        partial(loss, False),
        partial(loss, True),
        lambda: torch.utils.checkpoint.checkpoint(loss, True, use_reentrant=False),
        # a reentrant one asks for an input that requires a gradient
        lambda: torch.utils.checkpoint.checkpoint(
            lambda x: loss(True) + 0 * x, torch.zeros((), requires_grad=True), use_reentrant=True
        ),
    ):
        embedding.zero_grad()
        run().backward()
        found.append(embedding.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    for again in found[2:]:
        torch.testing.assert_close(again, found[1], rtol=0, atol=0)


def test_autocast_computes_the_products_in_its_dtype() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, D, requires_grad=True)
    weight = torch.randn(30, D, requires_grad=True)
    labels = torch.randint(30, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        loss = irl.linear_iqlearn_loss(hidden, weight, labels)
        dense = irl.iqlearn_loss(F.linear(hidden, weight), labels)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear_iqlearn_loss", "linear_token_stats"])
def test_one_graph_that_stores_no_logits(name: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, D, requires_grad=True)
    weight, labels = torch.randn(30, D, requires_grad=True), torch.randint(30, (2, 5))

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        found = getattr(irl, name)(hidden, weight, labels, chunk_size=4)
        return found.reward.square().sum() if name == "linear_token_stats" else found

    expected = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


HIDDEN, WEIGHT, LABELS = torch.randn(2, 5, D), torch.randn(30, D), torch.zeros(2, 5).long()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=WEIGHT.bfloat16()), TypeError, "weight is torch.bfloat16; accepted: torch.fl"),
        (dict(weight=WEIGHT.mT), ValueError, r"weight has shape \[6, 30\]; accepted: \[V, 6\]"),
        (dict(bias=torch.zeros(29)), ValueError, r"bias has shape \[29\]; accepted: \[30\]"),
        (dict(labels=LABELS[:1]), ValueError, r"labels has shape \[1, 5\]; accepted: \[2, 5\]"),
        (dict(chunk_size=0), ValueError, "chunk_size is 0; accepted: an int of 1 or more"),
        (dict(accumulate="half"), ValueError, "accumulate is 'half'; accepted: 'float32', 'we"),
        (dict(drop_rows=1), TypeError, "drop_rows is 1; accepted: True, False, None"),
        (dict(softcap=0.0), ValueError, r"softcap is 0\.0; accepted: a number above 0, or None"),
        (dict(logit_scale=math.nan), ValueError, "logit_scale is nan; accepted: a number above 0"),
        (dict(z_coef=1.0), TypeError, "linear_iqlearn_loss has no option 'z_coef'; accepted: bi"),
        (dict(labels=LABELS + 30), IndexError, r"labels\[0, 0\] is 30; accepted: 0 to 29"),
    ],
)
def test_bad_input(change: dict[str, Any], error: Any, message: str) -> None:
    given = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **change}
    positional = [given.pop(name) for name in ("hidden", "weight", "labels")]
    with pytest.raises(error, match=message):
        irl.linear_iqlearn_loss(*positional, **given)
