"""The MDP of the paper's Fig. 11, many copies at a time, and its exact success rates.

    top      o   o   o   o        with recovery, one action leads down again; without, none
             ^:  ^:  ^:  ^:
    bottom   o > o > o > o > green

The agent starts at the left. At the bottom it can move right or up; one action in ten is executed
as the other one. The paper gives neither the length of the chain nor a horizon: both are ours. So
is that in each top state chance has decided which of the two actions leads back: otherwise a
network could carry "right" over from the demonstration, and had nothing to learn from samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RIGHT, UP = 0, 1  # at the bottom
NOISE = 0.1


class Chain(NamedTuple):
    """Copies of the MDP.

    Attributes:
        recovery: bool [E], whether the top states lead back.
        back: [E, length], by which action.
        length: of the bottom row.
        horizon: steps of an episode.
    """

    recovery: Tensor
    back: Tensor
    length: int
    horizon: int

    @property
    def states(self) -> int:
        """Bottom states, then the top states in the same order."""
        return 2 * self.length

    def features(self) -> Tensor:
        """What a network sees of a state: its column, and whether it is at the top; [S, n + 1]."""
        column = torch.eye(self.length).repeat(2, 1)
        top = (torch.arange(self.states) >= self.length).float()
        return torch.cat([column, top[:, None]], -1)

    def demonstration(self) -> tuple[Tensor, Tensor]:
        """States and actions of the one demonstration, without mistakes; [T], padded as episodes.

        Past the end the action is -100.
        """
        states = torch.arange(self.horizon).clamp(max=self.length - 1)
        actions = torch.full((self.horizon,), RIGHT)
        actions[self.length :] = -100
        return states, actions

    def episodes(self, policy: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Episodes under a policy [E, S, 2]: states and actions [E, number, T].

        The action is the one that the agent chose. Past green it is -100.
        """
        copies = len(self.recovery)
        copy = torch.arange(copies)[:, None].expand(copies, number)
        state = torch.zeros(copies, number, dtype=torch.long)
        done = torch.zeros(copies, number, dtype=torch.bool)
        states, actions = [], []
        for _ in range(self.horizon):
            up = torch.rand(copies, number) < policy[copy, state, UP]
            states.append(state)
            actions.append(torch.where(done, -100, up.long()))
            executed = (up ^ (torch.rand(copies, number) < NOISE)).long()
            state, reached = self._next(copy, state, executed)
            done = done | reached
        return torch.stack(states, -1), torch.stack(actions, -1)

    def _next(self, copy: Tensor, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        top, column = state >= self.length, state % self.length
        back = self.recovery[:, None] & (action == self.back[copy, column])
        right = (column + 1).clamp(max=self.length - 1)
        moved = torch.where(action == UP, column + self.length, right)
        reached = ~top & (action == RIGHT) & (column == self.length - 1)
        return torch.where(top, torch.where(back, column, state), moved), reached

    def success(self, policy: Tensor) -> Tensor:
        """The chance to reach green within the horizon, exactly; [E] for a policy [E, S, 2]."""
        n = self.length
        executed = policy * (1 - NOISE) + policy.flip(-1) * NOISE
        up = executed[:, :n, UP]
        stay = 1 - self.recovery[:, None] * executed[:, n:].gather(-1, self.back[..., None])[..., 0]
        bottom = torch.zeros_like(up)  # chance of success from here in the steps that remain
        top = torch.zeros_like(up)
        for _ in range(self.horizon):
            right = torch.cat([bottom[:, 1:], torch.ones_like(bottom[:, :1])], -1)
            bottom, top = up * top + (1 - up) * right, stay * top + (1 - stay) * bottom
        return bottom[:, 0]

    def best(self) -> Tensor:
        """The success of an agent that always wants right, and back; [E]."""
        wanted = torch.cat([torch.full_like(self.back, RIGHT), self.back], -1)
        return self.success(torch.nn.functional.one_hot(wanted, 2).float())


def chains(seeds: int, length: int, horizon: int) -> Chain:
    """One copy for each seed with recovery, then one for each without."""
    recovery = torch.tensor([True, False]).repeat_interleave(seeds)
    random = torch.Generator().manual_seed(0)
    back = torch.randint(2, (seeds, length), generator=random).repeat(2, 1)
    return Chain(recovery, back, length, horizon)
