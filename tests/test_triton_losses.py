"""The scalar algebra in Triton: rows whose neighbours lie in another program's block."""

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import irl_ops.torch as irl
from irl_ops import algebra, reference
from irl_ops.torch import triton, triton_loss
from irl_ops.torch.call import Call

from .cases import EPS, Case, cases, check, sequences

pytest.importorskip("triton", reason="needs Triton, which is published for Linux alone")


@pytest.mark.parametrize("block", [1, 2])
def test_across_blocks(block, monkeypatch):
    monkeypatch.setattr(triton_loss, "BLOCK", block)

    @settings(max_examples=12)
    @given(cases())
    def property_of(case: Case) -> None:
        check(lambda *given, **opt: getattr(irl, case.name)(*given, **opt, backend="triton"), case)

    property_of()


def numpy(x: Any) -> Any:
    """An option as the float64 reference takes it."""
    if isinstance(x, tuple):
        return tuple(map(numpy, x))
    if not isinstance(x, Tensor):
        return x
    return (x.double() if x.is_floating_point() else x).numpy()


@settings(max_examples=100)
@given(st.sampled_from([(), (3,)]).flatmap(lambda lead: sequences(5, lead, 9)))
def test_kinds_and_weights_are_those_of_the_algebra(sequence: tuple[Tensor, dict]) -> None:
    """Segments and batch rows end within blocks and between them."""
    labels, options = sequence
    token_weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    launcher, seen = triton_loss._launcher, []

    def watched(device: torch.device, programs: int) -> Any:
        launch = launcher(device, programs)

        def run(name: str, *arguments: Any, **constants: Any) -> None:
            launch(name, *arguments, **constants)
            if name == "rows":
                seen.extend(arguments[11:14])

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_loss, "_launcher", watched)
        patch.setattr(triton_loss, "BLOCK", 4)
        logits = torch.zeros(*labels.shape, 5, requires_grad=True)
        weighted = dict(token_weights=token_weights, reduction="sum")
        irl.iqlearn_loss(logits, labels, **options, **weighted, backend="triton")

    rows = algebra.rows_of(xp, labels.numpy(), 5, **{k: numpy(x) for k, x in options.items()})
    loss = algebra.mle_objective(xp, rows.kind, token_weights.numpy(), reduction="sum")
    for actual, expected in zip(seen, (*rows, loss.mle), strict=True):
        assert np.array_equal(actual.numpy(), expected)


@settings(max_examples=30)
@given(case=cases(garbage=False))
def test_the_row_kernel_is_given_what_the_algebra_gives(case: Case) -> None:
    """alpha, beta and the weights of the entropy; -inf, which saves a read, in the same rows.

    A row that is read although nobody needs it changes no result, so no other test would see it.
    """
    # the others take row_stats and row_grad
    assume(case.options["reduction"] != "none" and case.leaf.dtype != torch.float16)
    seen = []

    def watch(kernels: Any) -> None:
        run = kernels.row_stats_grad

        def row_stats_grad(logits: Any, *given: Any) -> Any:
            seen.append([None if x is None else np.asarray(x) for x in given[:3]])
            return run(logits, *given)

        patch.setattr(kernels, "row_stats_grad", row_stats_grad)

    with pytest.MonkeyPatch.context() as patch:
        watch(triton)
        watch(reference.kernels)
        patch.setattr(triton_loss, "BLOCK", 2)
        leaf = case.leaf.clone().requires_grad_()
        getattr(irl, case.name)(case.view(leaf), case.labels, **case.options, backend="triton")
        options = {name: numpy(x) for name, x in case.options.items()}
        getattr(reference, case.name)(numpy(case.logits), numpy(case.labels), **options)

    (alpha, beta, weight), (alpha_64, beta_64, weight_64) = seen
    unread = alpha_64 == -np.inf
    assert np.array_equal(alpha == -np.inf, unread)
    assert np.array_equal(beta == 0, beta_64 == 0)
    heads = (options.get(name) for name in ("values", "next_values"))
    arrays = [numpy(case.logits), *(x for x in heads if x is not None)]
    largest = sum(np.abs(x[np.isfinite(x)]).max() for x in arrays)
    # alpha is a sum of terms of the size of m and of beta times what its row's neighbours hold
    size = np.abs(alpha_64[~unread]).max(initial=0) + 2 * beta_64.max() * largest
    assert (np.abs(alpha[~unread] - alpha_64[~unread]) <= EPS * size).all()
    assert np.allclose(beta, beta_64, rtol=EPS, atol=0)
    assert (weight is None) == (weight_64 is None)
    assert weight is None or np.allclose(weight, weight_64, rtol=EPS, atol=0)


@pytest.mark.parametrize("blocks", [1, 1024, 3000])
def test_sums_over_many_blocks(blocks):
    """More than the 1024 that are added up at once."""
    partial = torch.rand(8, blocks, generator=torch.Generator().manual_seed(0))
    partial[6:] *= 3
    out = torch.empty(7)
    triton_loss._launcher(out.device, 1)("totals", partial, blocks, out)
    loss, *means, tokens, with_td = partial.double().sum(1).tolist()
    means = [x / (tokens if k < 3 else with_td) for k, x in enumerate(means)]
    # NumPy adds a block up in pairs: a rounding for each of its ten levels, and for each block
    assert out.tolist() == pytest.approx([loss, *means, tokens], rel=16 * 2.0**-24)


def test_another_objective_is_left_to_the_algebra():
    def td_alone(xp, kind, token_weights, **rest):
        loss = algebra.iqlearn_objective(xp, kind, token_weights, **rest)
        return loss._replace(mle=xp.zeros_like(loss.mle))

    call = Call(
        td_alone, torch.zeros(2, dtype=torch.long), {}, {}, 0.0, None, None, "mean", False, None,
        None, False,
    )  # fmt: skip
    logits = torch.zeros(2, 3)
    assert triton_loss.loss_and_grad(call, logits, torch.empty_like(logits)) is None
