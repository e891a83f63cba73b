"""What the losses do inside autograd: once, in first order, and never silently wrong."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import irl_ops.torch as irl

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
V = 33


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(*shape, V, generator=generator).to(dtype)
    return logits.requires_grad_(), torch.randint(V, shape, generator=generator)


def summed(stats: Any) -> Tensor:
    return sum((x * x).sum() for x in stats[:5])


def losses(labels: Tensor, backend: str) -> dict[str, Callable[..., Tensor]]:
    """Scalar functions of the logits through every way that a gradient can take."""
    expert = torch.arange(len(labels)) % 2 == 0
    return {
        "mean": lambda q: irl.iqlearn_loss(q, labels, backend=backend),
        "none": lambda q: irl.iqlearn_loss(q, labels, reduction="none", backend=backend).sum(),
        "mle": lambda q: irl.mle_loss(q, labels, entropy_coef=0.1, backend=backend),
        "online": lambda q: irl.online_iqlearn_loss(q, labels, expert, backend=backend),
        "stats": lambda q: summed(irl.token_stats(q, labels, backend=backend)),
    }


WAYS = tuple(losses(torch.zeros(2, 1), "reference"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_derivatives_raise(backend: str, way: str, dtype: torch.dtype) -> None:
    logits, labels = batch(2, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"second derivatives .*create_graph"):
        torch.autograd.grad(losses(labels, backend)[way](logits), logits, create_graph=True)


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_raises(backend: str, way: str) -> None:
    logits, labels = batch(2, 4)
    function = losses(labels, backend)[way]
    for q in (logits, logits.detach()):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(RuntimeError, match="forward-mode"):
                function(dual)
        with pytest.raises(RuntimeError, match="irl_ops"):
            torch.func.jvp(function, (q.detach(),), (torch.ones_like(q),))


@pytest.mark.parametrize("way", WAYS)
def test_functional_transforms_raise(backend: str, way: str) -> None:
    logits, labels = batch(2, 4)
    function = losses(labels, backend)[way]
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(RuntimeError, match="irl_ops"):
            transform(function)(logits.detach())
    with pytest.raises(RuntimeError, match="irl_ops"):
        torch.func.vjp(function, logits.detach())


def tangents(q: Tensor, labels: Tensor, options: dict[str, Any], name: str) -> Tensor | None:
    """The tangent of the loss along the option of that name, or an error."""
    with forward_ad.dual_level():
        x = options[name]
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(
            irl.iqlearn_loss(q, labels, **{**options, name: dual})
        ).tangent


@pytest.mark.parametrize("name", ["lam", "gamma", "token_weights", "values", "next_values"])
def test_no_tangent_is_lost(backend: str, name: str) -> None:
    """Forward mode through another argument: an error or the truth, never a silent nothing."""
    logits, labels = batch(2, 4)
    options = dict(
        lam=torch.tensor(0.2),
        gamma=torch.tensor(0.9),
        token_weights=torch.ones(2, 4),
        backend=backend,
    )
    if name in ("values", "next_values"):
        options[name] = torch.ones(2, 4)
    step = 2.0**-7
    for q in (logits, logits.detach()):
        try:
            tangent = tangents(q, labels, options, name)
        except (RuntimeError, ValueError, NotImplementedError):
            continue
        with torch.no_grad():
            up, down = (
                irl.iqlearn_loss(q, labels, **{**options, name: options[name] + h})
                for h in (step, -step)
            )
        expected = (up - down) / (2 * step)
        assert tangent is not None
        torch.testing.assert_close(tangent.detach(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_pass_raises_or_is_right(backend: str, way: str) -> None:
    logits, labels = batch(2, 4)
    loss = 3 * losses(labels, backend)[way](logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(loss, logits)
    except RuntimeError as error:
        assert "second time" in str(error)
    else:
        assert torch.equal(first, second)


@pytest.mark.parametrize("way", WAYS)
def test_two_losses_of_one_tensor(backend: str, way: str) -> None:
    """Gradients that meet add up, and one does not overwrite the other."""
    logits, labels = batch(2, 4)
    function = losses(labels, backend)[way]
    (once,) = torch.autograd.grad(function(logits), logits)
    (both,) = torch.autograd.grad(function(logits) + 2 * function(logits), logits)
    torch.testing.assert_close(both, 3 * once, rtol=1e-6, atol=1e-7)
    function(logits).backward()
    function(logits).backward()  # accumulates in .grad
    torch.testing.assert_close(logits.grad, 2 * once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, way: str, reentrant: bool) -> None:
    logits, labels = batch(2, 4)
    function = losses(labels, backend)[way]
    (expected,) = torch.autograd.grad(function(2 * logits), logits)
    loss = checkpoint(lambda q: function(2 * q), logits, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(logits.grad, expected)
    logits.grad = None
    hidden = checkpoint(lambda q: 2 * q, logits, use_reentrant=reentrant)
    function(hidden).backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("name", ["lam", "gamma", "entropy_coef", "num_items", "token_weights"])
def test_arguments_without_a_gradient_refuse_one(backend: str, name: str) -> None:
    logits, labels = batch(2, 4)
    x = torch.ones(2, 4) if name == "token_weights" else torch.tensor(1.0)
    for q in (logits, logits.detach()):
        for reduction in ("mean", "none") if name != "num_items" else ("mean",):
            with pytest.raises((ValueError, RuntimeError), match=rf"{name} requires a gradient"):
                irl.iqlearn_loss(
                    q, labels, **{name: x.requires_grad_()}, reduction=reduction, backend=backend
                )


def test_alpha_and_gamma_of_the_others_refuse_a_gradient(backend: str) -> None:
    logits, labels = batch(2, 4)
    one = torch.tensor(0.5, requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match="alpha requires a gradient"):
        irl.online_iqlearn_loss(logits, labels, labels > 3, alpha=one, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="num_items requires a gradient"):
        irl.online_iqlearn_loss(logits, labels, labels > 3, num_items=(one, 1), backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="gamma requires a gradient"):
        irl.token_stats(logits, labels, gamma=one, backend=backend)


@pytest.mark.parametrize("layout", ["contiguous", "padded columns"])
def test_a_scaled_float16_gradient_does_not_underflow(backend: str, layout: str) -> None:
    """1/N = 1e-6 is below float16's normal numbers; a GradScaler's 65536 brings it back."""
    generator = torch.Generator().manual_seed(5)
    leaf = torch.randn(2, 4, V + 3, generator=generator).half().requires_grad_()
    labels = torch.randint(V, (2, 4), generator=generator)
    logits = leaf[..., :V] if layout == "padded columns" else leaf
    loss = irl.iqlearn_loss(logits, labels, num_items=1_000_000, backend=backend)
    (65536 * loss).backward()
    exact = logits.detach().float().requires_grad_()
    irl.iqlearn_loss(exact, labels, num_items=1_000_000 / 65536, backend=backend).backward()
    gradient = leaf.grad[..., : exact.shape[-1]]
    # one rounding to float16, whose subnormal numbers are 2^-24 apart
    torch.testing.assert_close(gradient.float(), exact.grad, rtol=2**-11, atol=2**-25)
    assert gradient.ne(0).float().mean() > 0.99


@pytest.mark.parametrize("way", WAYS)
def test_threads_do_not_change_a_bit(backend: str, way: str) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = 2 if backend == "triton" else 41  # its interpreter has one thread whatever torch has
    logits = torch.randn(3, rows, 1031, generator=generator).requires_grad_()
    labels = torch.randint(1031, (3, rows), generator=generator)
    function = losses(labels, backend)[way]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = function(logits)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


class Calls(TorchDispatchMode):
    """The operators that run, and the sizes and addresses of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.outputs: list[tuple[int, int]] = []  # numel, address; the tensor is not kept alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        outputs = out if isinstance(out, tuple | list) else (out,)
        for x in outputs:
            if isinstance(x, Tensor):
                self.outputs.append((x.numel(), x.untyped_storage().data_ptr()))
        return out


@pytest.mark.parametrize("way", WAYS)
def test_without_a_gradient_no_buffer_for_one(backend: str, way: str) -> None:
    logits, labels = batch(2, 4)
    function = losses(labels, backend)[way]
    strided = torch.randn(4, 2, V + 3).movedim(0, 1)[..., 1:-2]  # read as it is, never copied
    for q, enabled in ((logits, False), (logits.detach(), True), (strided, True)):
        with Calls() as calls, torch.set_grad_enabled(enabled):
            function(q)
        assert not any("grad" in name for name in calls.names if "irl_ops" in name), calls.names
        # the reference counts no passes, and Triton's interpreter copies what a kernel is given
        if backend == "native":
            assert all(numel < q.numel() for numel, _ in calls.outputs)


def test_the_gradient_is_handed_over_not_copied(backend: str) -> None:
    """One tensor of the logits' size in a step: the one that ends as .grad of the leaf."""
    if backend == "triton":
        pytest.skip("needs a GPU: Triton's interpreter copies what a kernel is given")
    if backend == "reference":
        return  # it counts no passes
    logits, labels = batch(2, 4)
    with Calls() as calls:
        irl.iqlearn_loss(logits, labels, backend=backend).backward()
    large = {address for numel, address in calls.outputs if numel == logits.numel()}
    large.discard(logits.untyped_storage().data_ptr())
    assert large == {logits.grad.untyped_storage().data_ptr()}
    strided = torch.randn(4, 2, V + 3).movedim(0, 1)[..., 1:-2].requires_grad_()
    with Calls() as calls:
        irl.iqlearn_loss(strided, labels, backend=backend)
    # their gradient alone
    assert sum(numel >= strided.numel() for numel, _ in calls.outputs) == 1, calls.names


def test_metrics_and_labels_stay_outside(backend: str) -> None:
    """No warning, nothing changed in place, no gradient in the metrics."""
    logits, labels = batch(2, 4)
    weights = torch.rand(2, 4)
    arguments = (logits, labels, weights)
    before = [(x.detach().clone(), x._version) for x in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, metrics = irl.iqlearn_loss(
            logits, labels, token_weights=weights, return_metrics=True, backend=backend
        )
        loss.backward()
    for x, (copy, version) in zip(arguments, before, strict=True):
        assert torch.equal(x, copy) and x._version == version
    assert not any(metric.requires_grad for metric in metrics.values())
