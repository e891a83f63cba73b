"""Batches that each show one thing, on every backend of torch and of JAX, always."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import irl_ops.torch
from irl_ops import reference

from .cases import Case, Outcome, check
from .named_cases import CASES

every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("reduction", ["", "none"])
@pytest.mark.parametrize("backend", irl_ops.torch.available_backends())
def test_torch(backend: str, reduction: str, name: str) -> None:
    case = reduced(CASES[name], reduction)
    check(partial(getattr(irl_ops.torch, case.name), backend=backend), case)


@every_case
def test_torch_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The array algebra around the C++ row kernels, instead of the one in C++."""
    from irl_ops.torch import whole

    monkeypatch.delitem(whole.COMPILED, "native")
    case = CASES[name]
    check(partial(getattr(irl_ops.torch, case.name), backend="native"), case)


@every_case
@pytest.mark.parametrize(
    ("backend", "inplace"), [("native", False), ("native", True), ("reference", False)]
)
def test_jax(backend: str, inplace: bool, name: str) -> None:
    """``inplace`` for the gradient in the forward pass."""
    pytest.importorskip("jax", reason="needs JAX")
    import irl_ops.jax

    from .jax import jax_cases

    case = CASES[name]
    function = getattr(irl_ops.jax, case.name)
    jax_cases.check(partial(function, backend=backend, inplace=inplace), case)


@every_case
@pytest.mark.parametrize("reduction", ["", "none"])
def test_numpy(reduction: str, name: str) -> None:
    case = reduced(CASES[name], reduction)

    def run(function: Any, case: Case) -> Outcome:
        options = {key: numpy(x) for key, x in case.options.items()}
        with np.errstate(all="ignore"):
            out = function(
                numpy(case.logits), numpy(case.labels), grad_output=numpy(case.upstream), **options
            )
        loss = torch.as_tensor(out.loss).float()  # check() expects what the other functions give
        dlogits = torch.as_tensor(out.dlogits).to(case.leaf.dtype)
        return Outcome(loss, dlogits, *map(given, (out.dvalues, out.dnext_values)))

    check(getattr(reference, case.name), case, run)


def reduced(case: Case, reduction: str) -> Case:
    if not reduction:
        return case
    options = {**case.options, "reduction": reduction}
    options.pop("num_items", None)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(case.labels.shape, generator=generator)
    return Case(case.name, case.leaf, case.view, case.labels, options, upstream)


def given(x: Any) -> Tensor | None:
    return None if x is None else torch.as_tensor(x).float()


def numpy(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(numpy, x))
    if not isinstance(x, Tensor):
        return x
    return (x.double() if x.is_floating_point() else x).numpy()


# --- A confident row: p - 1, where p rounds to a neighbour of 1 ---


def confident() -> tuple[Tensor, float]:
    """Logits ``[1, 2]`` in float32, and 1 - p of the first.

    exp(q_1 - q_0) lies near a multiple k of 2^-23 with k^2 2^-47 half way between two float32
    numbers below 1: the sum 1 + exp is exact to 1e-6 of what it adds to 1, but p itself is off by
    2^-25, that is by 1e-4 of 1 - p.
    """
    k = round(2**10.5)
    low = torch.tensor([[0.0, math.log(k * 2.0**-23)]])
    p = low.double().softmax(-1)
    return low, p[0, 1].item()


def test_the_confident_row_would_show_a_p_that_is_rounded() -> None:
    low, rest = confident()
    rounded = float(np.float32(1 - rest)) - 1
    assert abs(rounded + rest) > 5e-5 * rest
    logsum = np.log(np.float32(1) + np.exp(low.numpy()[0, 1]))
    assert float(logsum) == pytest.approx(-math.log1p(-rest), rel=2e-6)


@pytest.mark.parametrize("backend", irl_ops.torch.available_backends())
def test_a_confident_row_in_torch(backend: str) -> None:
    low, rest = confident()
    leaf = low.requires_grad_()
    irl_ops.torch.mle_loss(leaf, torch.tensor([0]), backend=backend).backward()
    assert leaf.grad.tolist()[0] == pytest.approx([-rest, rest], rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_confident_row_in_jax(backend: str) -> None:
    jax = pytest.importorskip("jax", reason="needs JAX")
    import irl_ops.jax

    low, rest = confident()
    function = partial(irl_ops.jax.mle_loss, backend=backend, inplace=True)
    gradient = jax.grad(function)(low.numpy(), np.array([0]))
    assert gradient[0].tolist() == pytest.approx([-rest, rest], rel=1e-5)


# --- Vectors that do not lie row by row ---


@pytest.mark.parametrize("backend", irl_ops.torch.available_backends())
def test_row_kernels_take_transposed_vectors(backend: str) -> None:
    """Every vector of every row kernel, laid out column by column, gives the same bits."""
    from irl_ops.torch.backends import BACKENDS

    kernels = BACKENDS[backend]
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, 9, generator=generator)
    labels = torch.randint(9, (3, 4), generator=generator).long()
    a, b, c = torch.randn(3, 3, 4, generator=generator)

    def results(turn: Any) -> list[Tensor]:
        y, a_, b_, c_ = map(turn, (labels, a, b, c))
        row_max, logsum, picked, entropy = kernels.row_stats(q, y, True)
        first, second = torch.empty_like(q), torch.empty_like(q)
        kernels.row_grad(q, y, turn(row_max), turn(logsum), a_, b_, c_, first)
        stats = kernels.row_stats_grad(q, a_, b_, c_, second)
        kernels.set_label_(second, y, c_)
        alone = kernels.label_logit(q, y)
        return [row_max, logsum, picked, entropy, first, *stats, second, alone]

    def transposed(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    assert not transposed(labels).is_contiguous()
    for actual, expected in zip(results(transposed), results(lambda x: x), strict=True):
        assert torch.equal(actual, expected)
    # and against float64, for the kernels as they are
    row_max, logsum, picked, *_ = results(transposed)
    exact = q.double()
    torch.testing.assert_close(
        (row_max + logsum).double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(picked, q.gather(-1, labels[..., None])[..., 0])
