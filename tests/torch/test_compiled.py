"""The two operators of a compiled loss on a CPU: their numbers, and the life of the gradient."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import irl_ops.torch as irl
from irl_ops.torch import compiled, forward, pool

from .. import naive
from ..cases import Case, cases, check

V = 33


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not compiled._issued  # whatever a test did, no gradient is kept


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(shape or (2, 5, V), generator=generator).to(dtype)
    labels = torch.randint(V, logits.shape[:-1], generator=generator)
    return logits.requires_grad_(), labels


def naive_gradient(function: Callable[..., Tensor], leaf: Tensor) -> Tensor:
    """Of a loss written with ``naive.loss``."""
    leaf = leaf.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


def naive_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return naive.loss("iqlearn_loss", logits, labels, **options)[0]


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    # elements of 0 to 10, each computed in float32 from a few sums of 33 terms and rounded
    torch.testing.assert_close(actual.double(), expected, rtol=2**-19, atol=2**-19)


@given(case=cases(garbage=False))
@settings(max_examples=60)
def test_operators_have_the_numbers_of_the_naive_losses(case: Case) -> None:
    """Called as a compiler calls them, but without one: every option arrives where it belongs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "is_plain", lambda *_: False)
        patch.setattr(compiled, "serves", lambda call, logits, labels, backend: True)
        check(partial(getattr(irl, case.name), backend="native"), case)
        with torch.no_grad():
            function = partial(getattr(irl, case.name), case.logits, case.labels, **case.options)
            loss, metrics = function(return_metrics=True, backend="native")
    expected, batch = naive.loss(case.name, case.logits.double(), case.labels, **case.options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-2)  # checked above
    labelled = sum(row.label is not None for sequence in batch for row in sequence)
    assert metrics["tokens"] == labelled
    assert all(x.shape == () and not x.requires_grad for x in metrics.values())


@pytest.mark.parametrize("gradient", [False, True])
def test_schema_shapes_and_registration(gradient: bool) -> None:
    """torch.library.opcheck, on strided logits.

    Of a call with a gradient, programs cannot be compared by what they return, since a ticket is
    another integer every time. It is good for one ``claim``, which cannot be checked so at all.
    """
    logits = torch.randn(3, 2, V + 3, dtype=torch.bfloat16).movedim(0, 1)[..., 1:-2]
    logits.requires_grad_(gradient)
    labels, expert = torch.tensor([[1, -1, 3], [4, 5, V - 1]]), torch.tensor([True, False])
    values = torch.rand(2, 3, requires_grad=gradient)
    numbers = torch.tensor([1.0, 0.1, 0.2, 0.9, 5.0, 4.0], dtype=torch.float64)
    names = "mle td agent_td gamma expert_items agent_items"
    arrays = (values, None, expert, *[None] * 6)
    options = (-1, False, [0, 3], "bootstrap", False, 0.5, 3.0, "mean", 6, gradient, torch.empty(0))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += [] if gradient else ["test_aot_dispatch_dynamic"]
    torch.set_default_dtype(torch.float64)
    try:
        arguments = (logits, *arrays, labels, numbers, names, *options)
        torch.library.opcheck(compiled.loss.default, arguments, test_utils=tests)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_gradient_lies_in_memory_of_the_pool() -> None:
    """A step writes where the last one's gradient lay, and without a gradient nothing is taken."""
    before = pool.limit()
    pool.set_limit(2**24)
    pool.release()
    try:
        labels = torch.zeros(1, 32, dtype=torch.int64)
        leaf = torch.zeros(1, 32, 2**15, dtype=torch.bfloat16, requires_grad=True)
        loss = torch.compile(
            lambda q: irl.iqlearn_loss(q, labels), fullgraph=True, backend="aot_eager"
        )
        loss(leaf).backward()
        assert leaf.grad is not None
        address, idle = leaf.grad.data_ptr(), leaf.grad.nbytes
        leaf.grad = None
        assert pool.idle() == idle
        kept = loss(leaf)
        assert pool.idle() == 0  # it is written with the loss
        kept.backward()
        assert leaf.grad.data_ptr() == address
        leaf.grad = None
        kept = loss(leaf)
        del kept
        gc.collect()
        assert pool.idle() == idle  # no backward pass: it went with the loss
        with torch.no_grad():
            assert loss(leaf) > 0
        assert pool.idle() == idle
    finally:
        pool.set_limit(before)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "[T, B, V]": ((5, 2, V), lambda x: x.transpose(0, 1)),
    "expanded": ((1, 5, V), lambda x: x.expand(2, 5, V)),
    "padded": ((2, 6, V + 2), lambda x: x[:, 1:, 2:]),
    "[V, T]": ((2, V, 5), lambda x: x.mT),
}


def test_layouts() -> None:
    """Of logits, and labels that do not lie row by row."""
    _, labels = batch()
    leaves = [batch(*shape)[0] for shape, _ in LAYOUTS.values()]
    views = [view for _, view in LAYOUTS.values()]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(leaves: list[Tensor], labels: Tensor) -> Tensor:
        losses = [irl.iqlearn_loss(v(x), labels) for v, x in zip(views, leaves, strict=True)]
        return torch.stack(losses).sum()

    loss(leaves, labels.T.contiguous().T).backward()
    for view, leaf in zip(views, leaves, strict=True):
        assert leaf.grad is not None
        expected = naive_gradient(lambda x, view=view: naive_loss(view(x), labels), leaf)
        assert_gradient(leaf.grad, expected)


def test_equal_losses_have_a_gradient_each() -> None:
    """A compiler merges operators whose arguments are equal."""
    leaf, labels = batch()
    loss = torch.compile(
        lambda q: irl.iqlearn_loss(q, labels) + 3 * irl.iqlearn_loss(q, labels),
        fullgraph=True,
        backend="aot_eager",
    )
    loss(leaf).backward()
    assert leaf.grad is not None
    assert_gradient(leaf.grad, naive_gradient(lambda x: 4 * naive_loss(x, labels), leaf))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing_computes_the_loss_again(where: str) -> None:
    leaf, labels = batch()
    weight = torch.eye(V) / 2

    def head(x: Tensor) -> Tensor:
        return irl.iqlearn_loss(x @ weight, labels)

    def run(x: Tensor) -> Tensor:
        return checkpoint(head, x, use_reentrant=False)  # type: ignore[no-any-return]

    if where == "inside":
        loss = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf)
    else:
        program = torch.compile(head, fullgraph=True, backend="aot_eager")
        loss = checkpoint(program, leaf, use_reentrant=False)
    loss.backward()
    assert leaf.grad is not None
    assert_gradient(leaf.grad, naive_gradient(lambda x: naive_loss(x / 2, labels), leaf))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_each_gradient_is_handed_over_once(compiler: str) -> None:
    """To backward passes of many threads, in any order; not to a second one, and not to a copy."""
    _, labels = batch()
    program = torch.compile(
        lambda logits: irl.iqlearn_loss(2 * logits, labels), fullgraph=True, backend=compiler
    )
    leaves = [torch.randn(2, 5, V, requires_grad=True) for _ in range(4)]
    losses = [program(leaf) for leaf in leaves]
    threads = [threading.Thread(target=loss.backward, args=(None, True)) for loss in losses[::-1]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for leaf in leaves:
        assert leaf.grad is not None
        assert_gradient(leaf.grad, naive_gradient(lambda x: naive_loss(2 * x, labels), leaf))
    with pytest.raises(RuntimeError, match="backward ran a second time through the same loss"):
        losses[0].backward()
    leaf = leaves[0].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = program(leaf)
    if compiler == "eager":  # which keeps the ticket itself: a copy of it claims the same gradient
        loss.backward()
        assert leaf.grad is not None
        assert_gradient(leaf.grad, naive_gradient(lambda x: naive_loss(2 * x, labels), leaf))
        return
    with pytest.raises(RuntimeError, match="hooks on saved tensors"):
        loss.backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_no_second_derivative(compiler: str) -> None:
    leaf, labels = batch()
    program = torch.compile(
        lambda logits: irl.iqlearn_loss(2 * logits, labels), fullgraph=True, backend=compiler
    )
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(program(leaf), leaf, create_graph=True)
        torch.autograd.grad(gradient.sum(), leaf)


def test_a_copied_ticket_claims_the_same_gradient_or_nothing() -> None:
    claim = partial(
        compiled.claim, above=torch.tensor(2.0), sizes=[3], strides=[1], dtype=torch.float32
    )
    first, second = (compiled.issue(torch.ones(3)) for _ in range(2))
    copy, other = first.clone(), second.clone()
    assert claim(copy).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="second time"):
        claim(first)
    first.fill_(second.item())  # as a compiler may do with memory that it is done with
    del first
    assert claim(other).tolist() == [2.0, 2.0, 2.0]
    del second
    third = compiled.issue(torch.ones(3))
    with pytest.raises(RuntimeError, match="gradient of this compiled loss is gone"):
        claim(other)
    assert claim(third).tolist() == [2.0, 2.0, 2.0]


def test_values_alone_and_beside_logits() -> None:
    leaf, labels = batch()
    values = torch.linspace(-1, 1, 10).reshape(2, 5).bfloat16()
    program = torch.compile(
        lambda q, v: irl.iqlearn_loss(q, labels, values=v), fullgraph=True, backend="aot_eager"
    )
    for with_logits, with_values in ((False, True), (True, True)):
        q = leaf.detach().requires_grad_(with_logits)
        v = values.clone().requires_grad_(with_values)
        program(q, v).backward()
        x, y = q.detach().double().requires_grad_(), v.detach().double().requires_grad_()
        dq, dv = torch.autograd.grad(naive_loss(x, labels, values=y), (x, y))
        if with_logits:
            assert q.grad is not None
            assert_gradient(q.grad, dq)
        if with_values:
            assert v.grad is not None and v.grad.dtype == torch.bfloat16
            # rounded to the dtype of the values
            torch.testing.assert_close(v.grad.double(), dv, rtol=2**-8, atol=2**-19)
    assert not values.requires_grad


def test_under_autocast() -> None:
    _, labels = batch()
    hidden, weight = torch.randn(2, 5, 8), torch.randn(8, V, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return irl.iqlearn_loss(hidden @ weight, labels)

    loss(hidden, weight).backward()
    rounded = hidden.bfloat16().double()
    expected = naive_gradient(lambda w: naive_loss(rounded @ w, labels), weight.bfloat16())
    assert weight.grad is not None
    # logits, gradient and product are rounded to bfloat16: a few units of 2^-9 of what is summed
    bound = 2**-6 * expected.abs().max().item()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=2**-6, atol=bound)


def test_offsets_are_checked_when_the_program_runs() -> None:
    leaf, labels = batch(10, V)
    program = torch.compile(
        lambda q, offsets: irl.iqlearn_loss(q, labels, cu_seqlens=offsets),
        fullgraph=True,
        backend="aot_eager",
    )
    program(leaf, torch.tensor([0, 4, 10]))
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 12"):
        program(leaf, torch.tensor([0, 4, 12]))


def test_programs_that_keep_the_operators_of_all_backends() -> None:
    """vmap copies what an operator returns, and exported programs are for other machines."""
    leaf, labels = batch(2, 2, 3, V)
    found: set[str] = set()

    def look(program: torch.fx.GraphModule, _: Any) -> Any:
        found.update(str(node.target) for node in program.graph.nodes if "irl_" in str(node.target))
        return program.forward

    mapped = torch.compile(
        lambda q: torch.vmap(irl.iqlearn_loss)(q, labels), fullgraph=True, backend=look
    )
    expected = torch.stack([*map(naive_loss, leaf.detach().double(), labels)])
    torch.testing.assert_close(mapped(leaf).double(), expected, rtol=2**-19, atol=2**-19)
    assert found == {"irl_ops.check_labels.default", "irl_ops.row_stats.default"}

    class Model(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Any:
            return irl.iqlearn_loss(logits, labels)

    program = torch.export.export(Model(), (leaf.detach(), labels))
    assert {str(node.target) for node in program.graph.nodes if "irl_" in str(node.target)} == found
