"""token_stats with all that it can be asked for, in JAX, against the naive statistics."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irl_ops.jax as irl

from .. import naive
from ..cases import Case
from ..measure_cases import Found, check, measure_cases
from .jax_cases import array, tensor

GENERATOR = np.random.default_rng(0)
LOGITS = np.float32(3 * GENERATOR.standard_normal((2, 4, 17)))
LABELS = np.int32(GENERATOR.integers(0, 17, (2, 4)))
IDS = np.int32(GENERATOR.integers(0, 17, (2, 4, 3)))
HEAT = np.float32(GENERATOR.uniform(0.5, 2.0, (2, 4)))
KEEP = (GENERATOR.random((2, 4, 17)) < 0.7) | (np.arange(17) == LABELS[..., None])
EXTRAS = ("log_sum_sq", "top1", "mean_logit")
ALL: dict[str, Any] = dict(temperature=HEAT, extra_ids=IDS, keep_mask=KEEP, extras=EXTRAS)


def run(function: Any, case: Case) -> Found:
    """The statistics and the gradient of the sum of upstream times field."""
    options = {name: array(x) for name, x in case.options.items()}
    heads = {n: options.pop(n) for n in ("values", "next_values") if n in options}
    upstream = {name: array(x) for name, x in case.upstream.items()}
    logits, labels = array(case.logits), array(case.labels)

    def total(logits: Any, heads: Any) -> Any:
        stats = function(logits, labels, **options, **heads)
        return sum((jnp.asarray(g) * getattr(stats, n)).sum() for n, g in upstream.items()), stats

    (dlogits, dheads), stats = jax.grad(total, (0, 1), has_aux=True)(jnp.asarray(logits), heads)
    found = {n: None if x is None else tensor(x) for n, x in stats._asdict().items()}
    back = (tensor(dheads[n]) if n in heads else None for n in ("values", "next_values"))
    return Found(found, tensor(dlogits), *back)


@given(case=measure_cases(), backend=st.sampled_from(["native", "native", "reference"]))
@settings(max_examples=8)  # each is compiled; what the kernels compute is tested by the contract
def test_everything(case: Case, backend: str) -> None:
    check(partial(irl.token_stats, backend=backend), case, run)


def test_a_layer_gives_what_its_logits_give() -> None:
    hidden = np.float32(GENERATOR.standard_normal((2, 4, 6)))
    weight = np.float32(GENERATOR.standard_normal((17, 6)))

    def total(stats: Any) -> Any:
        extra = jnp.where(stats.extra_logprob > -jnp.inf, stats.extra_logprob, 0.0)
        fields = (stats.logprob, stats.entropy, stats.log_sum_sq, stats.mean_logit, extra)
        return sum((x * (1 + jnp.cos(x))).sum() for x in fields), stats

    @jax.jit
    def both(hidden: Any, weight: Any) -> Any:
        chunked = partial(irl.linear_token_stats, labels=LABELS, chunk_size=3, **ALL)
        whole = lambda h, w: irl.token_stats(h @ w.T, LABELS, **ALL)  # noqa: E731
        return [
            jax.grad(lambda h, w, f=f: total(f(h, w)), (0, 1), has_aux=True)(hidden, weight)
            for f in (chunked, whole)
        ]

    for one, other in zip(*map(jax.tree.leaves, both(hidden, weight)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["native", "pallas", "reference"])
def test_batched_beside_what_is_the_same_for_all(backend: str) -> None:
    """Against the naive statistics and their autograd; with more ids than there are columns."""
    names = ("logprob", "entropy", "log_sum_sq", "mean_logit", "extra_logprob")

    def total(q: Any, y: Any, ids: Any) -> Any:
        options = dict(extra_ids=ids, temperature=HEAT[0], extras=EXTRAS)
        stats = irl.token_stats(q, y, backend=backend, **options)
        return sum(getattr(stats, n).sum() for n in names), stats

    ids = np.tile(IDS, 6)  # each of them six times, whose gradients add up
    found, dlogits = jax.jit(jax.vmap(jax.grad(total, has_aux=True)))(LOGITS, LABELS, ids)[::-1]
    for k in range(2):
        q = torch.tensor(LOGITS[k], dtype=torch.float64, requires_grad=True)
        options = dict(ignore_index=-100, extra_ids=torch.tensor(ids[k]), extras=EXTRAS)
        options["temperature"] = torch.tensor(HEAT[0])
        wanted = naive.token_stats(q, torch.tensor(LABELS[k]), **options)
        sum(wanted[n].sum() for n in names).backward()
        for n in names:
            np.testing.assert_allclose(
                getattr(found, n)[k], wanted[n].detach(), rtol=1e-5, atol=1e-5
            )
        np.testing.assert_allclose(dlogits[k], q.grad, rtol=1e-4, atol=1e-4)


def test_a_traced_temperature_is_one_of_each_row() -> None:
    stats = jax.jit(lambda t: irl.token_stats(LOGITS, LABELS, temperature=t))(jnp.float32(0.7))
    by_number = irl.token_stats(LOGITS, LABELS, temperature=0.7)
    np.testing.assert_allclose(stats.logprob, by_number.logprob, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="temperature is differentiated"):
        jax.grad(lambda t: irl.token_stats(LOGITS, LABELS, temperature=t).value.sum())(0.7)
    with pytest.raises(ValueError, match="temperature is traced"):
        jax.jit(lambda t: irl.mle_loss(LOGITS, LABELS, temperature=t))(0.7)


def test_bad_ids_are_nan_and_none_is_0() -> None:
    for bad in (17, -5, 2**31 - 1):
        found = irl.token_stats(LOGITS, LABELS, extra_ids=np.full((2, 4, 1), bad))
        assert np.isnan(found.extra_logprob).all()
    found = irl.token_stats(LOGITS, LABELS, extra_ids=np.full((2, 4, 1), -100))
    assert not np.asarray(found.extra_logprob).any()


def test_numbers_of_a_loss() -> None:
    assert irl.mle_loss(LOGITS, LABELS, temperature=2.0) == irl.mle_loss(
        LOGITS, LABELS, logit_scale=0.5
    )
