"""The original IQ-Learn's value objective against loops over rows in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl

from .. import naive

GAMMA, ALPHA, LAM = 0.9, 0.3, 0.05
V, EOS = 7, 3
SEMI = pytest.mark.parametrize("semi_gradient", [False, True])


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Logits, labels with prompts, ends and cuts, whose demonstrations they are, and options."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 6, V, generator=generator)
    labels = torch.randint(4, V, (4, 6), generator=generator)
    labels[:, 0] = -100
    labels[0, 4], labels[0, 5] = EOS, -100
    labels[2, 5] = EOS
    labels[3, 4:] = -100
    return logits, labels, torch.tensor([True, True, False, False]), {"eos_token_id": EOS}


def reference(
    logits: Tensor,
    labels: Tensor,
    is_expert: Tensor,
    options: dict[str, Any],
    semi_gradient: bool,
    weights: Tensor | None = None,
    num_items: Any = None,
) -> Tensor:
    """-mean_E[Q - g V'] + mean_mix[V - g V'] + lam mean_mix[(Q - g V')^2], row by row."""
    rows = naive.rows_of(logits, labels, {"gamma": GAMMA, **options})
    sums = {True: naive.zero(), False: naive.zero()}
    counts = {True: 0.0, False: 0.0}
    for b, sequence in enumerate(rows):
        expert = bool(is_expert[b])
        for t, row in enumerate(sequence):
            w = 1.0 if weights is None else float(weights[b, t])
            if row.kind == naive.IGNORED:
                continue
            counts[expert] += w
            if row.kind not in (naive.TERMINAL, naive.BOOTSTRAP):
                continue
            ahead = row.next_value
            q = row.value + row.logprob
            r = q - GAMMA * (ahead.detach() if semi_gradient else ahead)
            share = 1 - ALPHA if expert else ALPHA
            term = share * (row.value - GAMMA * ahead + LAM * r * r)
            sums[expert] = sums[expert] + w * (term - r if expert else term)
    if num_items is not None:
        counts = {True: num_items[0], False: num_items[1]}
    return sum(sums[e] / counts[e] for e in sums if counts[e])  # type: ignore[return-value]


def value_loss(q: Tensor, labels: Tensor, is_expert: Tensor, options: Any, **more: Any) -> Tensor:
    stats = irl.token_stats(q, labels, gamma=GAMMA, entropy=False, **options)
    return irl.iq_value_loss(stats, is_expert, alpha=ALPHA, lam=LAM, **more)


@SEMI
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient(semi_gradient: bool, dtype: torch.dtype, weighted: bool) -> None:
    logits, labels, is_expert, options = batch()
    more: dict[str, Any] = {}
    if weighted:
        more = {"token_weights": torch.rand(4, 6), "num_items": (11.0, 5.0)}
    ours, theirs = (logits.to(x, copy=True).requires_grad_() for x in (dtype, torch.float64))
    loss = value_loss(ours, labels, is_expert, options, semi_gradient=semi_gradient, **more)
    given = {"weights": more.get("token_weights"), "num_items": more.get("num_items")}
    naively = reference(theirs, labels, is_expert, options, semi_gradient, **given)
    loss.backward()
    naively.backward()
    # sums of some 20 terms of size 10 in float32
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(loss.double(), naively, **close)
    close["atol"] = max(close["atol"], 1e-12)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **close)


@SEMI
def test_value_head_and_fused_linear(semi_gradient: bool) -> None:
    """Statistics of a value head and of hidden states serve as well."""
    logits, labels, is_expert, options = batch(1)
    weight = torch.linalg.qr(torch.randn(V, V)).Q
    hidden = (logits @ weight).requires_grad_()
    head = torch.randn(4, 6, requires_grad=True)
    stats = irl.linear_token_stats(
        hidden, weight, labels, gamma=GAMMA, entropy=False, values=head, **options
    )
    irl.iq_value_loss(
        stats, is_expert, alpha=ALPHA, lam=LAM, semi_gradient=semi_gradient
    ).backward()
    h64, v64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    reference(
        h64 @ weight.double().T, labels, is_expert, {"values": v64, **options}, semi_gradient
    ).backward()
    close = {"rtol": 1e-4, "atol": 1e-5}  # float32 products of 7 terms on top of the sums
    torch.testing.assert_close(hidden.grad.double(), h64.grad, **close)
    torch.testing.assert_close(head.grad.double(), v64.grad, **close)


def test_without_samples_and_without_labels() -> None:
    logits, labels, _, options = batch()
    everyone = torch.ones(4, dtype=torch.bool)
    q = logits.double().requires_grad_()
    loss = value_loss(q, labels, everyone, options)
    torch.testing.assert_close(loss, reference(q, labels, everyone, options, False))
    nothing = value_loss(q, torch.full_like(labels, -100), everyone, options)
    nothing.backward()
    assert nothing == 0 and not q.grad.any()


def test_bad_arguments_are_named() -> None:
    logits, labels, is_expert, options = batch()
    stats = irl.token_stats(logits, labels, **options)
    for wrong, error, name in (
        ({"alpha": 1.0}, ValueError, "alpha"),
        ({"lam": -0.1}, ValueError, "lam"),
        ({"semi_gradient": 1}, TypeError, "semi_gradient"),
        ({"num_items": 3}, TypeError, "num_items"),
    ):
        with pytest.raises(error, match=name):
            irl.iq_value_loss(stats, is_expert, **wrong)
    with pytest.raises(ValueError, match="is_expert"):
        irl.iq_value_loss(stats, is_expert[:2])


def test_jax_agrees() -> None:
    jax = pytest.importorskip("jax", reason="needs JAX")
    jnp = jax.numpy
    from irl_ops import jax as irl_jax

    logits, labels, is_expert, options = batch()
    for semi_gradient in (False, True):

        def loss(x: Any, semi: bool = semi_gradient) -> Any:
            stats = irl_jax.token_stats(
                x, jnp.asarray(labels.numpy()), gamma=GAMMA, entropy=False, **options
            )
            flags = jnp.asarray(is_expert.numpy())
            return irl_jax.iq_value_loss(stats, flags, alpha=ALPHA, lam=LAM, semi_gradient=semi)

        found, gradient = jax.value_and_grad(loss)(jnp.asarray(logits.numpy()))
        q = logits.double().requires_grad_()
        naively = reference(q, labels, is_expert, options, semi_gradient)
        naively.backward()
        # as above
        assert float(found) == pytest.approx(naively.item(), rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(jax.device_get(gradient)).double(), q.grad, rtol=1e-5, atol=1e-5
        )
