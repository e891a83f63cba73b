"""What is known of one scored answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SERIES = ("value", "logprob", "entropy", "reward")


@dataclass(frozen=True)
class Scored:
    """Statistics of an answer's tokens, its end token included.

    Attributes:
        ids: the tokens.
        pieces: their text.
        value: V(s_t), before the token.
        logprob: log pi(a_t | s_t).
        entropy: H_t of the whole distribution.
        reward: r_t = Q(s_t, a_t) - gamma V(s_t+1), where V is 0 after the end token.
        gamma: the discount.
        finished: whether it ends in an end token; if not, V of the state after the last token is
            in the last reward.
    """

    ids: list[int]
    pieces: list[str]
    value: list[float]
    logprob: list[float]
    entropy: list[float]
    reward: list[float]
    gamma: float
    finished: bool

    @property
    def total(self) -> float:
        """The sum of the rewards."""
        return math.fsum(self.reward)

    @property
    def discounted(self) -> float:
        """The sum of gamma^t r_t."""
        return math.fsum(self.gamma**t * r for t, r in enumerate(self.reward))

    @property
    def likelihood(self) -> float:
        """log pi of the answer. At gamma = 1, a finished answer's ``total`` less ``value[0]``."""
        return math.fsum(self.logprob)

    @property
    def finite(self) -> bool:
        """Whether all statistics are numbers."""
        return all(math.isfinite(x) for name in SERIES for x in getattr(self, name))

    def answer_fields(self) -> dict[str, Any]:
        """What is written of the answer as a whole."""
        return {
            "finished": self.finished,
            "tokens": len(self.ids),
            "logprob": short(self.likelihood),
            "reward": short(self.total),
            "discounted_reward": short(self.discounted),
            "value": short(self.value[0]),
            "entropy": short(math.fsum(self.entropy) / len(self.ids)),
        }

    def token_fields(self) -> dict[str, Any]:
        """What is written of the tokens."""
        series = {name: [short(x) for x in getattr(self, name)] for name in SERIES}
        return {"piece": self.pieces, "id": self.ids, **series}


def short(x: float) -> float:
    """As many digits as a float32 has."""
    return float(f"{x:.8g}")
