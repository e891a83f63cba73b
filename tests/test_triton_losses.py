"""The scalar algebra in Triton: rows whose neighbours lie in another program's block."""

import pytest
import torch
from hypothesis import given, settings

import irl_ops.torch as irl
from irl_ops import algebra
from irl_ops.torch import triton_loss
from irl_ops.torch.call import Call

from .cases import Case, cases, check

pytest.importorskip("triton", reason="needs Triton, which is published for Linux alone")


@pytest.mark.parametrize("block", [1, 2])
def test_across_blocks(block, monkeypatch):
    monkeypatch.setattr(triton_loss, "BLOCK", block)

    @settings(max_examples=12)
    @given(cases())
    def property_of(case: Case) -> None:
        check(lambda *given, **opt: getattr(irl, case.name)(*given, **opt, backend="triton"), case)

    property_of()


def test_sums_over_many_blocks(monkeypatch):
    """More than the 1024 that are added up at once."""
    monkeypatch.setattr(triton_loss, "BLOCK", 1)
    logits = torch.randn(1030, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, packing = torch.arange(1030) % 3, dict(segment_ids=torch.arange(1030) // 7)
    values = [
        irl.iqlearn_loss(logits, labels, backend=backend, **packing).item()
        for backend in ("triton", "native")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)  # summed in other orders


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
