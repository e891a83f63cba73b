"""Batches cut into shards of the vocabulary and of the sequence, and put together again."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..cases import LAYOUTS as STRIDES
from ..cases import Case, Outcome, rarely
from .ranks import LAYOUTS, Ranks, place


@dataclass
class Split:
    """Who has which columns and rows."""

    layout: tuple[int, int]  # shards of the vocabulary, shards of the sequence
    spans: list[tuple[int, int]]  # columns of each shard of the vocabulary, padding included
    size: int | None  # vocab_size
    told: bool  # whether vocab_start is given
    order: Tensor | None  # [N] or [..., N]: rows in the order of the ranks
    vocab: bool  # whether a group is given, which a single shard may leave out
    sequence: bool
    strides: str

    def rows(self, x: Tensor, shard: int, extra: int = 0) -> Tensor:
        """Of an array ``[..., N]`` (``extra`` axes behind) those of one shard."""
        axis = x.ndim - 1 - extra
        count = x.shape[axis] // self.layout[1]
        chosen = slice(shard * count, (shard + 1) * count)
        if self.order is None:
            return x.narrow(axis, chosen.start, count).clone()
        index = self.order[..., chosen]
        index = index.reshape(*(1,) * (axis + 1 - index.ndim), *index.shape, *(1,) * extra)
        shape = list(x.shape)
        shape[axis] = count
        return torch.take_along_dim(x, index.expand(shape).long(), axis)

    def joined(self, parts: list[Tensor], extra: int = 0) -> Tensor:
        """The inverse of ``rows``."""
        axis = parts[0].ndim - 1 - extra
        x = torch.cat(parts, axis)
        if self.order is None:
            return x
        index = self.order.argsort(-1)
        index = index.reshape(*(1,) * (axis + 1 - index.ndim), *index.shape, *(1,) * extra)
        return torch.take_along_dim(x, index.expand(x.shape), axis)


@st.composite
def splits(
    draw: Any, rows: tuple[int, ...], vocab: int, layouts: tuple[tuple[int, int], ...] = LAYOUTS
) -> Split:
    length = rows[-1]
    layout = draw(st.sampled_from([x for x in layouts if length % x[1] == 0]))
    spans, size, told = even(vocab, layout[0]), None, False
    if spans is None or rarely(draw, 2):
        ends = sorted(draw(st.lists(st.integers(0, vocab), min_size=layout[0], max_size=layout[0])))
        ends[-1] = vocab
        spans, told = list(zip([0, *ends[:-1]], ends, strict=True)), True
    if rarely(draw, 3):  # padded columns, of which a rank may have nothing else
        size, told = vocab, True
        start, end = spans[-1]
        spans[-1] = (start, end + draw(st.integers(1, 5)))
    order, choice = None, draw(st.sampled_from(["", "", "arange", "permutation", "each", "zigzag"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if choice == "arange":
        order = torch.arange(length)
    elif choice == "permutation":
        order = torch.randperm(length, generator=generator)
    elif choice == "each":
        order = torch.rand(rows, generator=generator).argsort(-1)
    elif choice == "zigzag" and length % (2 * layout[1]) == 0:
        parts = torch.arange(length).view(2 * layout[1], -1)
        order = torch.cat([parts[[i, -1 - i]].flatten() for i in range(layout[1])])
    return Split(
        layout, spans, size, told, order,
        vocab=layout[0] > 1 or size is not None or draw(st.booleans()),
        sequence=layout[1] > 1 or order is not None or draw(st.booleans()),
        strides=draw(st.sampled_from(sorted(STRIDES))),
    )  # fmt: skip


def even(columns: int, shards: int) -> list[tuple[int, int]] | None:
    if columns % shards:
        return None
    width = columns // shards
    return [(i * width, (i + 1) * width) for i in range(shards)]


def jobs(call: str, case: Case, split: Split, upstream: list[Any]) -> list[dict[str, Any]]:
    """What each rank is asked: its part of the dense call."""
    out = []
    for rank in range(split.layout[0] * split.layout[1]):
        column, shard = place(rank, split.layout)
        x = columns(split.rows(case.logits, shard, 1), split, column, -1)
        grown, view = STRIDES[split.strides]
        leaf = torch.zeros(grown(*x.shape), dtype=x.dtype)
        seen = view(leaf)
        seen.copy_(x)
        job = a_job(call, case, split, rank, upstream)
        job["arrays"] = {"logits": (leaf, seen.shape, seen.stride(), seen.storage_offset())}
        out.append(job)
    return out


def linear_jobs(
    call: str, case: Case, split: Split, upstream: list[Any], layer: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The same of hidden states and a weight; ``layer``: hidden, weight, and bias or none."""
    out = []
    for rank in range(split.layout[0] * split.layout[1]):
        column, shard = place(rank, split.layout)
        job = a_job(call, case, split, rank, upstream)
        hidden = split.rows(layer["hidden"], shard, 1)
        weight = columns(layer["weight"], split, column, 0)
        job["arrays"] = {
            name: (x, x.shape, x.stride(), 0)
            for name, x in (("hidden", hidden), ("weight", weight))
        }
        if "bias" in layer:
            job["options"]["bias"] = columns(layer["bias"], split, column, 0)
        out.append(job)
    return out


def columns(x: Tensor, split: Split, column: int, axis: int) -> Tensor:
    """The columns of a shard of the vocabulary; padding is NaN."""
    start, end = split.spans[column]
    shape = list(x.shape)
    shape[axis] = max(0, end - x.shape[axis])
    whole = torch.cat([x, x.new_full(shape, torch.nan)], axis)
    return whole.narrow(axis, start, end - start).clone()


def a_job(call: str, case: Case, split: Split, rank: int, upstream: list[Any]) -> dict[str, Any]:
    """Everything but the arrays."""
    column, shard = place(rank, split.layout)
    job = options_of(case, split, shard) | {"call": call, "layout": split.layout}
    job["upstream"] = [cut(split, case.labels, x, shard) for x in upstream]
    if split.vocab:
        job["vocab"] = True
        job["options"] |= {"vocab_size": split.size} if split.size else {}
        job["options"] |= {"vocab_start": split.spans[column][0]} if split.told else {}
        if job["options"].get("keep_mask") is not None:
            job["options"]["keep_mask"] = columns(job["options"]["keep_mask"], split, column, -1)
    return job


def options_of(case: Case, split: Split, shard: int) -> dict[str, Any]:
    """The labels and options of a shard of the sequence."""
    options = {
        name: x if name == "cu_seqlens" else cut(split, case.labels, x, shard)
        for name, x in case.options.items()
    }
    more = [options.pop("is_expert")] if "is_expert" in options else []
    job = {"labels": split.rows(case.labels, shard), "more": more, "options": options}
    if split.sequence:
        job["sequence"] = True
        if split.order is not None:
            plain = Split(**{**vars(split), "order": None})
            options["sequence_order"] = plain.rows(split.order, shard)
    return job


def cut(split: Split, labels: Tensor, x: Any, shard: int) -> Any:
    """Of an array with one or several numbers per row the rows of the shard; else as it is."""
    if not isinstance(x, Tensor) or x.shape[: labels.ndim] != labels.shape:
        return x
    return split.rows(x, shard, x.ndim - labels.ndim)


def refuse_errors(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert "error" not in answer, answer["trace"]


def outputs(split: Split, answers: list[dict[str, Any]]) -> list[Tensor | None]:
    """The whole outputs, which all ranks of a shard of the sequence have alike, to the last bit."""
    refuse_errors(answers)
    parts: list[list[Tensor]] = []
    for shard in range(split.layout[1]):
        ranks = range(shard * split.layout[0], (shard + 1) * split.layout[0])
        first = answers[ranks[0]]["outputs"]
        for rank in ranks:
            assert all(map(same, answers[rank]["outputs"], first))
        parts.append(first)
    whole: list[Tensor | None] = []
    for found in zip(*parts, strict=True):
        if found[0] is None or found[0].ndim == 0:
            assert all(same(x, found[0]) for x in found)
            whole.append(found[0])
        else:
            several = found[0].ndim - parts[0][0].ndim  # the first has a number per row
            whole.append(split.joined(list(found), several))
    return whole


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """Alike to the last bit."""
    if x is None or y is None:
        return x is y
    return torch.equal(x, y) or torch.equal(x.nan_to_num(1e30), y.nan_to_num(1e30))


def of_rows(
    split: Split, answers: list[dict[str, Any]], name: str, extra: int = 0
) -> Tensor | None:
    """The whole gradient of something that every rank has its rows of."""
    found = [answer["gradients"].get(name) for answer in answers[:: split.layout[0]]]
    return None if found[0] is None else split.joined(found, extra)


def dense_outcome(
    split: Split, case: Case, sent: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> Outcome:
    """The whole loss and gradients, from those of the ranks."""
    (loss, *_) = outputs(split, answers)
    logits = []
    for shard in range(split.layout[1]):
        parts = []
        for rank in range(shard * split.layout[0], (shard + 1) * split.layout[0]):
            _, size, stride, offset = sent[rank]["arrays"]["logits"]
            found = answers[rank]["gradients"]["logits"]
            parts.append(found.as_strided(size, stride, offset))
        whole = torch.cat(parts, -1)
        assert not whole[..., case.logits.shape[-1] :].any()  # padding
        logits.append(whole[..., : case.logits.shape[-1]])
    heads = (of_rows(split, answers, name) for name in ("values", "next_values"))
    return Outcome(loss, split.joined(logits, 1), *heads)


def run(ranks: Ranks, split: Split) -> Any:
    """``cases.check``'s way to compute a loss: on several processes."""

    def compute(_: Any, case: Case) -> Outcome:
        upstream = case.upstream
        if not isinstance(upstream, Tensor):
            upstream = torch.tensor(float(upstream))
        sent = jobs(case.name, case, split, [upstream])
        return dense_outcome(split, case, sent, ranks.run(sent))

    return compute
