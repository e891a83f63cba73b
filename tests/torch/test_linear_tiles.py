"""Statistics of a last layer in tiles of rows and columns, merged as those of a shard."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irl_ops.torch as irl
from irl_ops.kernels import reference
from irl_ops.torch import chunks
from irl_ops.torch.linear_arguments import Layer

from .. import naive

N, V, D = 40, 9001, 6  # in chunks of 8 rows: three tiles across, and two down
LABELS = torch.randint(V, (1, N), generator=torch.Generator().manual_seed(0))
LABELS[0, 3] = -100


@given(
    count=st.integers(1, 3000),
    vocab=st.integers(1, 40000),
    chunk=st.integers(1, 300),
    width=st.sampled_from([1, 8]),
)
def test_tiles_hold_every_logit_once(count: int, vocab: int, chunk: int, width: int) -> None:
    """And at most as many at a time as a chunk of that many rows."""
    hidden, weight = (torch.empty(n, width, device="meta") for n in (count, vocab))
    over = chunks.Linear(
        reference, Layer(hidden, weight, None, chunk, "weight", 1.0, None), (False,) * 3
    )
    over.product = lambda *_: None  # type: ignore[method-assign]
    row = 0
    for rows, tiles in over.tiles():
        assert rows.start == row
        row, column = rows.stop, 0
        for start, logits in tiles:
            assert start == column
            assert logits.shape[0] == rows.stop - rows.start
            assert logits.is_contiguous()
            assert logits.numel() <= max(chunk * vocab, min(vocab, chunks.NARROWEST))
            column += logits.shape[1]
        assert column == vocab
    assert row == count


def layer(bias: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        "hidden": torch.randn(1, N, D, generator=generator),
        "weight": torch.randn(V, D, generator=generator),
    }
    if bias:
        made["bias"] = torch.randn(V, generator=generator)
        made["bias"][[2, 4000, 8999]] = -torch.inf
    return made


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("asked", [False, True])
def test_statistics_of_tiles(backend: str, asked: bool) -> None:
    """Beside -inf columns; labels and ids in every tile; a mask, and the first of equal maxima."""
    given, options = layer(bias=True), dict[str, Any](gamma=0.9, shift=True)
    if asked:
        generator = torch.Generator().manual_seed(2)
        options |= {
            "extra_ids": torch.randint(V, (1, N, 4), generator=generator),
            "temperature": 0.5 + torch.rand(1, N, generator=generator),
            "extras": ("log_sum_sq", "top1", "mean_logit"),
        }
        given["weight"][[5000, 8000]] = given["weight"][
            77
        ].clone()  # ties, should it be the largest
        given["bias"][[77, 5000, 8000]] = 60.0
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    exact = {name: x.double().requires_grad_() for name, x in given.items()}
    stats = irl.linear_token_stats(
        leaves["hidden"], leaves["weight"], LABELS, bias=leaves["bias"], chunk_size=8,
        backend=backend, **options,
    )  # fmt: skip
    q = exact["hidden"] @ exact["weight"].T + exact["bias"]
    wanted = naive.token_stats(q, LABELS, **options)
    names = ["value", "logprob", "entropy", "reward"]
    if asked:
        assert torch.equal(stats.top1, wanted["top1"])
        assert (stats.top1 == 77).all()
        names += ["extra_logprob", "log_sum_sq", "mean_logit"]
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32 rounds logits of up to 60
    total, expected = 0.0, 0.0
    for name in names:
        found = getattr(stats, name)
        torch.testing.assert_close(found.double(), wanted[name], **close, msg=name)
        finite = wanted[name].detach().isfinite()
        total = total + torch.where(finite, found, 0.0).sum()
        expected = expected + torch.where(finite, wanted[name], 0.0).sum()
    total.backward()
    expected.backward()
    for name, x in leaves.items():
        scale = exact[name].grad.abs().max().item()
        error = (x.grad.double() - exact[name].grad).abs().max().item()
        assert error <= 1e-5 * max(scale, 1.0) * N, name


def test_entropies_of_tiles_stay_within_their_range() -> None:
    hidden, weight = torch.zeros(N, D), torch.ones(V, D)
    one = torch.where(torch.arange(V) == 5, 1e4, 0.0)
    with torch.no_grad():
        stats, certain = (
            irl.linear_token_stats(hidden, weight, LABELS[0], bias=bias, chunk_size=8)
            for bias in (None, one)
        )
    most = torch.tensor(float(V)).log()
    assert (stats.entropy <= most).all() and torch.allclose(stats.entropy, most)
    assert (certain.entropy == 0).all() and (certain.logprob <= 0).all()
