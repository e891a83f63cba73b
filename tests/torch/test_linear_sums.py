"""In what the chunks' parts of the weight's gradient are added up, and to what."""

from typing import Any

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl

from .. import naive

D, V = 6, 30
MLE, IQLEARN = "mle_loss", "iqlearn_loss"


def batch(
    rows: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [1, rows, width], weight, labels; logits of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    labels = torch.randint(vocab, (1, rows), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def exact_gradient(name: str, hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    leaf = weight.detach().double().requires_grad_()
    naive.loss(name, hidden.detach().double() @ leaf.mT, *rest, **options)[0].sum().backward()
    return leaf.grad


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", [MLE, IQLEARN])
def test_errors_of_sums_in_bfloat16(name: str) -> None:
    """The table in docs/linear.md. r, the root mean square of one rounding, is 2^-7 / sqrt(12) at
    most (8 bits); the roundings of logits and of their gradient, averaged over rows, count as one.
    """
    hidden, weight, labels = batch(1024, 64, 512, torch.bfloat16)
    exact = exact_gradient(name, hidden, weight, labels)
    function, r = getattr(irl, f"linear_{name}"), 2**-7 / 12**0.5

    def error(accumulate: Any, chunks: int) -> float:
        leaf = weight.clone().requires_grad_()
        options = dict(chunk_size=1024 // chunks, accumulate=accumulate)
        function(hidden, leaf, labels, **options).backward()
        if isinstance(accumulate, Tensor):
            assert leaf.grad is None
            return relative(accumulate, exact)
        assert leaf.grad.dtype == torch.bfloat16
        return relative(leaf.grad, exact)

    for chunks in (1, 8, 32):
        # After j of k chunks of independent rows the sum has sqrt(j / k) of its last size, and is
        # rounded: (k + 1) / 2 squares of r.
        assert error("weight", chunks) < r * (1 + (chunks + 1) / 2) ** 0.5
        # The chunks' products are rounded, which is one r in all, and in "float32" their sum.
        assert error("float32", chunks) < r * 3**0.5
        assert error(torch.zeros(512, 64), chunks) < r * 2**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_given_sum(dtype: torch.dtype, reduction: str) -> None:
    """Two micro-batches add to what is there, each times its factor; weight.grad gets nothing."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batches = [batch(9, D, V, dtype, seed) for seed in (1, 2)]
    weight = batches[0][1].requires_grad_()
    total, bias = torch.ones(V, D, dtype=wide), torch.zeros(V, dtype=dtype, requires_grad=True)
    exact = torch.ones(V, D, dtype=torch.float64)
    for factor, (hidden, _, labels) in zip((3.0, 0.5), batches, strict=True):
        hidden.requires_grad_()
        options = dict(gamma=0.9, reduction=reduction)
        more = dict(bias=bias, chunk_size=4, accumulate=total)
        loss = irl.linear_iqlearn_loss(hidden, weight, labels, **more, **options)
        (factor * loss.sum()).backward()
        assert hidden.grad.count_nonzero() and bias.grad.count_nonzero()
        exact += factor * exact_gradient(IQLEARN, hidden, weight, labels, **options)
    assert weight.grad is None
    # logits, their gradient and a product are rounded: at most three times half of eps
    # each; in the wide dtypes sums of 30 numbers are as well
    assert relative(total, exact) < (16 if dtype == wide else 1.5) * torch.finfo(dtype).eps


def test_a_given_sum_and_statistics() -> None:
    hidden, weight, labels = batch(9, D, V, torch.float32)
    total = torch.zeros(V, D)
    weight.requires_grad_()
    stats = irl.linear_token_stats(hidden, weight, labels, chunk_size=4, accumulate=total)
    stats.logprob.sum().backward()
    exact = exact_gradient(MLE, hidden, weight, labels, reduction="sum")
    assert weight.grad is None and relative(-total, exact) < 1e-5  # float32 sums


def test_a_given_sum_under_autocast_and_without_gradients() -> None:
    hidden, weight, labels = batch(9, D, V, torch.float32)
    total = torch.zeros(V, D)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            irl.linear_mle_loss(hidden, weight, labels, accumulate=total)
        assert not total.any()
        irl.linear_mle_loss(hidden, weight, labels, accumulate=total).backward()
    # weight and hidden are rounded too, which makes five roundings of 2^-9 at most
    assert weight.grad is None
    assert relative(total, exact_gradient(MLE, hidden, weight, labels)) < 5 * 2**-9


def test_a_given_sum_in_one_graph() -> None:
    """The backward graph writes to an input of the forward one."""
    hidden, weight, labels = batch(9, D, V, torch.float32)
    total = torch.zeros(V, D)
    weight.requires_grad_()

    def loss(weight: Tensor, total: Tensor) -> Tensor:
        return irl.linear_iqlearn_loss(hidden, weight, labels, chunk_size=4, accumulate=total)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(weight, total).backward()
    assert weight.grad is None
    assert relative(total / 2, exact_gradient(IQLEARN, hidden, weight, labels)) < 1e-5


WEIGHT = torch.zeros(V, D, requires_grad=True)


@pytest.mark.parametrize(
    ("weight", "total", "error", "message"),
    [
        (WEIGHT, torch.zeros(V, D).bfloat16(), TypeError, r"is torch.bfloat16; accepted: torch\.f"),
        (WEIGHT, torch.zeros(D, V), ValueError, r"has shape \[6, 30\]; accepted: \[30, 6\]"),
        (WEIGHT, torch.zeros(D, V).mT, ValueError, r"has strides \[1, 30\]; accepted: a contig"),
        (WEIGHT, torch.zeros(V, D, device="meta"), ValueError, "is on meta; accepted: cpu"),
        (WEIGHT, torch.zeros_like(WEIGHT, requires_grad=True), ValueError, "requires a gradient"),
        (WEIGHT.detach(), torch.zeros(V, D), ValueError, "is a tensor and weight requires no grad"),
        (WEIGHT, 1.0, ValueError, r"is 1\.0; accepted: 'float32', 'weight', a tensor, None"),
    ],
)
def test_a_sum_that_does_not_fit(weight: Any, total: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^accumulate {message}"):
        irl.linear_mle_loss(torch.zeros(5, D), weight, torch.zeros(5).long(), accumulate=total)


def test_gradient_scaler() -> None:
    """float16 under a GradScaler: the step of float64, though 1/N underflows without the scale."""
    hidden, weight, labels = batch(9, D, V, torch.float16)
    items, layer = 2.0**22, torch.nn.Linear(D, D, bias=False)
    states = hidden.float()
    head = weight.float().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([layer.weight, head], lr=2.0**22)
    before = [layer.weight.detach().clone(), head.detach().clone()]
    exact = [x.double().requires_grad_() for x in before]
    q = (states.double() @ exact[0].mT) @ exact[1].mT
    naive.loss(IQLEARN, q, labels, num_items=items)[0].backward()
    with torch.autocast("cpu", torch.float16):
        loss = irl.linear_iqlearn_loss(layer(states), head, labels, chunk_size=4, num_items=items)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for start, now, leaf in zip(before, (layer.weight, head), exact, strict=True):
        step = (start - now.detach()) / 2.0**22
        assert relative(step, leaf.grad) < 2**-7  # a few roundings of 2^-11
