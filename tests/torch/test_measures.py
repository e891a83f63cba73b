"""token_stats with all that it can be asked for, against the naive statistics in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings

import irl_ops.torch as irl
from irl_ops.torch.backends import BACKENDS

from ..cases import Case
from ..measure_cases import check, measure_cases

SERVING = [
    name
    for name in irl.available_backends()
    if hasattr(BACKENDS[name], "row_measures")
    and BACKENDS[name].unavailable(torch.device("cpu")) is None
]


every_backend = pytest.mark.parametrize("backend", SERVING)


@every_backend
@given(case=measure_cases())
@settings(max_examples=80)
def test_everything(backend: str, case: Case) -> None:
    check(partial(irl.token_stats, backend=backend), case)
