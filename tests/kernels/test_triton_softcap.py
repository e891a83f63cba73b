"""Scale and soft cap in the row kernels: Triton's, interpreted, and the reference, by autograd."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from irl_ops.kernels import reference
from irl_ops.torch import triton as backend

from .native_rows import EPS, ROUNDING
from .test_triton import FORMS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
)
CAPS = [(1.0, 30.0), (0.25, 5.0), (1.5, None)]
ROWS, VOCAB = 5, 331  # odd, so that lanes lie idle beyond every row, and rows have edges
MASKED = (0, 3, 330)  # columns of -inf: at both edges and between
LABELS = torch.tensor([7, -1, 329, 3, 331])  # good, none, good, masked, bad
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Rows(NamedTuple):
    """What the kernels have to find, in float64."""

    q: Tensor
    value: Tensor
    entropy: Tensor
    row_max: Tensor
    of_statistics: Tensor  # dx of value's a and entropy's b
    of_label: Tensor  # dq/dx at the labels


def logits(dtype: torch.dtype) -> Tensor:
    """Near 0, around the cap, and far beyond it."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, VOCAB) * torch.tensor([0.1, 1.0, 10.0, 40.0, 200.0])[:, None]
    x[:, MASKED] = -torch.inf
    return x.to(dtype)


def naive(given: Tensor, scale: float, cap: float | None, a: Tensor, b: Tensor) -> Rows:
    """p (a + b log p) is the gradient of (a - b H) V - b H with that first H held."""
    x = given.double().requires_grad_()
    q = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
    kept = [j for j in range(VOCAB) if j not in MASKED]
    log_p, value = q[:, kept].log_softmax(-1), q[:, kept].logsumexp(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = ((a - b * entropy.detach()) * value - b * entropy).sum()
    (of_statistics,) = torch.autograd.grad(total, x, retain_graph=True)
    (slope,) = torch.autograd.grad(q.sum(), x)
    slope, of_statistics = (x.detach().clone() for x in (slope, of_statistics))
    slope[:, MASKED] = of_statistics[:, MASKED] = 0.0
    q = q.detach().clone()
    q[:, MASKED] = -torch.inf
    here = LABELS.clamp(0, VOCAB - 1)[:, None]
    row_max = q.amax(-1)
    return Rows(
        q, value.detach(), entropy.detach(), row_max, of_statistics, slope.gather(1, here)[:, 0]
    )


def error_of(q: Tensor, cap: float | None) -> Tensor:
    """Of q: tanh to three units in the last place of 1, and two roundings of q itself."""
    largest = q.nan_to_num(neginf=0.0).abs().amax(-1)
    return EPS * (2 * largest if cap is None else torch.full_like(largest, 8 * cap))


def assert_gradient(
    actual: Tensor, exact: Tensor, rows: Rows, scale: float, size: Tensor, more: Any = 0.0
) -> None:
    """``size`` bounds the error of a row's elements over p, and ``more`` comes on top."""
    dtype = DTYPES[actual.dtype]
    relative, absolute = ROUNDING[dtype]
    p = (rows.q - rows.value[:, None]).exp()
    log_p = (rows.q - rows.value[:, None]).nan_to_num(neginf=0.0).abs()
    bound = scale * p * size[:, None] * (1 + log_p)
    subnormal = 2.0**-148 * (1 + scale * log_p)  # the step of such p, and of what they give
    bound = bound + more + subnormal + absolute + relative * exact.abs()
    error = (actual.double() - exact).abs()
    worst = int((error - bound).argmax())
    found = [x.flatten()[worst].item() for x in (actual, exact, error, bound, p * log_p)]
    assert (error <= bound).all(), (divmod(worst, VOCAB), found)


def launch(name: str, function: str, programs: Any, *arguments: Any, **constants: Any) -> None:
    with np.errstate(all="ignore"):
        backend._kernel(name, function)[programs](*arguments, **constants)


@pytest.mark.parametrize(("scale", "cap"), CAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_triton_against_autograd(form, dtype, scale, cap) -> None:
    x = logits(dtype)
    a, b, c = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(1))
    a[1], b[1], b[4] = 0.0, 0.0, 0.0
    sizes, strides = (VOCAB, ROWS), (0, VOCAB)
    constants = dict(SCALE=scale, SOFTCAP=cap or 0.0)
    row_max, logsum, picked, entropy = torch.full((4, ROWS), torch.nan)
    y = torch.full_like(x, 7.0)
    exact = naive(x, scale, cap, a.double(), b.double())
    wrong = error_of(exact.q, cap)
    near = 2 * wrong + EPS * (40 + 2 * exact.value.abs())

    launch(
        "row_stats", "row_stats", (ROWS,), x, LABELS, *sizes, *strides, row_max, logsum, picked,
        entropy, R=2, L=32, ENTROPY=True, EDGES=True, **constants,
    )  # fmt: skip
    assert ((row_max - exact.row_max).abs() <= wrong).all()
    assert ((row_max + logsum - exact.value).abs() <= near).all()
    assert ((entropy - exact.entropy).abs() <= 8 * near).all()
    label_logit = torch.full((ROWS,), torch.nan)
    launch(
        "labels", "label_logit", (1,), x, LABELS, ROWS, *sizes, *strides, label_logit, BLOCK=16,
        **constants,
    )  # fmt: skip
    for found in (picked, label_logit):
        good = exact.q[[0, 2], LABELS[[0, 2]]]
        assert ((found[[0, 2]] - good).abs() <= wrong[[0, 2]]).all()
        assert found[1] == 0 and found[3] == -torch.inf and found[4].isnan()

    size = (a.abs() + b.abs()) * (20 * wrong + 80 * EPS + 4 * near)
    meta = {k: v for k, v in FORMS[form](VOCAB).launch.items() if not k.startswith("num_")}
    name = "two_pass" if form == "two passes" else "resident"
    for weight in (None, b):  # alpha is what makes A the number a, with and without an entropy
        w = torch.zeros(ROWS) if weight is None else b
        wanted = naive(x, scale, cap, a.double(), w.double())
        alpha = a - w * exact.entropy.float()
        out = torch.full((3, ROWS), torch.nan)
        launch(
            name, "row_stats_grad", (ROWS,), x, alpha, 0 * a, weight, *sizes, *strides, *strides,
            out[0], out[1], None if weight is None else out[2], y, **meta,
            ENTROPY=weight is not None, EDGES=True, MATCHED=True, **constants,
        )  # fmt: skip
        assert ((out[0] + out[1] - exact.value).abs() <= near).all()
        bigger = size + EPS * 20 * exact.entropy.abs() * w.abs() + 8 * near * w.abs()
        assert_gradient(y, wanted.of_statistics, exact, scale, bigger)
        assert not y[1].any()  # nothing but zeros where the coefficients are

    y.fill_(7.0)
    launch(
        "row_grad", "row_grad", (ROWS, 6), x, LABELS, row_max, logsum, a, b, c, *sizes, *strides,
        *strides, y, BLOCK=64, EDGES=True, MATCHED=True, **constants,
    )  # fmt: skip
    wanted = exact.of_statistics.clone()
    for row in (0, 2):
        wanted[row, LABELS[row]] += c[row] * exact.of_label[row]
    slack = torch.zeros_like(wanted)
    slack[[0, 2], LABELS[[0, 2]]] = c[[0, 2]].abs().double() * scale * 40 * EPS
    wanted[3, 3] = 0.0 if cap else c[3] * scale  # the slope of -inf under a cap is 0
    assert_gradient(y, wanted, exact, scale, size, slack)

    before = y.clone()
    launch(
        "labels", "set_label", (1,), LABELS, c, ROWS, *sizes, *strides, y, BLOCK=16,
        label_logit=label_logit if cap else None, **constants,
    )  # fmt: skip
    for row in (0, 2):
        element = c[row].double() * exact.of_label[row]
        relative, absolute = ROUNDING[DTYPES[dtype]]
        bound = relative * element.abs() + 40 * EPS * scale * c[row].abs() + absolute
        assert (y[row, LABELS[row]] - element).abs() <= bound
        before[row, LABELS[row]] = y[row, LABELS[row]]
    if cap:
        before[3, 3] = 0.0
    else:
        before[3, 3] = y[3, 3]
    assert torch.equal(y, before)


@pytest.mark.parametrize(("scale", "cap"), CAPS)
def test_the_reference_against_autograd(scale, cap) -> None:
    """In float64 throughout, to a hundred of its roundings."""
    x = logits(torch.float32).double()
    a, b, c = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(1)).double()
    exact, options = naive(x, scale, cap, a, b), dict(logit_scale=scale, softcap=cap)
    near = dict(rtol=1e-11, atol=1e-12)
    row_max, logsum, picked, entropy = reference.row_stats(x, LABELS, True, **options)
    torch.testing.assert_close(row_max + logsum, exact.value, **near)
    torch.testing.assert_close(entropy, exact.entropy, **near)
    torch.testing.assert_close(picked[[0, 2]], exact.q[[0, 2], LABELS[[0, 2]]], **near)
    assert picked[1] == 0 and picked[3] == -torch.inf and picked[4].isnan()
    given = (a - b * exact.entropy, 0 * a, b)
    _, _, _, dlogits = reference.row_stats_grad(x, *given, **options)
    torch.testing.assert_close(dlogits, exact.of_statistics, **near)
    wanted = exact.of_statistics.clone()
    wanted[[0, 2], LABELS[[0, 2]]] += (c * exact.of_label)[[0, 2]]
    found = reference.row_grad(x, LABELS, row_max, logsum, a, b, c, **options)
    if cap is None:  # without a cap the slope at -inf is the scale
        wanted[3, 3] = c[3] * scale
    torch.testing.assert_close(found, wanted, **near)
    put = reference.set_label(dlogits, LABELS, c, **options, label_logit=picked)
    elements = (c * exact.of_label)[[0, 2]]
    torch.testing.assert_close(put[[0, 2], LABELS[[0, 2]]], elements, **near)
    if cap is not None:
        with pytest.raises(ValueError, match="softcap needs label_logit"):
            reference.set_label(dlogits, LABELS, c, softcap=cap)
