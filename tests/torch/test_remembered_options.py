"""Options that are numbers and names are read once: no call may get what another one was given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import irl_ops.torch as irl
from irl_ops import call

from .. import naive

V = 7
LOGITS = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    call._plain_loss.cache_clear()
    call._plain_stats.cache_clear()
    yield


def check(**options: Any) -> None:
    """The loss is that of the naive form."""
    expected, _ = naive.loss("iqlearn_loss", LOGITS.double(), LABELS, **options)
    actual = irl.iqlearn_loss(LOGITS, LABELS, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)  # float32


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        (dict(lam=1), dict(lam=True)),
        (dict(lam=1.0), dict(lam=True)),
        (dict(gamma=0), dict(gamma=False)),
        (dict(num_items=1), dict(num_items=True)),
        (dict(ignore_index=1), dict(ignore_index=True)),
        (dict(ignore_index=0), dict(ignore_index=0.0)),
        (dict(shift=True), dict(shift=1)),
        (dict(detach_next=False), dict(detach_next=0)),
        (dict(eos_token_id=1), dict(eos_token_id=True)),
        (dict(eos_token_id=1), dict(eos_token_id=1.0)),
        (dict(eos_token_id=(1, 2)), dict(eos_token_id=(True, 2))),
        (dict(eos_token_id=(1, 2)), dict(eos_token_id=(1, 2.0))),
        (dict(entropy_coef=0), dict(entropy_coef=False)),
    ],
)
def test_equal_options_of_another_type_are_refused(accepted, refused) -> None:
    """1, 1.0 and True are equal, and have the same hash."""
    (name,) = accepted
    for _ in range(2):  # read, and remembered
        irl.iqlearn_loss(LOGITS, LABELS, **accepted)
        with pytest.raises(TypeError, match=f"^{name} is "):
            irl.iqlearn_loss(LOGITS, LABELS, **refused)


def test_an_error_is_raised_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^lam is -1\.0"):
            irl.iqlearn_loss(LOGITS, LABELS, lam=-1.0)
        with pytest.raises(TypeError, match=r"^iqlearn_loss has no option 'caller'"):
            irl.iqlearn_loss(LOGITS, LABELS, caller="me")
        with pytest.raises(TypeError, match=r"^mle_loss has no option 'lam'"):
            irl.mle_loss(LOGITS, LABELS, lam=0.1)
        irl.iqlearn_loss(LOGITS, LABELS, lam=0.1)


def test_end_tokens_are_checked_for_each_vocabulary() -> None:
    irl.iqlearn_loss(LOGITS, LABELS, eos_token_id=V - 1)
    with pytest.raises(ValueError, match=r"^eos_token_id is 6; accepted: tokens from 0 to 5"):
        irl.iqlearn_loss(LOGITS[..., :-1], LABELS.clamp(max=V - 2), eos_token_id=V - 1)


def test_an_annealed_number_is_the_one_of_its_call() -> None:
    """Floats, integers and a tensor that is written in place, over and over."""
    tensor = torch.tensor(0.0)
    for lam, gamma in itertools.product([0.0, 0.5, 1, 1.0, 2, 0.5, 0], [1.0, 0.5, 1]):
        check(lam=lam, gamma=gamma)
        check(lam=np.float64(lam), gamma=gamma)
        check(lam=tensor.fill_(lam), gamma=gamma)


def test_no_more_is_remembered_than_is_said() -> None:
    for step in range(2 * call._REMEMBERED):
        irl.mle_loss(LOGITS[:1, :1], LABELS[:1, :1], entropy_coef=step / 1024)
    assert call._plain_loss.cache_info().currsize == call._REMEMBERED


def test_arrays_are_not_remembered() -> None:
    """Neither are lists, which may change."""
    ends = [1]
    where = torch.ones(2, 3, dtype=torch.bool)
    for end in (1, 5):
        ends[0] = end
        where[1, end % 3] = False
        check(where=where, eos_token_id=ends, gamma=0.5)
    irl.token_stats(LOGITS, LABELS, where=where)
    for remembered in (call._plain_loss, call._plain_stats):
        assert remembered.cache_info().currsize == 0


def test_calls_with_the_same_options_share_nothing_else() -> None:
    """Other labels, shapes and functions between two equal calls."""
    options: dict[str, Any] = dict(gamma=0.5, reduction="sum")
    first = irl.iqlearn_loss(LOGITS, LABELS, **options)
    irl.iqlearn_loss(LOGITS[:1, :2], LABELS[:1, :2], **options)
    irl.iqlearn_loss(LOGITS.flatten(0, 1), LABELS.flatten().roll(1), **options)
    irl.token_stats(LOGITS, LABELS, gamma=0.5)
    assert irl.iqlearn_loss(LOGITS, LABELS, **options) == first
    check(**options)
