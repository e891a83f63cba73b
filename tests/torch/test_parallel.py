"""Losses of logits cut among processes, against float64 losses and gradients of the whole."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_ops.torch.token_fields import TokenStats

from .. import measure_cases, naive
from ..cases import (
    EPS,
    Case,
    assert_close,
    cases,
    check,
    differentiate,
    magnitude,
    slack,
)
from ..layer_cases import allowed, assert_within
from .ranks import Ranks
from .split import (
    Split,
    dense_outcome,
    jobs,
    linear_jobs,
    of_rows,
    outputs,
    refuse_errors,
    run,
    splits,
)

B, T, V, K = 2, 8, 24, 3
GENERATOR = torch.Generator().manual_seed(3)
LABELS = torch.randint(V, (B, T), generator=GENERATOR)
KEEP = (torch.rand(B, T, V, generator=GENERATOR) < 0.8) | (torch.arange(V) == LABELS[..., None])
IDS = KEEP.float().topk(K).indices  # those that are kept have finite log-likelihoods
ALL: dict[str, Any] = dict(
    temperature=torch.rand(B, T, generator=GENERATOR) + 0.5, extra_ids=IDS, keep_mask=KEEP,
    extras=("log_sum_sq", "top1", "mean_logit"), gamma=0.9,
)  # fmt: skip
NONE = [None] * len(TokenStats._fields)
VOCAB = Split((2, 1), [(0, 7), (7, V)], None, True, None, True, False, "contiguous")
ROWS = Split((1, 2), [(0, V)], None, False, None, False, True, "contiguous")
BOTH = Split((2, 2), [(0, 24), (24, V + 4)], V, True, None, True, True, "contiguous")


@given(data=st.data())
@settings(max_examples=60)
def test_loss_and_gradients(ranks: Ranks, data: Any) -> None:
    case = data.draw(cases())
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    check(None, case, run(ranks, split))


@given(data=st.data(), entropy=st.booleans())
@settings(max_examples=30)
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
    within, bounds = allowed(case, layer)
    assert_within("the loss", loss, expected, within)
    hidden = of_rows(split, answers, "hidden", 1)
    assert_within("hidden", hidden, whole["hidden"].grad, bounds["hidden"])
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
        assert_within(name, found[:vocab], whole[name].grad, bounds[name])


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


def asked(**options: Any) -> Case:
    logits = 2 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(5))
    return Case("token_stats", logits, lambda x: x, LABELS, ALL | options, 1.0)


def measured(ranks: Ranks, split: Split) -> Any:
    """``measure_cases.check``'s way to compute statistics: on several processes."""

    def compute(_: Any, case: Case) -> measure_cases.Found:
        above = [case.upstream.get(name) for name in TokenStats._fields]
        sent = jobs("token_stats", case, split, above)
        answers = ranks.run(sent)
        fields = dict(zip(TokenStats._fields, outputs(split, answers), strict=True))
        found = dense_outcome(split, case, sent, answers)
        return measure_cases.Found(fields, found.logits, found.values, found.next_values)

    return compute


@given(data=st.data())
@settings(max_examples=30)
def test_measures(ranks: Ranks, data: Any) -> None:
    case = data.draw(measure_cases.measure_cases())
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    measure_cases.check(None, case, measured(ranks, split))


@pytest.mark.parametrize("split", [VOCAB, ROWS, BOTH], ids=["vocabulary", "rows", "both"])
@pytest.mark.parametrize("bias", [False, True])
def test_measures_of_a_layer(ranks: Ranks, split: Split, bias: bool) -> None:
    """Chunks that are not all full, a shard of padding alone, the sums of every rank."""
    case, width = asked(shift=True, softcap=20.0, chunk_size=3), 6
    g = torch.Generator().manual_seed(1)
    layer = {"hidden": torch.randn(B, T, width, generator=g)}
    layer["weight"] = torch.randn(V, width, generator=g)
    if bias:
        layer["bias"] = torch.randn(V, generator=g)
    names = ["value", "logprob", "entropy", "reward", "extra_logprob", "log_sum_sq", "mean_logit"]
    above = {n: torch.randn((B, T, K) if n == "extra_logprob" else (B, T)) for n in names}
    sent = linear_jobs(
        "linear_token_stats", case, split, [above.get(n) for n in TokenStats._fields], layer
    )
    answers = ranks.run(sent)
    found = dict(zip(TokenStats._fields, outputs(split, answers), strict=True))
    whole = {name: x.double().requires_grad_() for name, x in layer.items()}
    q = whole["hidden"] @ whole["weight"].T + whole.get("bias", 0.0)
    options = {n: x for n, x in case.options.items() if n != "chunk_size"}
    wanted = naive.token_stats(q, LABELS, **options)
    assert torch.equal(found["top1"], wanted["top1"])
    # labels that are shifted may not be kept: their log-likelihood is -inf, without a gradient
    sum((above[n] * wanted[n]).sum() for n in names).backward()
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32 rounds logits of about 10
    for n in names:
        torch.testing.assert_close(found[n].double(), wanted[n].detach().double(), **close)
    hidden = of_rows(split, answers, "hidden", 1)
    torch.testing.assert_close(hidden.double(), whole["hidden"].grad, **close)
    columns, shards = split.layout
    for name in ("weight", "bias")[: 1 + bias]:
        parts = [
            sum(answers[shard * columns + column]["gradients"][name] for shard in range(shards))
            for column in range(columns)
        ]
        joined = torch.cat(parts)
        assert not joined[V:].any()
        torch.testing.assert_close(joined[:V].double(), whole[name].grad, **close)


def test_bytes_of_measures(ranks: Ranks) -> None:
    """A number per row for each: 12 as ever, 4 an id, the entropy's 4, and 16 of the extras."""
    rows = B * T
    for split, forward, backward in (
        (VOCAB, [24 + (12 + 4 * K + 4 + 4 + 4 + 8) * rows], []),
        (ROWS, [8 + 20 * rows // 2], [8 * rows]),
    ):
        above = [torch.ones(B, T) if n == "reward" else None for n in TokenStats._fields]
        for _ in range(2):  # the first call of a configuration compares it, once
            answers = ranks.run(jobs("token_stats", asked(), split, above))
        refuse_errors(answers)
        for answer in answers:
            assert [size for _, size in answer["forward"]] == forward
            assert [size for _, size in answer["backward"]] == backward


@pytest.mark.parametrize("placements", [(0, 2), (-1, 1), (0, 1)])
@pytest.mark.parametrize("distributed", [False, True])
def test_measures_of_a_dtensor(
    ranks: Ranks, placements: tuple[int, int], distributed: bool
) -> None:
    case = asked()
    job = {
        "call": "dtensor", "measures": True, "logits": case.logits, "labels": LABELS,
        "placements": placements, "distributed": distributed, "options": case.options,
    }  # fmt: skip
    answers = ranks.run([job] * 4)
    refuse_errors(answers)
    leaf = case.logits.double().requires_grad_()
    wanted = naive.token_stats(leaf, LABELS, **case.options)
    rows = sum(wanted[n] for n in ("logprob", "entropy", "log_sum_sq", "mean_logit"))
    (rows + wanted["extra_logprob"].sum(-1)).sum().backward()
    for answer in answers:  # numbers of order 10 in float32
        torch.testing.assert_close(answer["gradient"].double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_measures_in_float64(ranks: Ranks) -> None:
    case = asked()
    case.leaf = case.leaf.double()
    names = ["value", "entropy", "extra_logprob", "log_sum_sq", "mean_logit"]
    leaf = case.logits.clone().requires_grad_()
    wanted = naive.token_stats(leaf, LABELS, **case.options)
    sum(wanted[n].sum() for n in names).backward()
    shapes = {n: torch.ones_like(wanted[n]) for n in names}
    above = [shapes.get(n) for n in TokenStats._fields]
    sent = jobs("token_stats", case, VOCAB, above)
    answers = ranks.run(sent)
    found = dict(zip(TokenStats._fields, outputs(VOCAB, answers), strict=True))
    close = {"rtol": 1e-12, "atol": 1e-12}
    for n in names:
        torch.testing.assert_close(found[n], wanted[n].detach(), **close)
    gradient = dense_outcome(VOCAB, case, sent, answers).logits
    torch.testing.assert_close(gradient, leaf.grad, **close)


def test_what_a_rank_gives_alone(ranks: Ranks) -> None:
    """Ids and temperatures that are none are told to all; other forms of them are refused."""

    def errors(split: Split, changed: dict[str, Any], **options: Any) -> list[str]:
        sent = jobs("token_stats", asked(**options), split, NONE)
        sent[1]["options"] |= changed
        return [answer.get("error", "") for answer in ranks.run(sent)]

    bad = torch.full((B, T, K), V)
    for split in (VOCAB, BOTH):
        for error in errors(split, {}, extra_ids=bad):
            assert error.startswith("IndexError: extra_ids[0, 0, 0] is 24; accepted: 0 to 23")
    first, second = errors(ROWS, {"extra_ids": bad[:, : T // 2]})
    assert first.startswith("IndexError: token_stats: extra_ids of another rank of sequence_group")
    assert second.startswith("IndexError: extra_ids[0, 0, 0] is 24; accepted: 0 to 23")
    heat = ALL["temperature"].clone()
    heat[1, 6] = -0.5
    for split in (VOCAB, ROWS, BOTH):
        for i, error in enumerate(errors(split, {}, temperature=heat)):
            theirs = "token_stats: temperature of another rank of sequence_group has an element"
            here = split is VOCAB or i // split.layout[0] == 1  # the second half of the rows
            mine = "temperature has the element -0.5; accepted: numbers above 0"
            assert error.startswith("ValueError: " + (mine if here else theirs)), error
    for error in errors(VOCAB, {"extra_ids": IDS[..., :1]}, eos_token_id=[3, 4]):
        assert "the ranks of vocab_group differ in the number of extra_ids" in error
    for error in errors(VOCAB, {"extras": ("top1",)}, eos_token_id=[3, 4]):
        assert "the ranks of vocab_group differ in extras" in error
    sent = jobs("token_stats", asked(), VOCAB, NONE)
    for job in sent:
        job["options"]["keep_mask"] = KEEP
    for answer, width in zip(ranks.run(sent), (7, V - 7), strict=True):
        assert f"keep_mask has shape [2, 8, 24]; accepted: [2, 8, {width}]" in answer["error"]
    refuse_errors(ranks.run(jobs("token_stats", asked(), VOCAB, NONE)))  # nobody waits


def test_an_entropy_without_gradient(ranks: Ranks) -> None:
    """With plain kernels, and with those of the measures."""
    for options in ({}, {"extras": ("top1",)}):
        case = Case("token_stats", asked().logits, lambda x: x, LABELS, options, 1.0)
        case.options = options | {"entropy_grad": False}
        above = [torch.ones(B, T) if n == "entropy" else None for n in TokenStats._fields]
        for answer in ranks.run(jobs("token_stats", case, VOCAB, above)):
            assert answer["gradients"]["logits"] is None
            assert answer["outputs"][2].all()
