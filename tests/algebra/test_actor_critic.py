"""Advantages and policy losses against loops over rows, and against their meaning."""

import array_api_compat.numpy as xp
import numpy as np
import pytest

from irl_ops import algebra


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 1.0), (0.9, 0.7), (0.9, 0.0)])
def test_advantages_are_those_of_a_loop(length, gamma, decay):
    rng = np.random.default_rng(length)
    reward, value, ahead = rng.normal(size=(3, 2, length))
    follows = rng.random((2, length)) < 0.7
    follows[:, -1] = False
    found = algebra.advantages(xp, reward, value, ahead, follows, gamma, decay)
    for b in range(2):
        behind = 0.0
        for t in reversed(range(length)):
            delta = reward[b, t] + gamma * ahead[b, t] - value[b, t]
            behind = delta + gamma * decay * behind * follows[b, t]
            # sums of some ten terms of size 1 in float64
            assert found[b, t] == pytest.approx(behind, abs=1e-12)


def test_with_a_decay_of_one_it_is_the_return_less_the_value():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 6))
    ahead = np.append(value[1:], 0.0)  # it ends there
    follows = np.append(np.ones(5, bool), False)
    found = algebra.advantages(xp, reward, value, ahead, follows, 1.0, 1.0)
    returns = reward[::-1].cumsum()[::-1]
    np.testing.assert_allclose(found, returns - value, atol=1e-12)  # as above


def test_policy_rows():
    advantage = np.array([2.0, 2.0, -2.0, -2.0, 1.0])
    ratio = np.array([1.5, 0.5, 1.5, 0.5, 1.0])
    old = np.full(5, -1.0)
    logprob = old + np.log(ratio)
    plain = algebra.policy_rows(xp, logprob, old, advantage, None)
    np.testing.assert_allclose(plain, -advantage * logprob)
    clipped = algebra.policy_rows(xp, logprob, old, advantage, 0.2)
    # what has gone too far in the direction of its advantage is held
    np.testing.assert_allclose(clipped, [-2 * 1.2, -2 * 0.5, 2 * 1.5, 2 * 0.8, -1.0])
