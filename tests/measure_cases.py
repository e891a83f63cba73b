"""Random batches for token_stats with all that it can be asked for, and the check against naive."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import naive
from .cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    ROUNDING,
    SMALLEST,
    VOCABS,
    Case,
    hide,
    number,
    rarely,
    sequences,
)

DIFFERENTIABLE = (
    "value", "logprob", "entropy", "reward", "next_value",
    "extra_logprob", "log_sum_sq", "mean_logit",
)  # fmt: skip


@st.composite
def measure_cases(draw: Any) -> Case:
    vocab = draw(st.sampled_from(VOCABS))
    lead, length = draw(st.sampled_from([(2,), (), (2, 3)])), draw(st.sampled_from([3, 5, 1, 4]))
    shape = (*lead, length)
    labels, options = draw(sequences(vocab, lead, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator)

    if rarely(draw, 2):
        options["logit_scale"] = number(draw, 1.0, 0.125, 2.5)
        options["softcap"] = draw(st.sampled_from([None, 30.0, 2.0]))
    options["gamma"] = number(draw, 0.9, 1.0)
    for name in ("values", "next_values"):
        if rarely(draw, 5):
            options[name] = uniform(*shape) - 0.5
    options["detach_next"] = rarely(draw, 4)
    heat = draw(st.sampled_from(["", "number", "row", "row"]))
    if heat:
        by_row = (0.3 + 2 * uniform(*shape)).to(
            draw(st.sampled_from([torch.float32, torch.float16]))
        )
        options["temperature"] = by_row if heat == "row" else number(draw, 0.7, 2.0)
    many = draw(st.sampled_from([None, 0, 1, 3, 6]))
    if many is not None:
        ids = (vocab * uniform(*shape, many)).long().clamp(max=vocab - 1)
        ignore = options["ignore_index"]
        ids[uniform(*shape, many) < 0.1] = ignore  # which may be a token, and is one then
        options["extra_ids"] = ids.to(draw(st.sampled_from([torch.int64, torch.int32])))
    options["extras"] = draw(
        st.sampled_from([(), ("top1", "mean_logit", "log_sum_sq"), ("log_sum_sq",)])
    )
    options["entropy"] = draw(st.booleans())
    if options["entropy"] and rarely(draw, 4):
        options["entropy_grad"] = False

    dtype = draw(st.sampled_from([torch.float32, torch.float32, *DTYPES]))
    offset, scale = draw(st.sampled_from([(0.0, 1.0), (0.0, 6.0), (-1e4, 1.0), (1e4, 1.0)]))
    x = (offset + scale * torch.randn((*shape, vocab), generator=generator)).to(dtype)
    if draw(st.booleans()):
        spared = [labels.flatten(), options.get("extra_ids", labels).flatten()]
        hide(x, torch.cat(spared), generator)
    if draw(st.booleans()):
        options["keep_mask"] = uniform(*x.shape) < draw(st.sampled_from([0.5, 0.9]))
        if rarely(draw, 2):  # nothing is kept of some rows
            options["keep_mask"][uniform(*shape) < 0.3] = False
    if draw(st.booleans()):
        options["keep_above"] = between(x, options, uniform(*shape))
    grown, view = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    leaf = torch.zeros(grown(*x.shape), dtype=dtype)
    view(leaf).copy_(x)
    case = Case("token_stats", leaf, view, labels, options, None)
    spoil(case, draw(st.sampled_from([None, math.nan, math.inf])))
    case.upstream = {
        name: torch.randn(sizes, generator=generator) for name, sizes in fields(case).items()
    }
    for name, g in case.upstream.items():  # what nobody asks of rows of garbage
        if name in ("value", "entropy", "extra_logprob", "log_sum_sq", "mean_logit"):
            g[garbage(case)] = 0.0
    return case


def between(x: Tensor, options: dict[str, Any], share: Tensor) -> Tensor:
    """A threshold of each row: where q is x one of its logits, else one between two of them."""
    q = naive.bend(x.double(), options).sort(-1).values
    place = (share * q.shape[-1]).long()[..., None]
    at = q.gather(-1, place)[..., 0]
    if options.get("softcap") is None and options.get("logit_scale", 1.0) == 1.0:
        return at.float()
    before = q.gather(-1, (place - 1).clamp(min=0))[..., 0]
    apart = (at - before > 1e-3) & (before > -math.inf)
    return torch.where(apart, (at + before) / 2, -math.inf).float()


def fields(case: Case) -> dict[str, tuple[int, ...]]:
    """The differentiable ones of the case, with their shapes."""
    shape, options = tuple(case.labels.shape), case.options
    names = ["value", "logprob", "reward", "next_value", *options["extras"]]
    if options["entropy"] and options.get("entropy_grad", True):
        names.append("entropy")
    found = {name: shape for name in names if name != "top1"}
    if "extra_ids" in options:
        found["extra_logprob"] = tuple(options["extra_ids"].shape)
    return found


def garbage(case: Case) -> Tensor:
    """Rows without a label that no row bootstraps from, bool ``[..., T]``."""
    zeros = torch.zeros_like(case.logits).double()
    batch = naive.rows_of(zeros, case.labels, case.options)
    free = [
        [
            row.kind == naive.IGNORED and (t == 0 or rows[t - 1].kind != naive.BOOTSTRAP)
            for t, row in enumerate(rows)
        ]
        for rows in batch
    ]
    return torch.tensor(free).reshape(case.labels.shape)


def spoil(case: Case, with_: float | None) -> None:
    if with_ is not None:
        case.logits[garbage(case)] = with_


@dataclass
class Found:
    """Fields by name, and the gradients of the sum of upstream times field."""

    fields: dict[str, Tensor | None]
    logits: Tensor
    values: Tensor | None
    next_values: Tensor | None


def run(function: Callable[..., Any], case: Case, wide: bool = False) -> Found:
    """By torch's autograd; ``wide`` in float64."""
    leaf = case.leaf.clone().to(torch.float64 if wide else case.leaf.dtype).requires_grad_()
    heads = {
        name: case.options[name].clone().to(torch.float64 if wide else torch.float32)
        for name in ("values", "next_values")
        if name in case.options
    }
    for x in heads.values():
        x.requires_grad_()
    given = {k: v for k, v in case.options.items() if not wide or k not in ("entropy",)}
    stats = function(case.view(leaf), case.labels, **{**given, **heads})
    by_name = stats if isinstance(stats, dict) else stats._asdict()
    total = sum((g * by_name[name]).sum() for name, g in case.upstream.items())
    total = total + 0 * leaf.nan_to_num(0, 0, 0).sum()  # in float64 a row may have no graph
    total.backward()
    back = (heads[n].grad if n in heads else None for n in ("values", "next_values"))
    detached = {k: None if x is None else x.detach() for k, x in by_name.items()}
    return Found(detached, case.view(leaf.grad), *back)


class Expected:
    """The naive statistics, and how far float32 may be from them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.found = run(naive.token_stats, case, wide=True)

    @cached_property
    def z(self) -> Tensor:
        options, shape = self.case.options, self.case.labels.shape
        x = self.case.logits.double()
        rows = [naive.drawn(x[at], options, at) for at in naive.np.ndindex(*shape)]
        return torch.stack(rows).reshape(x.shape)

    @cached_property
    def reach(self) -> Tensor:
        """The largest number of a row, ``[..., T]``."""
        return self.z.nan_to_num(0, 0, 0).abs().amax(-1)

    @cached_property
    def steepness(self) -> Tensor:
        options = self.case.options
        heat = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64)
        return (float(options.get("logit_scale", 1.0)) / heat).expand(self.case.labels.shape)

    def check(self, actual: Found) -> None:
        case, options, vocab = self.case, self.case.options, self.case.logits.shape[-1]
        others = sum(
            x.abs().max() for n in ("values", "next_values") if (x := options.get(n)) is not None
        )
        size = 2 * EPS * (math.log(vocab) + 2 * self.reach + others)  # row t + 1 is not larger here
        size = size.amax(-1, keepdim=True).expand(case.labels.shape)
        clean = ~garbage(case)
        for name, x in actual.fields.items():
            wanted = self.found.fields.get(name)
            if name in ("entropy", "extra_logprob", "log_sum_sq", "top1", "mean_logit"):
                asked = {"entropy": options["entropy"], "extra_logprob": "extra_ids" in options}
                assert (x is not None) == asked.get(name, name in options["extras"]), name
            if x is None or name in ("top1", "correct", "kind"):
                continue
            assert x.dtype == torch.float32 and x.shape == wanted.shape, name
            allowed = size[..., None] if name == "extra_logprob" else size
            # -inf less -inf: a reward between two rows of which nothing is kept
            same = (
                (x.double() == wanted)
                | (x.isnan() & wanted.isnan())
                | ((x.double() - wanted).abs() <= allowed + EPS * wanted.abs())
            )
            assert same[clean].all(), (name, x, wanted)
        assert torch.equal(actual.fields["kind"].long(), self.found.fields["kind"])
        self.check_bounds(actual.fields, clean)
        error = self.gradient_error()
        y, g = self.found.logits, actual.logits.double()
        assert actual.logits.dtype == case.leaf.dtype
        allowed = error + ROUNDING[case.leaf.dtype] * (y.abs() + error) + SMALLEST[case.leaf.dtype]
        largest = torch.finfo(case.leaf.dtype).max
        assert ((g - y.clamp(-largest, largest)).abs() <= allowed)[clean].all(), (g, y, allowed)
        assert not g[~clean].any() and not g[clean][(self.z == -math.inf)[clean]].any()
        for name in ("values", "next_values"):
            x, y = getattr(actual, name), getattr(self.found, name)
            y = torch.zeros(()).double() if y is None else y
            assert x is None or ((x - y).abs() <= 1e-5 * (1 + y.abs())).all()

    def check_bounds(self, found: dict[str, Any], clean: Tensor) -> None:
        """What holds whatever is rounded; float32 has no number that is log V."""
        most = float(torch.tensor(math.log(self.case.logits.shape[-1]))) * (1 + EPS)
        assert (found["logprob"] <= 0)[clean].all()
        if found["extra_logprob"] is not None:
            assert (found["extra_logprob"] <= 0)[clean].all()
        if found["entropy"] is not None:
            assert ((found["entropy"] >= 0) & (found["entropy"] <= most))[clean].all()
        empty = (self.z == -math.inf).all(-1)
        if found["log_sum_sq"] is not None:
            inside = (found["log_sum_sq"] <= 0) & (found["log_sum_sq"] >= -most - 4 * EPS)
            assert (inside | empty)[clean].all()
        if found["top1"] is not None:
            assert found["top1"].dtype in (torch.int64, torch.int32)
            best = self.z.gather(-1, found["top1"].long()[..., None])[..., 0]
            near = best >= self.z.amax(-1) - 2 * EPS * self.reach
            assert (near | empty)[clean].all()

    def gradient_error(self) -> Tensor:
        """Gradients from above are of order 1: of a row's own fields, and of its neighbour's."""
        vocab = self.case.logits.shape[-1]
        terms = 8 + 2 * sum(
            g.shape[-1] for n, g in self.case.upstream.items() if n == "extra_logprob"
        )
        each = 20 * EPS * terms * (1 + math.log(vocab))
        plain = {"logit_scale", "softcap", "temperature"}.isdisjoint(self.case.options)
        rounded = 0.0 if plain else self.reach  # z is rounded before anything is done with it
        return (each * self.steepness * (1 + rounded))[..., None].expand(self.z.shape)


def check(function: Callable[..., Any], case: Case, by: Callable[..., Found] = run) -> None:
    """``function`` against the naive statistics and their float64 autograd."""
    Expected(case).check(by(function, case))
