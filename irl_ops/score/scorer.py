"""``Scorer``: the statistics of answers under a Transformers model, logits never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from irl_ops.score.lines import BadLineError, Item
from irl_ops.score.record import SERIES, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from irl_ops.torch import TokenStats

IGNORE = -100
SPACE = "\u2581"  # SentencePiece's sign for one
LONGEST_CHARACTER = 4  # bytes


class Encoded(NamedTuple):
    """A prompt and an answer as tokens; of an unfinished answer the end token is missing."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.answer)


class Scorer:
    r"""Scores answers: :math:`r_t = Q(s_t, a_t) - \gamma V(s_{t+1})`, V = 0 after the end token.

    A model that was saved with a value head (``apply_iqlearn(model, value_head=True)``) has its V,
    and Q = V + log pi; of any other, V and Q are those of the logits.

    Only the rows of answers reach the last layer, packed, through
    ``irl_ops.torch.linear_token_stats``: no logits are stored, whatever the vocabulary.

    Args:
        model: a decoder or an encoder-decoder of Transformers, on any device. It is put into
            evaluation mode.
        tokenizer: its tokenizer, with an end token.
        gamma: discount in [0, 1].
        separator: what stands between the prompt and the answer of a decoder.
        max_length: tokens of a prompt with its answer (of each of them in an encoder-decoder);
            None: the model's ``max_position_embeddings``, or no limit where it has none.
        stored_logits: store the logits, for models where they are not those of a linear layer.

    Raises:
        ValueError: the tokenizer has no end token, or ids beyond the model's vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        gamma: float = 1.0,
        separator: str = "\n",
        max_length: int | None = None,
        stored_logits: bool = False,
    ) -> None:
        self.model = model
        model.train(False)
        self.tokenizer = tokenizer
        self.gamma = gamma
        self.separator = separator
        self.stored_logits = stored_logits
        config = model.config.get_text_config(decoder=True)
        self.two_parts = bool(model.config.is_encoder_decoder)
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)
        if getattr(config, "iqlearn_value_head", False):  # what apply_iqlearn has saved
            from irl_ops.integrations.transformers.value_head import add_value_head

            add_value_head(model)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; accepted: one with eos_token")
        self.ends = _ends(model, tokenizer)
        rows = model.config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, and the model {rows}; "
                "accepted: the tokenizer that the model was trained with"
            )

    # ---------------------------------------------------------------------------------------------
    # From text to tokens
    # ---------------------------------------------------------------------------------------------

    def encode(self, item: Item) -> Encoded:
        """The tokens of a prompt and of its answer with an end token, cut at ``max_length``.

        Raises:
            BadLineError: no room is left for an answer.
        """
        prompt = self.encode_prompt(item)
        assert item.answer is not None
        answer = self.tokenizer.encode(item.answer, add_special_tokens=False)
        answer.append(self.tokenizer.eos_token_id)
        return Encoded(prompt, answer[: self.room(prompt)])

    def encode_prompt(self, item: Item) -> list[int]:
        """The tokens of a prompt."""
        text = item.prompt
        if not (self.two_parts or item.chat):
            text += self.separator
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not item.chat)
        if not self.two_parts and ids and ids[-1] == self.tokenizer.eos_token_id and not item.chat:
            ids.pop()  # of tokenizers that end every text
        if not ids:
            raise BadLineError("the prompt has no tokens; accepted: one or more")
        if self.room(ids) == 0:
            raise BadLineError(
                f"the prompt has {len(ids)} tokens, and max_length is {self.max_length}: no room "
                "is left for an answer"
            )
        return ids

    def room(self, prompt: list[int]) -> int | None:
        """How many tokens an answer may have, None for any number."""
        if self.max_length is None:
            return None
        if self.two_parts:
            return self.max_length if len(prompt) <= self.max_length else 0
        return max(self.max_length - len(prompt), 0)

    # ---------------------------------------------------------------------------------------------
    # From tokens to statistics
    # ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, batch: Sequence[Encoded]) -> list[Scored]:
        """The statistics of a batch, which is padded to its longest."""
        inputs, first = self._two_parts(batch) if self.two_parts else self._one_part(batch)
        inputs = {name: x.to(self.model.device) for name, x in inputs.items()}
        stats = self._stats(inputs, first, batch)
        series = {name: getattr(stats, name).double().tolist() for name in SERIES}
        scored, start = [], 0
        for one in batch:
            end = start + len(one.answer)
            scored.append(
                Scored(
                    ids=one.answer,
                    pieces=self.pieces(one.answer),
                    gamma=self.gamma,
                    finished=one.answer[-1] in self.ends,
                    **{name: values[start:end] for name, values in series.items()},
                )
            )
            start = end + 1
        return scored

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token, with the space before it.

        Bytes that only the next token makes a character are shown with that one.
        """
        found: list[str] = []
        open_ids: list[int] = []
        for token in ids:
            raw = self.tokenizer.convert_ids_to_tokens(token)
            if isinstance(raw, str) and raw.startswith(SPACE):
                found.append(" " + raw[1:])
                open_ids = []
                continue
            open_ids.append(token)
            text = str(self.tokenizer.decode(open_ids, clean_up_tokenization_spaces=False))
            if text.endswith("\ufffd") and len(open_ids) < LONGEST_CHARACTER:
                found.append("")
            else:
                found.append(text)
                open_ids = []
        return found

    def _one_part(self, batch: Sequence[Encoded]) -> tuple[dict[str, Tensor], list[int]]:
        """A decoder reads prompt and answer; the last token of the prompt scores the first."""
        ids = [[*one.prompt, *one.answer] for one in batch]
        return self._padded("", ids), [len(one.prompt) - 1 for one in batch]

    def _two_parts(self, batch: Sequence[Encoded]) -> tuple[dict[str, Tensor], list[int]]:
        """The decoder reads its start token, then the answer."""
        start = self.model.config.decoder_start_token_id
        inputs = self._padded("", [one.prompt for one in batch])
        inputs |= self._padded("decoder_", [[start, *one.answer] for one in batch])
        return inputs, [0] * len(batch)

    def _padded(self, prefix: str, ids: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            f"{prefix}input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
            f"{prefix}attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in ids]
            ),
        }

    def _stats(
        self, inputs: dict[str, Tensor], first: list[int], batch: Sequence[Encoded]
    ) -> TokenStats:
        """Of the rows of all answers, one after the other.

        Each has one row more than tokens: that of the state after its last token, from which an
        unfinished answer bootstraps.
        """
        from irl_ops.integrations.transformers.fused import input_of, unstored_logits
        from irl_ops.integrations.transformers.value_head import values_of
        from irl_ops.torch import linear_token_stats, token_stats

        width = next(reversed(inputs.values())).shape[1]
        sizes = [len(one.answer) + 1 for one in batch]
        rows = torch.cat(
            [
                torch.arange(b * width + start, b * width + start + size)
                for b, (start, size) in enumerate(zip(first, sizes, strict=True))
            ]
        ).to(self.model.device)
        labels = torch.tensor([token for one in batch for token in [*one.answer, IGNORE]])
        options: dict[str, Any] = {
            "gamma": self.gamma,
            "eos_token_id": self.ends,
            "cu_seqlens": torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        }

        def statistics(of: Any, made: Tensor, hidden: Tensor, *weight: Tensor, **layer: Any) -> Any:
            device = made.device
            options["cu_seqlens"] = options["cu_seqlens"].to(device)
            taken, below = (x.flatten(0, 1)[rows.to(device)] for x in (made, hidden))
            values = values_of(self.model, below)
            return of(taken, *weight, labels.to(device), values=values, **layer, **options)

        model: Any = self.model
        layer = model.get_output_embeddings()
        with input_of(layer) if self.stored_logits else unstored_logits(self.model) as seen:
            logits: Any = self.model(**inputs, use_cache=False).logits
            if self.stored_logits:
                assert seen is not None
                return statistics(token_stats, logits, seen[0])  # type: ignore[no-any-return]
            found: list[TokenStats] = []

            def within(x: Any) -> Tensor:
                made = statistics(linear_token_stats, x.hidden, x.hidden, x.weight, **x.layer)
                found.append(made)
                value: Tensor = made.value
                return value  # a tensor, as a layer's forward returns

            logits.within_layer(within)
            return found[0]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All end tokens: the tokenizer's, and those at which the model stops to generate."""
    generation = getattr(model, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    more = [] if given is None else [given] if isinstance(given, int) else list(given)
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))
