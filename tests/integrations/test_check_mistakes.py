"""``check`` names each mistake: the loss is broken on purpose, by the naive float64 loss."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irl_ops.jax
import irl_ops.torch as irl
from irl_ops.debug import CheckError, check

from .. import naive
from ..cases import sequences

V, END = 19, 2
RIGHT = {"lam": 0.3, "gamma": 0.9, "eos_token_id": END, "shift": True}
LENGTHS = (
    (13, 9, 4, 6),
    (11, 12, 9),
)  # documents of two rows, the last of each cut off where it ends


def packed():
    """Two rows of documents, ended by END; unshifted labels, and every other one has a prompt."""
    generator = torch.Generator().manual_seed(3)
    labels, documents = [], []
    for row in LENGTHS:
        ids, marks = [], []
        for number, length in enumerate(row):
            tokens = torch.randint(3, V, (length,), generator=generator).tolist()
            if number + 1 < len(row):
                tokens[-1] = END
            ids += tokens if number % 2 else [-100, -100, *tokens[2:]]
            marks += [number] * length
        labels.append(ids)
        documents.append(marks)
    logits = 2 * torch.randn(2, 32, V, generator=generator)
    return logits, torch.tensor(labels), torch.tensor(documents)


@pytest.fixture
def batch():
    logits, labels, documents = packed()
    return {"logits": logits, "labels": labels, "segment_ids": documents}


def loss(logits, labels, segment_ids=None, **options):
    """The naive loss, so that nothing under test is compared with itself."""
    options = RIGHT | options
    if segment_ids is not None:
        options["segment_ids"] = segment_ids
    return naive.loss("iqlearn_loss", logits.double(), labels, **options)[0]


def wrong(report):
    return {row.place for row in report.wrong}


def test_a_right_loss_is_right_everywhere(batch):
    report = check(loss, batch, **RIGHT, world_size=2, accumulation_steps=3).raise_if_wrong()
    assert {row.verdict for row in report.rows} == {"right"}
    assert {row.place for row in report.rows} >= {"shift", "neighbour", "end", "gradient"}


def test_our_own_loss_is_right(batch):
    report = check(functools.partial(irl.iqlearn_loss, **RIGHT), batch, **RIGHT)
    assert report.ok, str(report)
    module = check(irl.IQLearnLoss(**RIGHT), batch, **RIGHT)
    assert module.ok, str(module)


@st.composite
def any_batch(draw):
    """Logits, labels and options as the losses themselves are tested with."""
    vocab, length = draw(st.sampled_from([5, 17])), draw(st.sampled_from([4, 9, 16]))
    lead = draw(st.sampled_from([(), (2,), (3,)]))
    labels, options = draw(sequences(vocab, lead, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = 2 * torch.randn(*lead, length, vocab, generator=generator)
    weights = torch.rand(labels.shape, generator=generator)
    choices = {
        "lam": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "gamma": draw(st.sampled_from([1.0, 0.9, 0.0])),
        "token_weights": draw(st.sampled_from([None, weights])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "num_items": draw(st.sampled_from([None, 7])),
        "detach_next": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return logits.to(dtype), labels, options | choices


@settings(max_examples=25)
@given(any_batch())
def test_a_right_loss_is_never_called_wrong(drawn):
    logits, labels, options = drawn
    call = functools.partial(irl.iqlearn_loss, **options)
    report = check(call, {"logits": logits, "labels": labels}, **options)
    assert report.ok, str(report)


def unshifted(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, shift=False)


def shifted_twice(logits, labels, segment_ids):
    return loss(logits[:, :-1], labels[:, 1:], segment_ids[:, 1:])


def across_documents(logits, labels, segment_ids):
    return loss(logits, labels)


def no_neighbour(logits, labels, segment_ids):
    alone = torch.arange(labels.shape[1]).expand(labels.shape)
    aligned = torch.where(
        torch.nn.functional.pad(segment_ids.diff() == 0, (0, 1)),
        torch.nn.functional.pad(labels[:, 1:], (0, 1)),
        -100,
    )
    return loss(logits, aligned, alone, shift=False, eos_token_id=None)


def aligned(labels, segment_ids):
    same = torch.nn.functional.pad(segment_ids.diff() == 0, (0, 1))
    return torch.where(same, torch.nn.functional.pad(labels[:, 1:], (0, 1)), -100)


def in_chunks(logits, labels, segment_ids, chunks=4):
    labels = aligned(labels, segment_ids)
    total = sum(
        loss(q, y, ids, shift=False, reduction="sum")
        for q, y, ids in zip(
            *(x.chunk(chunks, 1) for x in (logits, labels, segment_ids)), strict=True
        )
    )
    return total / (labels != -100).sum()


def compacted(logits, labels, segment_ids):
    labels = aligned(labels, segment_ids)
    kept = labels != -100
    ids = (segment_ids + torch.tensor([[0], [10]]))[kept]
    return loss(logits[kept][None], labels[kept][None], ids[None], shift=False)


def no_end_token(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, eos_token_id=None)


def no_td_term(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, lam=0.0)


def default_gamma(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, gamma=1.0)


def summed(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, reduction="sum")


def by_all_rows(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, num_items=labels.numel())


def by_sequence(logits, labels, segment_ids):
    both = zip(*(x.split(1) for x in (logits, labels, segment_ids)), strict=True)
    return sum(loss(*one) for one in both) / 2


def by_sliced_rows(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, num_items=labels[:, 1:].numel())


def by_sequences(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids, num_items=len(labels))


def times_ranks(logits, labels, segment_ids):
    return 4 * loss(logits, labels, segment_ids)


def over_steps(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids) / 3


def rounded(dtype):
    def of(logits, labels, segment_ids):
        return loss(logits.to(dtype), labels, segment_ids)

    return of


def narrow(logits, labels, segment_ids):
    return loss(logits, labels, segment_ids).bfloat16()


MISTAKES = {
    "unshifted": (unshifted, "shift", "not shifted"),
    "shifted twice": (shifted_twice, "shift", "shifted twice"),
    "across documents": (across_documents, "neighbour", "of the next"),
    "no neighbour": (no_neighbour, "neighbour", "no row reads the next one"),
    "in chunks": (in_chunks, "neighbour", "in 4 chunks"),
    "compacted": (compacted, "neighbour", "rows without a label are dropped"),
    "no end token": (no_end_token, "end", "eos_token_id is not given"),
    "no TD term": (no_td_term, "terms", "no TD term"),
    "default gamma": (default_gamma, "terms", "gamma is 1.0, the default"),
    "summed": (summed, "normaliser", "not divided by N"),
    "by all rows": (by_all_rows, "normaliser", "divided by all 64 rows"),
    "by sliced rows": (by_sliced_rows, "normaliser", "rows of sliced sequences"),
    "by sequences": (by_sequences, "normaliser", "by the number of sequences"),
    "by sequence": (by_sequence, "normaliser", "each sequence is averaged by itself"),
    "times ranks": (times_ranks, "ranks", "multiplied by the number of ranks"),
    "over steps": (over_steps, "accumulation", "divided by the number of micro-batches"),
    "bfloat16 logits": (rounded(torch.bfloat16), "dtype", "rounded to bfloat16"),
    "float16 logits": (rounded(torch.float16), "dtype", "rounded to float16"),
    "bfloat16 loss": (narrow, "dtype", "the loss itself is bfloat16"),
}


@pytest.mark.parametrize(("broken", "place", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(batch, broken, place, words):
    report = check(broken, batch, **RIGHT, world_size=4, accumulation_steps=3)
    assert wrong(report) == {place}, str(report)
    assert any(words in row.words for row in report.wrong), str(report)
    with pytest.raises(CheckError, match="the loss is not what is expected"):
        report.raise_if_wrong()


def test_labels_that_are_shifted_beforehand(batch):
    batch["labels"] = aligned(batch["labels"], batch["segment_ids"])
    right = RIGHT | {"shift": False}
    assert check(functools.partial(loss, shift=False), batch, **right).ok
    again = check(loss, batch, **right)
    assert wrong(again) == {"shift"}, str(again)
    assert "shifted again" in again.wrong[0].words


def test_sequences_joined_to_one(batch):
    labels = torch.randint(3, V, (2, 32), generator=torch.Generator().manual_seed(4))
    right = RIGHT | {"shift": False, "eos_token_id": None}

    def joined(logits, labels):
        return loss(logits.reshape(-1, V), labels.reshape(-1), **right)

    report = check(joined, {"logits": batch["logits"], "labels": labels}, **right)
    assert wrong(report) == {"neighbour"}, str(report)
    assert "joined to one" in report.wrong[0].words


def test_documents_that_the_loss_is_not_told(batch):
    documents = batch.pop("segment_ids")
    report = check(lambda q, y: loss(q, y), batch, documents=documents, **RIGHT)
    assert wrong(report) == {"neighbour"}, str(report)
    assert check(lambda q, y: loss(q, y), batch, **RIGHT).ok


def test_num_items(batch):
    call = functools.partial(loss, num_items=100)
    assert check(call, batch, num_items=100, **RIGHT).ok
    assert check(loss, batch | {"num_items": 100}, **RIGHT).ok
    own = check(loss, batch, num_items=100, **RIGHT)
    assert "the batch's own" in own.wrong[0].words, str(own)
    ranks = check(loss, batch, num_items=100, world_size=2, **RIGHT)
    assert any("each rank divides by its own" in row.words for row in ranks.wrong), str(ranks)
    twice = check(lambda *a, **k: loss(*a, **k) / 100, batch, num_items=100, **RIGHT)
    assert wrong(twice) == {"normaliser"}, str(twice)


def test_two_mistakes_at_once(batch):
    report = check(
        lambda q, y, segment_ids: 4 * loss(q, y, segment_ids, lam=0.0), batch, world_size=4, **RIGHT
    )
    assert wrong(report) == {"terms", "ranks"}, str(report)


def test_what_nobody_knows(batch):
    report = check(lambda *a, **k: 1.2345 * loss(*a, **k), batch, **RIGHT)
    assert [row.place for row in report.wrong] == ["unknown"]
    assert "1.2345 times" in report.wrong[0].words
    assert {row.verdict for row in report.rows} >= {"not judged"}
    nan = check(lambda *a, **k: loss(*a, **k) * float("nan"), batch, **RIGHT)
    assert not nan.ok


def test_a_batch_that_shows_little(batch):
    """One document of full length: what nobody could tell is not called right."""
    plain = {"logits": batch["logits"][:1], "labels": torch.arange(3, 35)[None] % 16 + 3}
    report = check(functools.partial(loss, shift=False), plain, **RIGHT | {"shift": False})
    verdicts = {row.place: row.verdict for row in report.rows}
    assert report.ok
    assert verdicts["ranks"] == verdicts["accumulation"] == "not shown"
    assert verdicts["shift"] == verdicts["terms"] == "right"


class Detached(torch.autograd.Function):
    """A right loss whose gradient is another."""

    @staticmethod
    def forward(ctx, logits, slope, value):
        ctx.slope = slope
        return value

    @staticmethod
    def backward(ctx, above):
        return above * ctx.slope, None, None


def with_gradient(change):
    def of(logits, labels, segment_ids):
        leaf = logits.detach().double().requires_grad_()
        value = loss(leaf, labels, segment_ids)
        (slope,) = torch.autograd.grad(value, leaf)
        slope = change(slope, labels, segment_ids, leaf)
        return Detached.apply(logits, slope.to(logits.dtype), value.detach())

    return of


def zeroed(slope, labels, segment_ids, leaf):
    return torch.where((aligned(labels, segment_ids) != -100)[..., None], slope, 0)


def stopped(slope, labels, segment_ids, leaf):
    value = loss(leaf, labels, segment_ids, detach_next=True)
    return torch.autograd.grad(value, leaf)[0]


GRADIENTS = {
    "zeroed": (zeroed, "rows without a label get none"),
    "stopped": (stopped, "does not flow through V'"),
    "doubled": (lambda slope, *_: 2 * slope, "it is 2 times"),
    "noise": (lambda slope, *_: slope + slope.roll(1, 1), "no known mistake"),
}


@pytest.mark.parametrize(("change", "words"), GRADIENTS.values(), ids=GRADIENTS)
def test_a_wrong_gradient_is_named(batch, change, words):
    report = check(with_gradient(change), batch, **RIGHT)
    assert wrong(report) == {"gradient"}, str(report)
    assert words in report.wrong[0].words
    assert 1 <= len(report.partings) <= 5
    assert "norm" in str(report)
    assert check(with_gradient(change), batch, gradient=False, **RIGHT).ok


def test_terms_beside_the_td_one(batch):
    more = {"entropy_coef": 0.2, "z_loss": 0.01, "softcap": 5.0, "logit_scale": 0.5}
    weights = torch.rand(2, 32)
    options = RIGHT | more
    batch["token_weights"] = weights
    right = functools.partial(loss, **more)
    assert check(right, batch, **options).ok
    for name, value in (("entropy_coef", 0.0), ("z_loss", 0.0), ("token_weights", None)):
        report = check(functools.partial(right, **{name: value}), batch, **options)
        if name == "token_weights":
            report = check(
                lambda q, y, segment_ids, token_weights: right(q, y, segment_ids), batch, **options
            )
        assert wrong(report) == {"terms"}, str(report)
    uncapped = functools.partial(right, softcap=None, logit_scale=1.0)
    assert "softcap" in check(uncapped, batch, **options).wrong[0].words


def test_jax_and_numpy():
    logits, labels, documents = (x.numpy() for x in packed())
    batch = {
        "logits": jnp.asarray(logits),
        "labels": jnp.asarray(labels, jnp.int32),
        "segment_ids": jnp.asarray(documents, jnp.int32),
    }
    call = jax.jit(functools.partial(irl_ops.jax.iqlearn_loss, **RIGHT))
    report = check(call, batch, **RIGHT)
    assert report.ok, str(report)
    assert report.rows[-1].verdict == "right"
    unmarked = check(lambda q, y, segment_ids: call(q, y), batch, **RIGHT)
    assert wrong(unmarked) == {"neighbour"}, str(unmarked)
    narrow = check(
        lambda q, y, segment_ids: call(q.astype(jnp.bfloat16), y, segment_ids=segment_ids),
        batch,
        **RIGHT,
    )
    assert wrong(narrow) == {"dtype"}, str(narrow)
    rows = check(
        lambda q, y, segment_ids: irl_ops.jax.iqlearn_loss(
            q, y, segment_ids=segment_ids, reduction="none", **RIGHT
        ),
        batch,
        reduction="none",
        **RIGHT,
    )
    assert rows.ok, str(rows)
    plain = {name: np.asarray(x) for name, x in batch.items()}
    number = check(
        lambda q, y, segment_ids: float(call(q, y, segment_ids=segment_ids)), plain, **RIGHT
    )
    assert number.ok
    assert number.rows[-1].verdict == "not shown"


def test_the_report_in_all_its_forms(batch):
    from rich.console import Console

    report = check(shifted_twice, batch, **RIGHT)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), console.export_text(), report._repr_html_()):
        assert "labels[t + 2]" in text
        assert "not what is expected" in text


def test_what_is_refused(batch):
    with pytest.raises(TypeError, match="check has no option 'lamda'"):
        check(loss, batch, lamda=0.1)
    with pytest.raises(ValueError, match=r"world_size is 0; accepted: 1 or more"):
        check(loss, batch, world_size=0)
    with pytest.raises(ValueError, match="documents and segment_ids are given"):
        check(loss, batch, documents=batch["segment_ids"], segment_ids=batch["segment_ids"])
    with pytest.raises(ValueError, match=r"batch=\['labels'\]; accepted for a function"):
        check(loss, {"labels": batch["labels"]})
    with pytest.raises(TypeError, match="target is a int; accepted"):
        check(3, batch)
    with pytest.raises(TypeError, match=r"the loss has shape \[2, 32\]; accepted"):
        check(functools.partial(loss, reduction="none"), batch, **RIGHT)
