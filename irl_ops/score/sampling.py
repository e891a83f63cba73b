"""Answers sampled from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from irl_ops.score.scorer import Encoded, Scorer


class Sampling(NamedTuple):
    """How answers are drawn; all of the vocabulary takes part unless ``top_p`` says otherwise."""

    samples: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@torch.no_grad()
def sample(scorer: Scorer, prompts: Sequence[list[int]], how: Sampling) -> list[list[Encoded]]:
    """Answers to each prompt; one that reaches ``max_new_tokens`` has no end token.

    They depend on torch's random state, and on which prompts are drawn together.
    """
    model, tokenizer = scorer.model, scorer.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else scorer.ends[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    generate: Any = model.generate
    made = generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=how.samples,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=0,
        max_new_tokens=_room(scorer, width, how.max_new_tokens),
        eos_token_id=scorer.ends,
        pad_token_id=pad,
    )
    answers = made[:, 1 if scorer.two_parts else width :].tolist()
    cut = [_until_end(answer, scorer.ends) for answer in answers]
    n = how.samples
    return [
        [Encoded(prompt, answer) for answer in cut[i * n : (i + 1) * n]]
        for i, prompt in enumerate(prompts)
    ]


def _room(scorer: Scorer, width: int, wanted: int) -> int:
    """A decoder's positions hold prompt and answer."""
    if scorer.max_length is None:
        return wanted
    taken = 0 if scorer.two_parts else width
    return max(1, min(wanted, scorer.max_length - taken))


def _until_end(answer: list[int], ends: list[int]) -> list[int]:
    for t, token in enumerate(answer):
        if token in ends:
            return answer[: t + 1]
    return answer
