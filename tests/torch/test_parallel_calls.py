"""What parallel calls promise beside numbers: traffic, errors on all ranks, placements, bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.call import Call, StatsCall
from irl_ops.torch.shards import fits
from irl_ops.torch.token_fields import TokenStats

from .. import naive
from ..cases import EPS, Case
from .ranks import Ranks, place
from .split import Split, dense_outcome, even, jobs, linear_jobs, outputs, refuse_errors, same

B, T, V = 2, 8, 24
WHOLE = Split((1, 1), [(0, V)], None, False, None, True, True, "contiguous")
ORDER = torch.tensor([0, 1, 6, 7, 2, 3, 4, 5])  # zigzag: each rank has a head and a tail


def batch(name: str = "iqlearn_loss", **options: Any) -> Case:
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(B, T, V, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :2], labels[1, 5] = -100, -100
    options = {"lam": 0.3, "gamma": 0.9, **options}
    return Case(name, logits, lambda x: x, labels, options, 1.0)


def over(vocab: int = 1, sequence: int = 1, order: Tensor | None = None) -> Split:
    spans = even(V, vocab)
    assert spans
    return Split(
        (vocab, sequence), spans, None, False, order, vocab > 1, sequence > 1, "contiguous"
    )


def ask(ranks: Ranks, case: Case, split: Split, **more: Any) -> list[dict[str, Any]]:
    sent = jobs(case.name, case, split, [torch.tensor(1.0)])
    for job in sent:
        job |= more
    return ranks.run(sent)


@pytest.mark.parametrize(
    ("split", "options", "forward"),
    [
        (over(vocab=2), {}, [24 + 12 * B * T]),
        (over(vocab=4), {"entropy_coef": 0.1}, [24 + 16 * B * T]),
        (over(vocab=2), {"shift": True}, [24 + 12 * B * T]),
        # 8 of the label, 12 of the statistics; a rank has half of the rows
        (over(sequence=2), {}, [8 + 20 * B * T // 2]),
        (over(sequence=2, order=ORDER), {}, [8 + 20 * B * T // 2 + 8 * T // 2]),
        (over(sequence=2), {"shift": True}, [8 + 20 * B * T // 2]),
        (over(vocab=2, sequence=2), {}, [24 + 12 * B * T // 2, 8 + 20 * B * T // 2]),
        (over(vocab=2, sequence=2), {"shift": True}, [24 + 12 * B * T // 2, 8 + 20 * B * T // 2]),
        # in another order a row's next label may be anywhere
        (
            over(sequence=2, order=ORDER),
            {"shift": True},
            [8 + 8 * B * T // 2 + 8 * T // 2, 8 + 12 * B * T // 2 + 8 * T // 2],
        ),
    ],
)
def test_bytes_that_a_rank_sends(
    ranks: Ranks, split: Split, options: dict[str, Any], forward: list[int]
) -> None:
    case = batch(**options)
    for _ in range(2):  # the first call of a configuration compares it, once
        answers = ask(ranks, case, split)
    refuse_errors(answers)
    for rank, answer in enumerate(answers):
        edges = [size for name, size in answer["forward"] if name == "batch_isend_irecv"]
        collectives = [size for name, size in answer["forward"] if name != "batch_isend_irecv"]
        assert collectives == forward
        assert answer["backward"] == []
        if options.get("shift") and split.sequence and split.order is None:
            # the first label of each sequence here, to the rank before
            assert edges == [0 if place(rank, split.layout)[1] == 0 else 8 * B]
        else:
            assert edges == []


def test_backward_passes_that_meet(ranks: Ranks) -> None:
    """Losses of a rank's own rows, whose sum is meant; and hidden's gradient, once."""
    split = over(sequence=2)
    case = replace(batch(reduction="none"), upstream=torch.ones(B, T))
    sent = jobs(case.name, case, split, [case.upstream])
    for answer in ranks.run(sent):
        # logsum and the label's logit of all rows
        assert answer["backward"] == [("all_reduce", 8 * B * T)]
    layer = {"hidden": torch.randn(B, T, 6), "weight": torch.randn(V, 6)}
    one = torch.tensor(1.0)
    sent = linear_jobs("linear_iqlearn_loss", batch(), over(vocab=2), [one], layer)
    for job in sent:
        job["options"] |= {"chunk_size": 5, "drop_rows": False}  # 4 chunks of 4 rows
        job["products"] = True
    ranks.run(sent)
    for answer in ranks.run(sent):
        rows = B * T
        sizes = [size for _, size in answer["forward"]]
        assert sizes == [8 + 4 * rows, *[24 + 12 * 4] * 4]  # labels' logits, then each chunk's
        assert answer["backward"] == [("all_reduce", 4 * 6 * rows)]
        # of half of the columns the logits, once, and hidden's gradient; the counter knows no
        # addmm_, by which the weight's is added up
        assert answer["products"] == 2 * 2 * rows * 6 * V // 2


@pytest.mark.parametrize("order", [None, ORDER])
def test_values_are_those_of_one_device_to_the_last_bit(ranks: Ranks, order: Tensor | None) -> None:
    case = batch(entropy_coef=0.1, boundary="bootstrap")
    (loss,) = outputs(WHOLE, ask(ranks, case, WHOLE))
    for sequence in (2, 4):
        split = over(sequence=sequence, order=order)
        answers = ask(ranks, case, split)
        assert same(outputs(split, answers)[0], loss)
    stats = {"gamma": 0.9, "boundary": "bootstrap"}
    rewards = Case("token_stats", case.leaf, case.view, case.labels, stats, 1.0)
    split = over(sequence=2, order=order)
    none = [None] * len(TokenStats._fields)
    found = outputs(split, ranks.run(jobs("token_stats", rewards, split, none)))
    one = outputs(WHOLE, ranks.run(jobs("token_stats", rewards, WHOLE, none)))
    assert all(map(same, found, one))
    assert same(found[0], irl.token_stats(case.logits, case.labels).value)


@pytest.mark.parametrize("split", [over(vocab=2), over(sequence=4), over(vocab=2, sequence=2)])
def test_metrics(ranks: Ranks, split: Split) -> None:
    case = batch(entropy_coef=0.1, z_loss=0.01, shift=True)
    for answer in ask(ranks, batch(**case.options, return_metrics=True), split):
        _, rows = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
        expected = naive.metrics(rows, case.name, True, True)
        assert set(answer["metrics"]) == set(expected)
        for name, x in expected.items():
            # values of up to 10, and their squares
            assert abs(answer["metrics"][name].item() - x) < 100 * EPS * (1 + abs(x)), name


def test_num_items_and_packing(ranks: Ranks) -> None:
    """N is of the whole batch; documents are cut wherever the ranks are."""
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0] * 8])
    for options in ({"num_items": 5.0}, {"segment_ids": segments, "shift": True}):
        case = batch(**options)
        expected, _ = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
        split = over(sequence=4, order=torch.arange(T).flip(0))
        (loss,) = outputs(split, ask(ranks, case, split))
        torch.testing.assert_close(loss.double(), expected, rtol=100 * EPS, atol=0)


def error_of(answers: list[dict[str, Any]]) -> str:
    """The error, which all ranks have."""
    errors = {answer.get("error") for answer in answers}
    assert len(errors) == 1, errors
    (error,) = errors
    assert error
    return error


def test_bad_labels(ranks: Ranks) -> None:
    for split in (over(vocab=2), over(sequence=2), over(vocab=2, sequence=2)):
        for bad in (V, -7, 2**40):
            case = batch()
            case.labels[1, 6] = bad
            error = error_of(ask(ranks, case, split))
            assert error.startswith(f"IndexError: labels[1, 6] is {bad}; accepted: 0 to {V - 1}")
    refuse_errors(ask(ranks, batch(), over(vocab=2)))  # the ranks still understand each other


@pytest.mark.parametrize(
    ("split", "changed", "named"),
    [
        (over(vocab=2), {"lam": 0.4}, "lam"),
        (over(sequence=2), {"gamma": 1.0}, "gamma"),
        (over(vocab=2), {"entropy_coef": 0.1}, "entropy_coef"),
        (over(sequence=2), {"boundary": "drop"}, "boundary"),
        (over(sequence=2), {"token_weights": torch.ones(B, T // 2)}, "token_weights"),
        (over(vocab=2), {"vocab_size": 20}, "vocab_size"),
    ],
)
def test_ranks_that_differ(ranks: Ranks, split: Split, changed: dict[str, Any], named: str) -> None:
    # options that no call had before: those are compared by name
    case = batch(eos_token_id=list(range(1 + len(changed), 3 + len(named))))
    sent = jobs("iqlearn_loss", case, split, [torch.tensor(1.0)])
    sent[1]["options"] |= changed
    error = error_of(ranks.run(sent))
    assert error.startswith("ValueError: iqlearn_loss: the ranks of ") and named in error


def test_rows_that_differ(ranks: Ranks) -> None:
    sent = jobs("iqlearn_loss", batch(), over(sequence=2), [torch.tensor(1.0)])
    data, _, stride, offset = sent[1]["arrays"]["logits"]
    sent[1]["arrays"]["logits"] = (data, (B, 3, V), stride, offset)
    sent[1]["labels"] = sent[1]["labels"][:, :3].clone()
    for job in sent:
        job["options"]["eos_token_id"] = [5, 4, 3, 2, 1]  # as above
    assert "differ in labels" in error_of(ranks.run(sent))


@pytest.mark.parametrize("starts", [(0, 13), (0, 11), (5, 17), (0, 0)])
def test_columns_that_do_not_fit(ranks: Ranks, starts: tuple[int, int]) -> None:
    sent = jobs("iqlearn_loss", batch(), over(vocab=2), [torch.tensor(1.0)])
    for job, start in zip(sent, starts, strict=True):
        job["options"]["vocab_start"] = start
    error = error_of(ranks.run(sent))
    assert f"{starts[1]} to {starts[1] + 11}; accepted: all columns from 0 on" in error


def test_gathered_logits_count_once(ranks: Ranks) -> None:
    """Counted twice, a row's V would be off by log 2; vocab_size makes the second padding."""
    sent = jobs("iqlearn_loss", batch(), over(vocab=2), [torch.tensor(1.0)])
    whole = batch().logits
    for job in sent:
        job["arrays"]["logits"] = (whole, whole.shape, whole.stride(), 0)
        job["options"]["vocab_size"] = V
    (loss,) = outputs(over(vocab=2), ranks.run(sent))
    expected, _ = naive.loss("iqlearn_loss", whole.double(), batch().labels, **batch().options)
    torch.testing.assert_close(loss.double(), expected, rtol=100 * EPS, atol=0)


@pytest.mark.parametrize("backend", [*irl.available_backends(), "float64"])
def test_backends(ranks: Ranks, backend: str) -> None:
    """Uneven shards and padding with each of them, against float64."""
    options = {"entropy_coef": 0.1, "z_loss": 0.01, "boundary": "bootstrap"}
    name = "reference" if backend == "float64" else backend
    case = batch(**options, backend=name)
    split = Split((2, 2), [(0, 7), (7, V + 3)], V, True, ORDER, True, True, "contiguous")
    dtype, within = torch.float32, 1e-5  # sums of a few numbers of order 10, and their squares
    if backend == "float64":
        dtype, within = torch.float64, 1e-12
    case.leaf = case.leaf.to(dtype)
    sent = jobs(case.name, case, split, [torch.tensor(1.0)])
    found = dense_outcome(split, case, sent, ranks.run(sent))
    whole = case.logits.double().requires_grad_()
    expected, _ = naive.loss(case.name, whole, case.labels, **batch(**options).options)
    expected.backward()
    assert found.loss.dtype == found.logits.dtype == dtype
    close = {"rtol": within, "atol": within}
    torch.testing.assert_close(found.loss.double(), expected.detach(), **close)
    torch.testing.assert_close(found.logits.double(), whole.grad, **close)


def test_an_order_that_is_none(ranks: Ranks) -> None:
    sent = jobs("iqlearn_loss", batch(), over(sequence=2, order=ORDER), [torch.tensor(1.0)])
    sent[0]["options"]["sequence_order"] = torch.tensor([0, 1, 6, 6])
    assert "every index from 0 to 7, each once" in error_of(ranks.run(sent))


@pytest.mark.parametrize(
    ("vocab", "sequence", "options", "message"),
    [
        (False, False, {"vocab_start": 0}, "vocab_start is given without vocab_group"),
        (False, True, {"vocab_size": V}, "vocab_size is given without vocab_group"),
        (True, False, {"sequence_order": ORDER}, "sequence_order is given without sequence_group"),
        (True, False, {"vocab_start": -1}, "vocab_start is -1; accepted: an int of 0 or more"),
        (True, False, {"vocab_size": 0}, "vocab_size is 0; accepted: an int of 1 or more"),
        (True, False, {"vocab_size": V + 1}, f"accepted: the {V + 1} columns of vocab_size"),
        (False, True, {"sequence_order": [0]}, "sequence_order is a list; accepted: a tensor"),
        (False, True, {"sequence_order": ORDER[1:]}, "sequence_order has shape [7]; accepted: [8]"),
        (False, False, {"vocab_group": "tp"}, "vocab_group is 'tp'; accepted: a torch.distrib"),
        (True, True, {"temperatur": 1}, "iqlearn_loss has no option 'temperatur'"),
    ],
)
def test_arguments(
    ranks: Ranks, vocab: bool, sequence: bool, options: dict[str, Any], message: str
) -> None:
    split = replace(WHOLE, vocab=vocab, sequence=sequence)
    sent = jobs("iqlearn_loss", batch(), split, [torch.tensor(1.0)])
    sent[0]["options"] |= options
    assert message in error_of(ranks.run(sent))


def test_inplace(ranks: Ranks) -> None:
    split = over(vocab=2)
    fresh = ask(ranks, batch(), split, computed=True)
    taken = ask(ranks, batch(inplace=True), split, computed=True)
    for a, b in zip(fresh, taken, strict=True):
        assert same(a["gradients"]["logits"], b["gradients"]["logits"])
        assert b["spoilt"] and not a["spoilt"]


def test_compiled(ranks: Ranks) -> None:
    """A compiled function breaks its graph around the call; fullgraph says so."""
    split = over(vocab=2)
    plain, compiled = ask(ranks, batch(), split), ask(ranks, batch(), split, compile={})
    for a, b in zip(plain, compiled, strict=True):
        assert same(a["outputs"][0], b["outputs"][0])
        assert same(a["gradients"]["logits"], b["gradients"]["logits"])
    for answer in ask(ranks, batch(), split, compile={"fullgraph": True}):
        assert "the ranks of a group meet outside of compiled graphs" in answer["error"]


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("placements", [(0, 2), (-1, 1), (0, 1), (None, -1), (None, None)])
def test_dtensor(ranks: Ranks, placements: tuple[int | None, ...], distributed: bool) -> None:
    """Uneven shards, of all axes; labels distributed as the logits are, or given whole."""
    logits, labels = torch.randn(3, 7, 19), torch.randint(19, (3, 7))
    generator = torch.Generator().manual_seed(3)
    cut = torch.rand(3, generator=generator) < 0.5
    for options in ({"shift": True, "entropy_coef": 0.1}, {"truncated": cut, "boundary": "drop"}):
        options = {"lam": 0.3, "gamma": 0.9, **options}
        job = {
            "call": "dtensor", "logits": logits, "labels": labels, "placements": placements,
            "distributed": distributed, "options": options,
        }  # fmt: skip
        whole = logits.double().requires_grad_()
        expected, _ = naive.loss("iqlearn_loss", whole, labels, **options)
        expected.backward()
        answers = ranks.run([job] * 4)
        refuse_errors(answers)
        for answer in answers:
            assert answer["kept"]
            torch.testing.assert_close(
                answer["outputs"][0].double(), expected.detach(), rtol=100 * EPS, atol=0
            )
            # sums of a handful of terms of order 1
            torch.testing.assert_close(
                answer["gradient"].double(), whole.grad, rtol=100 * EPS, atol=100 * EPS
            )


def test_linear_dtensors_that_are_refused(ranks: Ranks) -> None:
    h, w = torch.randn(2, 4, 6), torch.randn(8, 6)
    job = {
        "call": "linear dtensor", "function": "linear_token_stats", "options": {},
        "labels": torch.zeros(2, 4, dtype=torch.long),
    }  # fmt: skip
    for hidden, weight, message in (
        (None, (1, None), "accepted: Shard(0), its columns of logits, and Replicate"),
        ((2, None), None, "accepted: Replicate, and Shard of an axis of its rows"),
    ):
        job["arrays"] = {"hidden": (h, hidden), "weight": (w, weight)}
        assert message in error_of(ranks.run([job] * 4))
    job["arrays"] = {"hidden": (h, None), "weight": (w, (None, 0))}
    job["options"] = {"sequence_order": torch.arange(4)}
    assert "sequence_order is given with weight that are a DTensor" in error_of(
        ranks.run([job] * 4)
    )
    job["options"] = {}
    answers = ranks.run([job] * 4)
    refuse_errors(answers)
    expected = naive.token_stats((h @ w.T).double(), job["labels"])["reward"]
    torch.testing.assert_close(answers[1]["outputs"][0].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_layout_with_the_sequence_first_is_not_copied(ranks: Ranks) -> None:
    """Megatron's [S, B, V]: the gradient has the logits' strides."""
    split = replace(over(vocab=2), strides="[T, B, V]")
    case = batch()
    sent = jobs(case.name, case, split, [torch.tensor(1.0)])
    found = dense_outcome(split, case, sent, ranks.run(sent))
    plain = jobs(case.name, case, over(vocab=2), [torch.tensor(1.0)])
    assert same(found.logits, dense_outcome(over(vocab=2), case, plain, ranks.run(plain)).logits)


@pytest.mark.slow
def test_a_rank_that_dies_ends_in_an_error() -> None:
    few = Ranks(2)
    try:
        case, split = batch(), over(vocab=2)
        refuse_errors(ask(few, case, split))
        sent = jobs(case.name, case, split, [torch.tensor(1.0)])
        few.processes[1].kill()
        few.processes[1].wait()
        (answer,) = few.run(sent[:1])
        assert "RuntimeError" in answer["error"] or "Error" in answer["error"]
    finally:
        few.kill()


@pytest.mark.parametrize(
    ("spans", "size", "expected"),
    [
        ([(0, 4), (4, 9)], None, (9, True)),
        ([(4, 9), (0, 4)], 9, (9, True)),
        ([(0, 4), (7, 7), (4, 9), (0, 0)], 9, (9, True)),
        ([(0, 4), (4, 9)], 8, (9, False)),
        ([(0, 4), (5, 9)], None, (9, False)),
        ([(0, 4), (3, 9)], None, (9, False)),
        ([(0, 4), (0, 4)], None, (4, False)),
        ([(2, 4), (4, 9)], None, (9, False)),
    ],
)
def test_whether_columns_fit_is_seen_on_a_device(
    spans: list[tuple[int, int]], size: int | None, expected: tuple[int, bool]
) -> None:
    """What decides where no host may wait: the loss is NaN where this is False."""
    count, right = fits(torch.tensor([(5, *span) for span in spans]), size)
    assert (count.item(), right.item()) == expected
    assert not fits(torch.tensor([(i, *span) for i, span in enumerate(spans)]), size)[1]


def test_calls_have_no_field_that_groups_would_ignore() -> None:
    """What a call gets beside these has to be served over groups, or refused there."""
    loss = "terms sequence weighting heads metrics inplace backend readout plain"
    assert " ".join(Call._fields) == loss
    assert (
        " ".join(StatsCall._fields) == "gamma sequence heads entropy backend readout measures plain"
    )


def test_options_of_groups_may_be_none() -> None:
    q, a = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    h, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    none: dict[str, Any] = dict.fromkeys(("vocab_group", "vocab_size", "sequence_order"))
    assert torch.equal(irl.iqlearn_loss(q, a, **none), irl.iqlearn_loss(q, a))
    assert torch.equal(irl.token_stats(q, a, **none).reward, irl.token_stats(q, a).reward)
    assert torch.equal(irl.linear_mle_loss(h, w, a, **none), irl.linear_mle_loss(h, w, a))
    linear = irl.linear_token_stats(h, w, a, **none)
    assert torch.equal(linear.value, irl.linear_token_stats(h, w, a).value)
