"""Losses of logits cut among processes, against float64 losses and gradients of the whole."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_ops.torch.tokens import TokenStats

from .. import naive
from ..cases import (
    EPS,
    assert_close,
    cases,
    check,
    differentiate,
    magnitude,
    slack,
)
from .ranks import Ranks
from .split import (
    dense_outcome,
    jobs,
    linear_jobs,
    of_rows,
    outputs,
    refuse_errors,
    run,
    splits,
)


@given(data=st.data())
@settings(max_examples=60)
def test_loss_and_gradients(ranks: Ranks, data: Any) -> None:
    case = data.draw(cases())
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    check(None, case, run(ranks, split))


@given(data=st.data(), entropy=st.booleans())
@settings(max_examples=40)
def test_token_stats(ranks: Ranks, data: Any, entropy: bool) -> None:
    """Outputs, and the gradient of a random sum of them, whose terms are on all ranks."""
    case = data.draw(cases(names=("iqlearn_loss",), garbage=False))
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    kept = "ignore_index shift where segment_ids position_ids cu_seqlens eos_token_id boundary"
    kept += " truncated gamma detach_next values next_values logit_scale softcap"
    case.options = {k: v for k, v in case.options.items() if k in kept.split()}
    case.upstream = 1.0
    names = ["value", "logprob", "entropy", "reward", "next_value"]
    generator = torch.Generator().manual_seed(case.labels.numel())
    upstream = {n: torch.randn(case.labels.shape, generator=generator) for n in names}
    if not entropy:
        del upstream["entropy"]

    above = [upstream.get(name) for name in TokenStats._fields]
    sent = jobs("token_stats", case, split, above)
    for job in sent:
        job["options"]["entropy"] = entropy
    answers = ranks.run(sent)
    actual = dict(zip(TokenStats._fields, outputs(split, answers), strict=True))
    expected = naive.token_stats(case.logits.double(), case.labels, **case.options)
    assert torch.equal(actual["kind"].long(), expected["kind"])
    error = 2 * EPS * magnitude(case)
    for name in upstream:
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=EPS, atol=error
        )
    found = dense_outcome(split, case, sent, answers)
    whole = differentiate(
        lambda *a, **k: sum(
            (g * naive.token_stats(*a, **k)[name]).sum() for name, g in upstream.items()
        ),
        case,
        torch.float64,
    )
    # upstream gradients are of order 1; those of one row and of its neighbour meet
    vocab = case.logits.shape[-1]
    error = torch.full_like(
        found.logits, slack(case) * 20 * EPS * (1 + math.log(vocab)), dtype=float
    )
    assert_close(found.logits, whole.logits, error, 1)
    error = torch.full_like(case.labels, 20 * EPS, dtype=float)
    assert_close(found.values, whole.values, error, 1)
    assert_close(found.next_values, whole.next_values, error, 1)


@given(data=st.data())
@settings(max_examples=40)
def test_linear(ranks: Ranks, data: Any) -> None:
    """The loss, and the gradients of hidden, weight and bias; float32."""
    case = data.draw(cases(garbage=False))
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows, vocab, width = tuple(case.labels.shape), case.logits.shape[-1], 6
    layer = {
        "hidden": torch.randn(*rows, width, generator=generator),
        "weight": torch.randn(vocab, width, generator=generator),
    }
    if data.draw(st.booleans()):
        layer["bias"] = torch.randn(vocab, generator=generator)
    upstream = case.upstream
    above = upstream if isinstance(upstream, torch.Tensor) else torch.tensor(float(upstream))
    sent = linear_jobs(f"linear_{case.name}", case, split, [above], layer)
    for job in sent:
        job["options"] |= {"chunk_size": 3, "drop_rows": data.draw(st.booleans())}
        job["options"]["drop_rows"] = sent[0]["options"]["drop_rows"]
    answers = ranks.run(sent)
    (loss,) = outputs(split, answers)
    whole = {name: x.double().requires_grad_() for name, x in layer.items()}
    q = whole["hidden"] @ whole["weight"].T
    q = q + whole["bias"] if "bias" in layer else q
    expected = naive.loss(case.name, q, case.labels, **case.options)[0]
    ((expected * above).sum() + 0 * q.sum()).backward()
    close = partial(torch.testing.assert_close, rtol=1e-4)
    # logits are sums of 6 products and rounded; squares of them and weights of up to 5 follow
    size = 1 + q.detach().abs().max().item() ** 2
    scale = 1e-5 * size * (1 + above.abs().max().item())
    close(loss.double(), expected.detach().double(), atol=scale)
    close(of_rows(split, answers, "hidden", 1).double(), whole["hidden"].grad, atol=10 * scale)
    columns, shards = split.layout
    for name in ("weight", "bias"):
        if name not in layer:
            continue
        parts = [
            sum(answers[shard * columns + column]["gradients"][name] for shard in range(shards))
            for column in range(columns)
        ]
        found = torch.cat(parts)
        assert not found[vocab:].any()
        close(found[:vocab].double(), whole[name].grad, atol=10 * scale)


N = None


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [
        ((0, N), (N, 0), (N, 0)),  # data parallelism, and tensor parallelism
        ((1, N), (N, 0), N),  # context parallelism; a plain bias
        ((0, 1), (N, 0), (N, 0)),  # sequence parallelism, whose rows are gathered
        (N, (0, N), (0, N)),  # plain hidden states
        ((N, 1), (N, N), (N, N)),  # whole columns
        ((0, N), N, N),
    ],
)
def test_linear_dtensor(ranks: Ranks, hidden: Any, weight: Any, bias: Any) -> None:
    """Uneven shards; gradients come back as what they are of, and are those of all rows."""
    generator = torch.Generator().manual_seed(5)
    arrays = {
        "hidden": torch.randn(3, 7, 5, generator=generator),
        "weight": torch.randn(19, 5, generator=generator),
        "bias": torch.randn(19, generator=generator),
    }
    labels = torch.randint(19, (3, 7), generator=generator)
    labels[0, :3] = -100
    options = {"lam": 0.3, "gamma": 0.9, "shift": True, "entropy_coef": 0.1}
    job = {
        "call": "linear dtensor", "function": "linear_iqlearn_loss", "labels": labels,
        "arrays": {
            name: (x, dims)
            for (name, x), dims in zip(arrays.items(), (hidden, weight, bias), strict=True)
        },
        "options": options | {"chunk_size": 4},
    }  # fmt: skip
    answers = ranks.run([job] * 4)
    refuse_errors(answers)
    whole = {name: x.double().requires_grad_() for name, x in arrays.items()}
    q = whole["hidden"] @ whole["weight"].T + whole["bias"]
    expected, _ = naive.loss("iqlearn_loss", q, labels, **options)
    expected.backward()
    # logits are sums of a few products, squared
    close = {"rtol": 1e-4, "atol": 1e-4}
    for answer in answers:
        assert answer["kept"]
        torch.testing.assert_close(answer["outputs"][0].double(), expected.detach(), **close)
        for name, x in whole.items():
            if weight is N and name != "hidden":
                continue  # plain on processes that have other rows: the gradient of those here
            torch.testing.assert_close(answer["gradients"][name].double(), x.grad, **close)
    if weight is N:
        for name in ("weight", "bias"):
            both = answers[0]["gradients"][name] + answers[2]["gradients"][name]
            torch.testing.assert_close(both.double(), whole[name].grad, **close)
