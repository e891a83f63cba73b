"""token_stats with all that it can be asked for, against the naive statistics in float64."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings

import irl_ops.torch as irl
from irl_ops.torch.backends import BACKENDS

from .. import naive
from ..cases import DTYPES, Case
from ..measure_cases import check, fields, measure_cases

SERVING = [
    name
    for name in irl.available_backends()
    if BACKENDS[name].unavailable(torch.device("cpu")) is None
]
every_backend = pytest.mark.parametrize("backend", SERVING)
EXTRAS = ("log_sum_sq", "top1", "mean_logit")
GENERATOR = torch.Generator().manual_seed(5)
LABELS = torch.randint(17, (2, 4), generator=GENERATOR)
LOGITS = 3 * torch.randn(2, 4, 17, generator=GENERATOR)
IDS = torch.randint(17, (2, 4, 3), generator=GENERATOR)
HEAT = torch.rand(2, 4, generator=GENERATOR) + 0.5
KEEP = torch.rand(2, 4, 17, generator=GENERATOR) < 0.7
ALL: dict[str, Any] = dict(temperature=HEAT, extra_ids=IDS, keep_mask=KEEP, extras=EXTRAS)


def with_everything() -> Case:
    """One batch of which everything is asked: what random ones may all happen to leave out."""
    options = ALL | dict(ignore_index=-100, gamma=0.9, entropy=True)
    case = Case("token_stats", LOGITS, lambda leaf: leaf, LABELS, options, None)
    generator = torch.Generator().manual_seed(5)
    case.upstream = {
        name: torch.randn(sizes, generator=generator) for name, sizes in fields(case).items()
    }
    return case


@every_backend
@given(case=measure_cases())
@example(case=with_everything())
@settings(max_examples=40)
def test_everything(backend: str, case: Case) -> None:
    check(partial(irl.token_stats, backend=backend), case)


def test_a_layer_gives_what_its_logits_give() -> None:
    """Of chunks that are not all full, with gradients by hidden states, weight and bias."""
    hidden, weight, bias = (
        torch.randn(*sizes, generator=GENERATOR).requires_grad_()
        for sizes in ((2, 4, 6), (17, 6), (17,))
    )
    upstream = torch.randn(2, 4, generator=GENERATOR)
    kept = ALL | dict(keep_mask=KEEP | (torch.arange(17) == LABELS[..., None]), softcap=20.0)

    def gradients(stats: Any) -> tuple[torch.Tensor, ...]:
        extra = torch.where(stats.extra_logprob > -math.inf, stats.extra_logprob, 0.0).sum(-1)
        fields = (stats.logprob, stats.entropy, stats.log_sum_sq, stats.mean_logit, extra)
        return torch.autograd.grad(
            sum((upstream * x).sum() for x in fields), (hidden, weight, bias)
        )

    chunked = irl.linear_token_stats(hidden, weight, LABELS, bias=bias, chunk_size=3, **kept)
    whole = irl.token_stats(hidden @ weight.T + bias, LABELS, **kept)
    for name, one, other in zip(chunked._fields, chunked, whole, strict=True):
        # the product of a chunk may be summed in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)
    for one, other in zip(gradients(chunked), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    total = torch.zeros(17, 6)
    irl.linear_token_stats(
        hidden, weight, LABELS, chunk_size=3, accumulate=total, **kept
    ).log_sum_sq.sum().backward()
    assert weight.grad is None and total.any()


# of long rows the interpreter would take minutes
LENGTHS = [(b, v) for b in SERVING for v in (1, 2, 255, 257, 50257) if b != "triton" or v < 300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "vocab"), LENGTHS)
def test_nothing_leaves_its_range(backend: str, vocab: int, dtype: torch.dtype) -> None:
    """Uniform rows, confident rows, and logits as low as the dtype has them."""
    x = torch.zeros(1, 6, vocab)
    x[0, 1] = -60000.0
    x[0, 2] = 0.6 * torch.finfo(dtype).min  # divided by 0.7 it is not -inf yet
    x[0, 3, vocab // 2] = 30.0
    x[0, 4] = -60000.0 + torch.arange(vocab) % 7
    x[0, 5] = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1e-3
    x = x.to(dtype).requires_grad_()
    labels = torch.full((1, 6), vocab // 2)
    ids = torch.tensor([0, vocab - 1]).expand(1, 6, 2)
    for more in (
        dict(temperature=0.7),
        dict(extra_ids=ids, extras=EXTRAS),
        dict(keep_above=labels * 0 - 1e30),  # nothing is kept of float32's lowest row
    ):
        kept = [0, 1, 3, 4, 5]
        s = irl.token_stats(x, labels, backend=backend, boundary="drop", **more)
        most = torch.tensor(math.log(vocab)) * (1 + 2**-22)  # float32 has no log V
        assert (s.logprob <= 0).all() and (s.logprob > -math.inf)[:, kept].all()
        assert ((s.entropy >= 0) & (s.entropy <= most)).all()
        if s.log_sum_sq is not None:
            assert ((s.log_sum_sq <= 0) & (s.log_sum_sq >= -most - 1e-6)).all()
            assert (s.extra_logprob <= 0).all()
        (g,) = torch.autograd.grad((s.logprob + s.entropy).sum(), x)
        assert torch.isfinite(g).all()
        # an offset changes neither, and costs float64 its digits
        near = x.detach().double() - x.detach().double().amax(-1, keepdim=True)
        more.pop("keep_above", None)
        exact = naive.token_stats(near, labels, boundary="drop", **more)
        for name in ("entropy", "logprob"):  # logits of 8e4 are rounded to 0.004
            found = getattr(s, name).detach().double()[:, kept]
            torch.testing.assert_close(found, exact[name][:, kept], rtol=1e-4, atol=0.01)


@every_backend
def test_a_threshold_keeps_what_equals_it(backend: str) -> None:
    """Top-k sampling: the k-th largest logit is kept at any temperature."""
    third = LOGITS.topk(3).values[..., -1]
    for heat in (1.0, 0.7, HEAT):
        s = irl.token_stats(
            LOGITS, LABELS, keep_above=third, extras=EXTRAS, temperature=heat, backend=backend
        )
        top = LOGITS.topk(3).values.double() / (
            heat if isinstance(heat, float) else HEAT[..., None]
        )
        expected = -(top.softmax(-1) * top.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(s.entropy.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s.mean_logit.double(), top.mean(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(s.top1, LOGITS.argmax(-1))


@every_backend
def test_no_answer_is_right_where_nothing_is_kept(backend: str) -> None:
    kept = KEEP.clone()
    kept[0, 1] = False
    s = irl.token_stats(LOGITS, LABELS, keep_mask=kept, boundary="drop", backend=backend)
    assert s.logprob[0, 1] == s.value[0, 1] == -math.inf
    assert torch.equal(
        s.correct, LOGITS.where(kept, -math.inf).argmax(-1).eq(LABELS) & kept.any(-1)
    )


@every_backend
@pytest.mark.parametrize("more", [{}, dict(extras=("top1",))], ids=["plain", "measured"])
def test_an_entropy_without_gradient(backend: str, more: dict[str, Any]) -> None:
    leaf = LOGITS.clone().requires_grad_()
    options = dict(backend=backend, **more)
    s = irl.token_stats(leaf, LABELS, entropy_grad=False, **options)
    assert not s.entropy.requires_grad
    usual = irl.token_stats(leaf, LABELS, **options)
    assert torch.equal(s.entropy, usual.entropy.detach())
    one, other = (torch.autograd.grad(x.logprob.sum(), leaf)[0] for x in (s, usual))
    assert torch.equal(one, other)


def test_what_is_not_asked_for_is_none() -> None:
    s = irl.token_stats(LOGITS, LABELS)
    assert s[7:] == (None,) * 4
    assert irl.token_stats(LOGITS, LABELS, extras=["top1"], entropy=False).entropy is None


@every_backend
def test_an_id_that_is_there_twice_counts_twice(backend: str) -> None:
    leaf = LOGITS.clone().requires_grad_()
    twice = irl.token_stats(leaf, LABELS, extra_ids=IDS[..., [0, 0]], backend=backend)
    once = irl.token_stats(leaf, LABELS, extra_ids=IDS[..., [0]], backend=backend)
    (one,) = torch.autograd.grad(2 * once.extra_logprob.sum(), leaf)
    (other,) = torch.autograd.grad(twice.extra_logprob.sum(), leaf)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_float64_throughout() -> None:
    leaf = LOGITS.double().requires_grad_()
    kept = KEEP | (torch.arange(17) == LABELS[..., None])
    kept = kept.scatter(-1, IDS, torch.ones_like(IDS, dtype=torch.bool))

    def fields(q: torch.Tensor) -> Any:
        s = irl.token_stats(q, LABELS, **(ALL | dict(keep_mask=kept)))
        return s.value, s.logprob, s.entropy, s.extra_logprob, s.log_sum_sq, s.mean_logit

    assert all(x.dtype == torch.float64 for x in fields(leaf))
    assert torch.autograd.gradcheck(fields, (leaf,))


def test_under_a_compiler() -> None:
    """In one graph, with what eager code gives."""
    leaf = LOGITS.clone().requires_grad_()

    def loss(q: torch.Tensor) -> torch.Tensor:
        s = irl.token_stats(q, LABELS, **(ALL | dict(keep_mask=None)))
        return s.extra_logprob.sum() + s.log_sum_sq.sum() + s.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (one,) = torch.autograd.grad(loss(leaf), leaf)
    (other,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(temperature=0.0), ValueError, "temperature is 0.0; accepted: a number above 0"),
        (dict(temperature=-HEAT), ValueError, "temperature has the element -.*; accepted: numbers"),
        (dict(temperature=HEAT[0]), ValueError, r"temperature has shape \[4\]; accepted: \[2, 4\]"),
        (dict(temperature="1"), TypeError, "temperature is '1'; accepted: a number or a 0-d"),
        (dict(temperature=HEAT.clone().requires_grad_()), ValueError, "temperature requires a"),
        (dict(temperature=2e-38, logit_scale=1e38), ValueError, "logit_scale / temperature is"),
        (dict(extra_ids=IDS[0]), ValueError, r"extra_ids has shape \[4, 3\]; accepted: \[2, 4, 'K"),
        (dict(extra_ids=IDS.float()), TypeError, "extra_ids is torch.float32; accepted: "),
        (dict(extra_ids=IDS + 17), IndexError, r"extra_ids\[0, 0, 0\] is .*; accepted: 0 to 16"),
        (dict(extra_ids=IDS - 18), IndexError, r"extra_ids\[0, 0, 0\] is -.*ignore_index=-100"),
        (dict(keep_mask=KEEP[..., 1:]), ValueError, r"keep_mask has shape \[2, 4, 16\]; accepted"),
        (dict(keep_mask=KEEP.int()), TypeError, "keep_mask is torch.int32; accepted: torch.bool"),
        (dict(keep_above=HEAT[0]), ValueError, r"keep_above has shape \[4\]; accepted: \[2, 4\]"),
        (dict(keep_above=1.0), TypeError, "keep_above is a float; accepted: a torch.Tensor"),
        (dict(extras="top1"), TypeError, "extras is 'top1'; accepted: a sequence of log_sum_sq"),
        (dict(extras=("top2",)), ValueError, "extras has 'top2'; accepted: 'log_sum_sq', 'top1'"),
        (dict(entropy_grad=1), TypeError, "entropy_grad is 1; accepted: True or False"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        irl.token_stats(LOGITS, LABELS, **change)


@pytest.mark.parametrize("name", ["iqlearn_loss", "mle_loss"])
def test_a_temperature_is_the_inverse_of_a_scale(name: str) -> None:
    loss = partial(getattr(irl, name), LOGITS, LABELS)
    assert loss(temperature=2.0) == loss(logit_scale=0.5)
    assert loss(temperature=torch.tensor(4.0), softcap=8.0) == loss(logit_scale=0.25, softcap=2.0)
    with pytest.raises(ValueError, match=r"temperature has shape \[2, 4\]; accepted: a number"):
        loss(temperature=HEAT)
