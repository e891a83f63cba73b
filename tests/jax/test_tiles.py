"""A layer whose loops hold matrices in tiles is the layer that it was."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irl_ops.jax as irl
from irl_ops.jax import private, tiles

ROWS, WIDTH, VOCAB = (2, 24), 16, 40  # six tiles of hidden states, five of the weight
HIDDEN = jax.random.normal(jax.random.key(0), (*ROWS, WIDTH), "bfloat16")
WEIGHT = jax.random.normal(jax.random.key(1), (VOCAB, WIDTH), "bfloat16")
BIAS = jax.random.normal(jax.random.key(2), (VOCAB,), "bfloat16")
LABELS = jax.random.randint(jax.random.key(3), ROWS, 0, VOCAB).at[0, :3].set(-100)
IDS = jax.random.randint(jax.random.key(4), (*ROWS, 2), 0, VOCAB)


def mean(hidden: Any, weight: Any, bias: Any, **options: Any) -> Any:
    options |= dict(lam=0.3, entropy_coef=0.1, softcap=20.0)
    return irl.linear_iqlearn_loss(hidden, weight, LABELS, bias=bias, **options)


def later(hidden: Any, weight: Any, bias: Any, **options: Any) -> Any:
    options |= dict(lam=0.3, reduction="none")
    return (irl.linear_iqlearn_loss(hidden, weight, LABELS, bias=bias, **options) ** 2).sum()


def measured(hidden: Any, weight: Any, bias: Any, **options: Any) -> Any:
    options |= dict(extra_ids=IDS, extras=("log_sum_sq",))
    stats = irl.linear_token_stats(hidden, weight, LABELS, bias=bias, **options)
    return (stats.logprob * stats.log_sum_sq).sum() + (
        stats.extra_logprob * stats.reward[..., None]
    ).sum()


def held(text: str) -> set[int]:
    """Which matrices a lowered program has in tiles, by their numbers of tiles."""
    return {n for n in (6, 5) if f"tensor<{n}x8x{WIDTH}xbf16>" in text}


@pytest.mark.parametrize(
    ("function", "chunk"), [(mean, 5), (mean, 32), (later, 32), (measured, 32)]
)
def test_the_numbers_are_the_same(
    function: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fill no chunk are among them, and chunks that consist of no whole tiles."""
    layer = HIDDEN, WEIGHT, BIAS
    loss = partial(function, backend="pallas", chunk_size=chunk, accumulate="weight")
    tiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*layer)
    assert held(tiled.as_text()) == ({5} if chunk == 5 else {6, 5})
    monkeypatch.setattr(tiles, "ROWS", 1024)  # no matrix has such tiles
    jax.clear_caches()
    plain = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*layer)
    assert not held(plain.as_text())
    found, expected = tiled.compile()(*layer), plain.compile()(*layer)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_one_of_several_devices_has_whole_tiles_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device five tiles are whole, on 5 there is one each, and 2 cannot share them."""
    run = tiles.where_whole((VOCAB, 7), lambda x: in_out(tiles.in_tiles(x)), in_out)
    for devices, whole in ((1, {5}), (5, {5}), (2, set())):
        monkeypatch.setattr(private, "partitions", lambda _, n=devices: n)
        assert held(jax.jit(lambda x: run(x)).lower(WEIGHT).as_text()) == whole


def in_out(x: jax.Array) -> jax.Array:
    return tiles.in_rows(x + 1)


def test_transformations() -> None:
    loss = partial(mean, bias=BIAS, backend="pallas", chunk_size=16, accumulate="weight")
    many = jnp.stack([HIDDEN, 2 * HIDDEN])
    expected = [jax.value_and_grad(loss, (0, 1))(x, WEIGHT) for x in many]
    mapped = jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None))(many, WEIGHT)
    for i, one in enumerate(expected):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), mapped, one)
    again = jax.grad(jax.checkpoint(loss), (0, 1))(HIDDEN, WEIGHT)
    jax.tree.map(np.testing.assert_array_equal, again, expected[0][1])
    with jax.disable_jit():
        found = loss(HIDDEN, WEIGHT)
    np.testing.assert_allclose(found, expected[0][0], rtol=2e-3)  # XLA leaves roundings out
