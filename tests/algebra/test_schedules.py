"""irl_ops.schedules against values worked out by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from irl_ops.schedules import warmup_ramp

# Sums of a few exact fractions in float64.
CLOSE = partial(pytest.approx, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0),
        (10, 0),
        (11, 0.05),
        (12, 0.1),
        (14, 0.2),
        (29, 0.2),
        (30, 0.2),
        (35, 0.15),
        (40, 0.1),
    ],
)
def test_linear_ramp_and_anneal(step, expected):
    schedule = partial(
        warmup_ramp,
        lam=0.2,
        warmup_steps=10,
        ramp_steps=4,
        anneal_start=30,
        anneal_steps=10,
        final=0.1,
    )
    assert schedule(step) == CLOSE(expected)


def test_plateaus_are_exact():
    schedule = partial(
        warmup_ramp,
        lam=0.1,
        warmup_steps=3,
        ramp_steps=7,
        anneal_start=20,
        anneal_steps=3,
        final=0.3,
        shape="cosine",
    )
    assert [schedule(s) for s in (0, 1, 2, 3)] == [0.0] * 4
    assert [schedule(s) for s in (10, 11, 20)] == [0.1] * 3
    assert [schedule(s) for s in (23, 10**9)] == [0.3] * 2


def test_zero_lengths_jump():
    schedule = partial(warmup_ramp, lam=0.1, warmup_steps=5, anneal_start=8, final=0.02)
    assert [schedule(s) for s in (0, 4, 5, 7, 8)] == [0.0, 0.0, 0.1, 0.1, 0.02]
    assert warmup_ramp(0, lam=0.1, warmup_steps=0) == 0.1


def test_cosine_shape():
    schedule = partial(warmup_ramp, lam=1.0, warmup_steps=0, ramp_steps=8, shape="cosine")
    for step in range(9):
        assert schedule(step) == CLOSE((1 - math.cos(math.pi * step / 8)) / 2)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_arrays_agree_with_numbers(shape):
    schedule = partial(
        warmup_ramp,
        lam=0.2,
        warmup_steps=3,
        ramp_steps=4,
        anneal_start=9,
        anneal_steps=5,
        final=0.05,
        shape=shape,
    )
    steps = range(18)
    expected = [schedule(s) for s in steps]
    np.testing.assert_allclose(schedule(np.arange(18.0)), expected, rtol=1e-12, atol=1e-15)
    # torch divides integers into float32
    np.testing.assert_allclose(schedule(torch.arange(18)), expected, rtol=1e-6, atol=1e-7)
    assert schedule(torch.tensor(5)).shape == ()
    assert isinstance(schedule(5), float) and isinstance(schedule(0), float)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lam": -0.1}, "lam=-0.1"),
        ({"lam": math.nan}, "lam=nan"),
        ({"final": math.inf}, "final=inf"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"ramp_steps": -2}, "ramp_steps=-2"),
        ({"anneal_start": 20, "anneal_steps": -3}, "anneal_steps=-3"),
        ({"anneal_steps": 3}, "anneal_steps=3 needs anneal_start"),
        ({"anneal_start": 13}, "anneal_start=13 is before the ramp has ended"),
        ({"shape": "smooth"}, "shape='smooth'; accepted: 'linear', 'cosine'"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    arguments = {"lam": 0.1, "warmup_steps": 10, "ramp_steps": 4} | wrong
    with pytest.raises(ValueError, match=message):
        warmup_ramp(0, **arguments)
