"""The losses of irl_ops.torch.sft against plain float64 formulas and their autograd."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.torch import sft

from .. import naive_sft
from ..sft_cases import SFTCase, check, sft_cases

BACKENDS = irl.available_backends()
NAMES = sorted(naive_sft.FORMULAS)
V = 20


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=sft_cases())
@settings(max_examples=60)
def test_loss_and_gradient(backend: str, case: SFTCase) -> None:
    leaf = case.logits.clone().requires_grad_()
    loss = getattr(sft, case.name)(leaf, case.labels, **case.options, backend=backend)
    (gradient,) = torch.autograd.grad((loss * case.upstream).sum(), leaf)
    check(loss.detach(), gradient, case)


def batch(*shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(V, shape, generator=generator)
    labels[..., :1] = -100
    return scale * torch.randn(*shape, V, generator=generator), labels


def extra(name: str, labels: Tensor) -> dict[str, Any]:
    key = naive_sft.OTHER.get(name)
    return {} if key is None else {key: torch.full(labels.shape, -1.5)}


def slope(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", NAMES)
def test_of_statistics_of_a_linear_layer(name: str) -> None:
    """Statistics in the place of logits, here of logits that are never stored."""
    _, labels = batch(2, 6)
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(2, 6, 9, generator=generator, requires_grad=True)
    weight = torch.randn(V, 9, generator=generator, requires_grad=True)
    stats = irl.linear_token_stats(hidden, weight, labels, shift=True, chunk_size=4)
    given = extra(name, labels) | ({"vocab_size": V} if name == "eaft_loss" else {})
    loss = getattr(sft, name)(stats, num_items=3, **given)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    plain, _ = naive_sft.loss(name, h @ w.T, labels, shift=True, num_items=3, **extra(name, labels))
    # a dozen float32 roundings of sums of nine products, through slopes of a few units
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), plain, **close)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (h, w)), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, **close)


def test_float64_is_computed_in_float64() -> None:
    logits, labels = batch(2, 4)
    for name in NAMES:
        loss = getattr(sft, name)(logits.double(), labels, **extra(name, labels))
        plain, _ = naive_sft.loss(name, logits.double(), labels, **extra(name, labels))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-13)


def test_what_the_losses_have_in_common() -> None:
    logits, labels = batch(3, 5)
    logits.requires_grad_()
    logp = irl.token_stats(logits, labels).logprob
    mle = slope(irl.mle_loss(logits, labels), logits)
    dft = slope(sft.dft_loss(logits, labels), logits)
    old = logp.detach()
    same = {
        "q = 0 is MLE": (sft.power_loss(logits, labels, q=0), mle),
        "a gate of 1": (sft.eaft_loss(logits, labels, alpha=0), mle),
        "a ratio of 1": (sft.psft_loss(logits, labels, old_logprob=old), mle),
        "-sg(p) log p has the slope of -p": (sft.power_loss(logits, labels, q=1), dft),
        "at the anchor": (sft.asft_loss(logits, labels, reference_logprob=old, lam=9.0), dft),
    }
    for claim, (loss, gradient) in same.items():
        # each is a product of at most three numbers below 10 that are rounded to float32
        error = (slope(loss, logits) - gradient).abs().max()
        assert error <= 1e-6, claim


def test_the_gate_of_a_power_below_1() -> None:
    logits, labels = batch(3, 5, scale=0.5)  # entropies near log V
    plain, _ = naive_sft.loss("eaft_loss", logits.double(), labels, alpha=0.5)
    loss = sft.eaft_loss(logits, labels, alpha=0.5)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)


def test_a_clipped_token_has_no_gradient() -> None:
    logits, labels = batch(1, 4)
    logits.requires_grad_()
    for distance, value in ((1.0, -1.2), (200.0, -1.2)):  # the ratio overflows
        old = irl.token_stats(logits, labels).logprob.detach() - distance
        loss = sft.psft_loss(logits, labels, old_logprob=old)
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert not slope(loss, logits).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("dft_loss", 0.0), ("power_loss", 1.0), ("psft_loss", 0.0), ("eaft_loss", math.inf)],
)
def test_a_label_of_probability_0(name: str, value: float) -> None:
    logits, labels = torch.zeros(1, 1, V), torch.zeros(1, 1, dtype=torch.int64)
    logits[..., 0] = -math.inf
    logits.requires_grad_()
    loss = getattr(sft, name)(logits, labels, **extra(name, labels))
    assert loss.item() == value
    gradient = slope(loss, logits)
    assert gradient.isfinite().all() and (not gradient.any() or name == "eaft_loss")


def test_one_token_has_no_entropy() -> None:
    logits, labels = torch.randn(1, 3, 1), torch.zeros(1, 3, dtype=torch.int64)
    assert sft.eaft_loss(logits, labels).item() == 0.0


def test_readout() -> None:
    """Scaled and soft-capped logits, and a temperature, as those of all losses."""
    logits, labels = batch(2, 4)
    bent = 3.0 * torch.tanh(0.5 * logits / 3.0) / 0.8
    for name in NAMES:
        ours = getattr(sft, name)(
            logits, labels, logit_scale=0.5, softcap=3.0, temperature=0.8, **extra(name, labels)
        )
        plain, _ = naive_sft.loss(name, bent.double(), labels, **extra(name, labels))
        torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)


def test_endogenous_reward() -> None:
    logits, labels = batch(2, 5)
    labels = labels.clamp(min=0)
    reward = sft.endogenous_reward(logits, labels, gamma=0.9)
    value = F.pad(logits.double().logsumexp(-1)[:, 1:], (0, 1))
    plain = logits.double().gather(-1, labels[..., None])[..., 0] - 0.9 * value
    torch.testing.assert_close(reward.double(), plain, rtol=1e-5, atol=1e-5)
    stats = irl.token_stats(logits, labels, gamma=0.9)
    assert torch.equal(reward, sft.endogenous_reward(stats))


def test_compiled() -> None:
    logits, labels = batch(2, 4)
    compiled = torch.compile(sft.dft_loss, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    loss = compiled(leaf, labels, shift=True)
    other = logits.clone().requires_grad_()
    eager = sft.dft_loss(other, labels, shift=True)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(slope(loss, leaf), slope(eager, other))


def test_errors() -> None:
    logits, labels = batch(2, 4)
    stats = irl.token_stats(logits, labels, entropy=False)
    other = torch.zeros(2, 4)
    for wrong, message in (
        (lambda: sft.dft_loss(logits), "labels are missing"),
        (lambda: sft.dft_loss(stats, labels), "labels beside statistics"),
        (lambda: sft.dft_loss(stats, shift=True), "shift beside statistics"),
        (lambda: sft.dft_loss(logits, labels, alpha=2.0), "no option 'alpha'"),  # type: ignore[call-arg]
        (lambda: sft.eaft_loss(stats), "vocab_size is missing"),
        (lambda: sft.eaft_loss(stats, vocab_size=V), "entropy=True"),
        (lambda: sft.eaft_loss(logits, labels, vocab_size=0), "vocab_size is 0"),
        (lambda: sft.eaft_loss(logits, labels, alpha=-1.0), "alpha is -1.0"),
        (lambda: sft.power_loss(logits, labels, q=-0.5), "q is -0.5"),
        (lambda: sft.psft_loss(logits, labels, old_logprob=other[:1]), "old_logprob has shape"),
        (
            lambda: sft.asft_loss(logits, labels, reference_logprob=other.requires_grad_()),
            "reference_logprob requires a gradient",
        ),
        (lambda: sft.endogenous_reward(stats, labels), "those alone"),
        (lambda: sft.endogenous_reward(logits), "labels are missing"),
        (lambda: sft.dft_loss(logits, labels, num_items=3, reduction="sum"), "num_items"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
    with pytest.raises(IndexError, match=r"labels\[0, 0\] is 20"):
        sft.dft_loss(logits, torch.full_like(labels, V))
