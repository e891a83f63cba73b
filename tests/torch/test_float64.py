"""float64 logits: served by the reference alone, in float64 throughout; open to gradcheck."""

from typing import Any

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl

V = 5
LABELS = torch.tensor([[1, 4, -100, 2], [0, 0, 3, 1]])
EXPERT = torch.tensor([True, False])


def rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


OPTIONS: list[dict[str, Any]] = [
    {},
    dict(lam=0.7, gamma=0.9, entropy_coef=0.2, z_loss=0.1, boundary="bootstrap"),
    dict(reduction="none", shift=True, eos_token_id=3),
    dict(reduction="sum", token_weights=torch.rand(2, 4), detach_next=False),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_values", [False, True])
def test_gradcheck_of_losses(options: dict[str, Any], with_values: bool) -> None:
    heads = (rows(2, 4), rows(2, 4).detach().requires_grad_()) if with_values else ()
    names = ("values", "next_values")[: len(heads)]
    mle = {k: v for k, v in options.items() if k not in ("lam", "gamma", "detach_next")}

    def iqlearn(q: Tensor, *given: Tensor) -> Any:
        return irl.iqlearn_loss(q, LABELS, **options, **dict(zip(names, given, strict=True)))

    def online(q: Tensor, *given: Tensor) -> Any:
        named = dict(zip(names, given, strict=True))
        return irl.online_iqlearn_loss(q, LABELS, EXPERT, **options, **named)

    assert torch.autograd.gradcheck(iqlearn, (rows(2, 4, V), *heads))
    assert torch.autograd.gradcheck(online, (rows(2, 4, V), *heads))
    if not heads:
        assert torch.autograd.gradcheck(lambda q: irl.mle_loss(q, LABELS, **mle), (rows(2, 4, V),))


@pytest.mark.parametrize("options", [{}, dict(gamma=0.5, shift=True), dict(eos_token_id=3)])
def test_gradcheck_of_token_stats(options: dict[str, Any]) -> None:
    def stats(q: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        plain = irl.token_stats(q, LABELS, **options)
        with_head = irl.token_stats(q, LABELS, values=values, **options)
        return *plain[:5], *with_head[:5]

    assert torch.autograd.gradcheck(stats, (rows(2, 4, V), rows(2, 4)))


def test_float64_throughout() -> None:
    logits = rows(2, 4, V)
    loss, metrics = irl.iqlearn_loss(logits, LABELS, return_metrics=True)
    loss.backward()
    assert loss.dtype == logits.grad.dtype == torch.float64
    assert {x.dtype for x in metrics.values()} == {torch.float64}
    stats = irl.token_stats(logits, LABELS)
    assert stats.value.dtype == stats.reward.dtype == torch.float64


@pytest.mark.parametrize("backend", [b for b in irl.available_backends() if b != "reference"])
def test_other_backends_refuse_it_by_name(backend: str) -> None:
    for function in (irl.iqlearn_loss, irl.token_stats):
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve torch.float64 logits"):
            function(rows(2, 4, V), LABELS, backend=backend)
