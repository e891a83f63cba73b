"""What must hold between results, whatever the logits are."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irl_ops.torch as irl

from ..plain_batch import ULP, V, batch, run

BACKENDS = irl.available_backends()
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_lam_it_is_cross_entropy(backend: str, reduction: str) -> None:
    logits, labels = batch(4, 7)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.view(-1, V), labels.view(-1), reduction=reduction)
    upstream = torch.randn(28, dtype=torch.float64) if reduction == "none" else torch.tensor(1.0)
    (expected * upstream).sum().backward()
    for function, options in ((irl.iqlearn_loss, dict(lam=0)), (irl.mle_loss, {})):
        logits.grad = None
        loss = function(logits, labels, reduction=reduction, backend=backend, **options)
        (loss.view(-1) * upstream).sum().backward()
        # log-likelihoods of a few units
        torch.testing.assert_close(
            loss.double().view(-1), expected.detach().view(-1), rtol=8 * ULP, atol=8 * ULP
        )
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=8 * ULP, atol=4 * ULP)


def test_rewards_telescope(backend: str) -> None:
    """At gamma = 1: sum of rewards = log pi(episode) + V(first row)."""
    logits, _ = batch(3, 9)
    labels = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(3))
    lengths = [9, 4, 1]
    for b, n in enumerate(lengths):
        labels[b, n:] = -100
    stats = irl.token_stats(logits, labels, gamma=1.0, backend=backend)
    expected = stats.logprob.sum(-1) + stats.value[:, 0]
    torch.testing.assert_close(stats.reward.sum(-1), expected, rtol=0, atol=9 * 16 * ULP)


def test_a_constant_cancels_at_gamma_one(backend: str) -> None:
    """In rows that bootstrap; not in terminal ones, and not below gamma = 1."""
    logits, labels = batch(3, 9)
    logits = logits.detach().mul(64).round().div(64).requires_grad_()  # + 64 is exact
    raised = (logits.detach() + 64).requires_grad_()
    options = dict(boundary="drop", lam=0.5, gamma=1.0, backend=backend)
    loss, gradient = run(logits, labels, **options)
    other, other_gradient = run(raised, labels, **options)
    # the rounding of numbers of 64, in rewards of a few units that are squared
    torch.testing.assert_close(loss, other, rtol=0, atol=64 * 8 * ULP)
    torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=64 * 4 * ULP)
    for change in (dict(boundary="terminal"), dict(gamma=0.9)):
        loss, _ = run(logits, labels, **{**options, **change})
        other, _ = run(raised, labels, **{**options, **change})
        assert abs(loss - other) > 1
    first, second = (irl.token_stats(x, labels, backend=backend) for x in (logits, raised))
    moved = second.reward - first.reward
    terminal = 64.0 * (first.kind == 1)
    torch.testing.assert_close(moved, terminal, rtol=0, atol=64 * 2 * ULP)
    torch.testing.assert_close(first.logprob, second.logprob, rtol=0, atol=8 * ULP)
    torch.testing.assert_close(first.entropy, second.entropy, rtol=0, atol=8 * ULP)


def test_bounds(backend: str) -> None:
    """logprob <= 0 and 0 <= entropy <= log V, in confident, flat and single-column rows."""
    logits, labels = batch(4, 6)
    sharp = torch.full((4, V), -1e4).index_fill(1, torch.tensor([3]), 1e4)
    for q, a in (
        (logits, labels),
        (1e3 * logits, labels),
        (torch.full((5, V), 1e4), torch.arange(5)),
        (sharp, torch.tensor([3, 4, 3, -100])),
        (torch.randn(6, 1), torch.zeros(6, dtype=torch.int64)),
    ):
        stats = irl.token_stats(q.detach(), a, backend=backend)
        vocab = q.shape[-1]
        assert (stats.logprob <= 0).all()
        assert (stats.entropy >= -4 * ULP).all()
        assert (stats.entropy <= math.log(vocab) + 4 * ULP * (1 + math.log(vocab))).all()
    assert stats.logprob.eq(0).all() and stats.entropy.eq(0).all()  # one column is certain


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_labels_no_loss(backend: str, reduction: str) -> None:
    logits, labels = batch(2, 5)
    for garbage in (1.0, math.nan, math.inf, -math.inf):
        q = (logits.detach() * garbage).requires_grad_()
        loss, gradient = run(q, labels.fill_(-100), reduction=reduction, backend=backend)
        assert loss.eq(0).all() and gradient.eq(0).all()
        result = irl.iqlearn_loss(
            q, labels, reduction=reduction, return_metrics=True, backend=backend
        )
        assert all(metric == 0 for metric in result[1].values())


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_no_items_no_loss(backend: str, num_items: Any) -> None:
    logits, labels = batch(2, 5)
    loss, gradient = run(logits, labels, num_items=num_items, backend=backend)
    assert loss == 0 and gradient.eq(0).all()
    loss, gradient = run(
        logits, labels, token_weights=torch.zeros(2, 5), num_items=None, backend=backend
    )
    assert loss == 0 and gradient.eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_in_the_gradient_from_above(backend: str, reduction: str) -> None:
    logits, labels = batch(2, 5)
    options = dict(reduction=reduction, backend=backend)
    _, once = run(logits, labels, **options)
    for factor in (0.25, -2.0, 0.0):  # powers of two are exact
        _, gradient = run(logits, labels, factor, **options)
        assert torch.equal(gradient, factor * once)
    _, gradient = run(logits, labels, math.nan, **options)
    assert gradient[labels != -100].isnan().all()


def test_halves_make_a_whole(backend: str) -> None:
    """Gradient accumulation: each half is told the number of items of both."""
    logits, labels = batch(4, 7)
    weights = torch.rand(4, 7, generator=torch.Generator().manual_seed(4))
    options = dict(backend=backend, entropy_coef=0.1)
    loss, gradient = run(logits, labels, token_weights=weights, **options)
    items = (weights * (labels != -100)).sum()
    for n in (items, items.item(), items.double()):
        halves = [
            run(
                logits.detach()[half].requires_grad_(),
                labels[half],
                token_weights=weights[half],
                num_items=n,
                **options,
            )
            for half in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(loss, halves[0][0] + halves[1][0], rtol=8 * ULP, atol=0)
        torch.testing.assert_close(
            gradient, torch.cat([halves[0][1], halves[1][1]]), rtol=8 * ULP, atol=1e-9
        )


def test_rows_sum_to_the_sum(backend: str) -> None:
    logits, labels = batch(3, 6)
    options = dict(backend=backend, entropy_coef=0.2)
    rows, rows_gradient = run(logits, labels, reduction="none", **options)
    loss, gradient = run(logits, labels, reduction="sum", **options)
    assert rows.shape == labels.shape and rows[labels == -100].eq(0).all()
    torch.testing.assert_close(rows.sum(), loss, rtol=8 * ULP, atol=0)
    # two ways to the same sums: A is alpha + beta V in one and sums of products in the other
    torch.testing.assert_close(gradient, rows_gradient, rtol=16 * ULP, atol=16 * ULP)


def test_an_ignored_row_gets_a_gradient_from_its_neighbour(backend: str) -> None:
    logits, _ = batch(3)
    labels = torch.tensor([4, 5, -100])
    for options in (
        dict(boundary="bootstrap"),
        dict(truncated=torch.tensor(True)),
        dict(eos_token_id=7),
        dict(boundary="bootstrap", reduction="none"),
    ):
        _, gradient = run(logits, labels, backend=backend, **options)
        assert gradient[2].abs().min() > 0
        _, gradient = run(logits, labels, backend=backend, detach_next=True, **options)
        assert gradient[2].eq(0).all()
    _, gradient = run(logits, labels, backend=backend)
    assert gradient[2].eq(0).all()


def test_next_values_and_values(backend: str) -> None:
    logits, _ = batch(3)
    labels = torch.tensor([4, 5, 6])
    given = torch.tensor([2.0, 3.0, 50.0], requires_grad=True)
    stats = irl.token_stats(logits, labels, gamma=0.9, next_values=given, backend=backend)
    assert stats.next_value.tolist() == [2.0, 3.0, 0.0]  # the last row is terminal
    _, gradient = run(logits, labels, reduction="sum", next_values=given, backend=backend)
    u = 2 * 0.3 * stats.reward.detach()
    expected = torch.stack([-0.9 * u[0], -0.9 * u[1], torch.tensor(0.0)])
    # the residual is a difference of numbers up to 3, which token_stats rounds to float32
    torch.testing.assert_close(given.grad, expected, rtol=4 * ULP, atol=12 * ULP)
    # nothing of V' reaches the logits: each row's gradient sums to u_t
    torch.testing.assert_close(gradient.sum(-1), u, rtol=0, atol=32 * ULP)

    stats = irl.token_stats(logits, labels, gamma=0.9, values=given, backend=backend)
    assert stats.value.tolist() == [2.0, 3.0, 50.0]
    assert stats.next_value.tolist() == [3.0, 50.0, 0.0]
    q = torch.tensor([2.0, 3.0, 50.0]) + stats.logprob.detach()
    expected = q - 0.9 * stats.next_value.detach()
    torch.testing.assert_close(stats.reward.detach(), expected, rtol=4 * ULP, atol=0)
    frozen = logits.detach()
    given.grad = None
    irl.iqlearn_loss(frozen, labels, lam=0.3, gamma=0.9, values=given, backend=backend).backward()
    assert given.grad.abs().min() > 0  # a value head on frozen logits


def test_online_groups(backend: str) -> None:
    logits, labels = batch(4, 6)
    labels[1] = -100
    everyone, nobody = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)

    def online(is_expert: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        logits.grad = None
        loss = irl.online_iqlearn_loss(logits, labels, is_expert, backend=backend, **options)
        loss.backward()
        return loss.detach(), logits.grad

    loss, gradient = online(everyone, alpha=0.2, lam=0.4)
    expected, expected_gradient = run(logits, labels, lam=0.5, gamma=1.0, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=4 * ULP, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=8 * ULP, atol=ULP)
    loss, gradient = online(nobody, lam=0.0)  # agents are regularised, never imitated
    assert loss == 0 and gradient.eq(0).all()
    loss, gradient = online(nobody, alpha=0.0)
    assert loss == 0 and gradient.eq(0).all()
    loss, gradient = online(nobody, alpha=0.2, lam=0.4)
    regulariser = irl.token_stats(logits, labels, backend=backend).reward.pow(2).sum()
    expected = 0.4 * 0.2 / 0.64 * regulariser / (labels != -100).sum()
    torch.testing.assert_close(loss, expected.detach(), rtol=8 * ULP, atol=0)
    by_row = torch.zeros(4, 6, dtype=torch.bool)
    by_row[0] = True
    mixed, _ = online(torch.tensor([True, False, False, False]))
    assert mixed == online(by_row)[0]
    empty, _ = online(torch.tensor([False, True, False, False]))  # its only expert is unlabelled
    assert empty == online(nobody)[0]
    pair = ((by_row & (labels != -100)).sum(), (~by_row & (labels != -100)).sum().item())
    assert mixed == pytest.approx(online(by_row, num_items=pair)[0].item(), rel=8 * ULP)
    assert online(by_row, num_items=(0, 0))[0] == 0
