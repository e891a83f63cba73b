"""Losses of logits cut among processes, against float64 losses and gradients of the whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..cases import cases, check
from .ranks import Ranks
from .split import run, splits


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.kill()


@given(data=st.data())
@settings(max_examples=60)
def test_loss_and_gradients(ranks: Ranks, data: Any) -> None:
    case = data.draw(cases())
    split = data.draw(splits(tuple(case.labels.shape), case.logits.shape[-1]))
    check(None, case, run(ranks, split))
