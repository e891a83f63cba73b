"""Episodes of the policy: prompts out of a batch, answers into one, and those of earlier steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
FILL = {"attention_mask": 0, "labels": IGNORED_LABEL, "input_ids": None}
"""What a batch may hold, and what fills up its shorter rows; None is the padding token."""


class Episode(NamedTuple):
    """A prompt and an answer of the policy as it was at an optimiser step."""

    step: int
    prompt: list[int]
    answer: list[int]  # its last token is an end token, or it was cut off


class Buffer:
    """The episodes of the last steps.

    Args:
        max_age: how many steps ago an episode may have been sampled.
    """

    def __init__(self, max_age: int) -> None:
        self.max_age = max_age
        self.episodes: deque[Episode] = deque()

    def add(self, step: int, episodes: Iterable[Episode]) -> None:
        """Takes in new episodes, and drops those that are too old at that step."""
        self.episodes.extend(episodes)
        while self.episodes and step - self.episodes[0].step > self.max_age:
            self.episodes.popleft()

    def draw(self, count: int, seed: int) -> list[Episode]:
        """Episodes at random; none comes again before all have come."""
        order = _shuffled(len(self.episodes), count, seed)
        return [self.episodes[i] for i in order]

    def state(self) -> list[Episode]:
        """For a file of JSON."""
        return list(self.episodes)

    def load(self, state: list[Any]) -> None:
        """What ``state`` returned."""
        self.episodes = deque(Episode(*entry) for entry in state)


def _shuffled(size: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while size and len(order) < count:
        order += torch.randperm(size, generator=generator).tolist()
    return order[:count]


def prompt_of(batch: dict[str, Tensor], encoder_decoder: bool) -> list[int]:
    """The prompt of a batch of one: all before the first label.

    A decoder needs a token to begin with: where the first has a label, it is taken for the prompt.
    """
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask[0]
    if encoder_decoder:
        return ids[real != 0].tolist()
    ids, labels = ids[real != 0], labels[real != 0]
    labelled = (labels != IGNORED_LABEL).nonzero()
    first = int(labelled[0]) if len(labelled) else len(ids)
    return ids[: max(first, 1)].tolist()


def batch_of(
    episodes: list[Episode], pad: int, ends: list[int], encoder_decoder: bool
) -> dict[str, Tensor]:
    """Prompts and answers as rows of a batch, filled up on the right.

    Behind an answer that was cut off there is one more row of logits, whose value it bootstraps
    from: a decoder has it anyway, and an encoder-decoder gets a last label that is ignored.
    """
    rows = []
    for _, prompt, answer in episodes:
        if encoder_decoder:
            cut = not answer or answer[-1] not in ends
            rows.append((prompt, answer + [IGNORED_LABEL] * cut))
        else:
            rows.append((prompt + answer, [IGNORED_LABEL] * len(prompt) + answer))
    ids = [torch.tensor(row) for row, _ in rows]
    labels = [torch.tensor(row) for _, row in rows]
    fill = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": fill(ids, batch_first=True, padding_value=pad),
        "attention_mask": fill([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": fill(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def plain(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The parts of a collated batch that are joined with episodes.

    Raises:
        ValueError: it holds something else, whose part in a joined batch nobody knows.
    """
    known = {k: v for k, v in batch.items() if not k.startswith("decoder_")}
    known.setdefault("attention_mask", torch.ones_like(known["input_ids"]))
    for name in known:
        if name not in FILL:
            raise ValueError(
                f"the batch holds {name!r}, packed or weighted demonstrations perhaps; accepted: "
                f"{', '.join(FILL)} [B, T], a document in each row"
            )
    return known


def joined(first: dict[str, Tensor], second: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """One batch of two, filled up on the right; ``is_expert`` [B] tells the rows of the first."""
    out = {}
    for name, fill in FILL.items():
        parts = [part[name].to(first[name].device) for part in (first, second)]
        width = max(part.shape[1] for part in parts)
        value = pad if fill is None else fill
        out[name] = torch.cat([F.pad(x, (0, width - x.shape[1]), value=value) for x in parts])
    of_first = len(first["labels"])
    out["is_expert"] = torch.arange(len(out["labels"]), device=out["labels"].device) < of_first
    return out


def scored(labels: Tensor, shift: bool) -> Tensor:
    """How many labels there are; nothing scores those of a decoder's first column."""
    return ((labels[:, 1:] if shift else labels) != IGNORED_LABEL).sum()
