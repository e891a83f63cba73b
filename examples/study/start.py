"""The initial policy: a small model made and pre-trained on the spot, or a pre-trained one."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from text_data import train_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from irl_ops.score.lines import BadLineError, Item
from irl_ops.score.scorer import IGNORE, Encoded, Scorer
from study.tasks import Task

Row = dict[str, list[int]]
SIGNS = "0123456789.+-*/()=<>#"
"""What an answer of GSM8k is calculated with."""


class Sizes(NamedTuple):
    """How much is done."""

    start_pairs: int
    train_pairs: int
    test_pairs: int
    samples: int  # of each test question
    vocab_size: int
    width: int
    layers: int
    start_steps: int
    steps: int
    online_steps: int  # of the runs that sample
    batch_size: int
    learning_rate: float
    max_length: int  # of question and answer
    max_new_tokens: int


class Start(NamedTuple):
    """An initial policy and the data as its tokens."""

    model: PreTrainedModel
    tokenizer: Any
    scorer: Scorer
    train: list[Row]
    test: list[Encoded]

    @property
    def collate(self) -> DataCollatorForSeq2Seq:
        """Pads; gives an encoder-decoder its decoder's inputs."""
        two_parts = self.scorer.two_parts
        return DataCollatorForSeq2Seq(self.tokenizer, model=self.model if two_parts else None)


def tokenizer_of(task: Task, name: str | None, sizes: Sizes) -> Any:
    """A tokenizer trained on the data that is not held out, or that of a model."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:  # masks tell padding from an end
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.add_tokens([sign for sign in SIGNS if not writes(tokenizer, sign)])
        return tokenizer
    return train_tokenizer([*task.start, *task.train], sizes.vocab_size)


def writes(tokenizer: Any, sign: str) -> bool:
    """Whether a sign survives as tokens; T5's vocabulary has no "<", for one."""
    ids = tokenizer.encode(sign, add_special_tokens=False)
    return sign in tokenizer.decode(ids, skip_special_tokens=True)


def model_of(architecture: str, tokenizer: Any, name: str | None, sizes: Sizes) -> PreTrainedModel:
    """A small random model, or the pre-trained one of that name."""
    if name is not None:
        two_parts = AutoConfig.from_pretrained(name).is_encoder_decoder
        kind: Any = AutoModelForSeq2SeqLM if two_parts else AutoModelForCausalLM
        model: Any = kind.from_pretrained(name, dtype="float32")
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model  # type: ignore[no-any-return]
    if architecture == "decoder":
        return small_decoder(tokenizer, sizes)
    return small_encoder_decoder(tokenizer, sizes)


def small_decoder(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> PreTrainedModel:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.width,
            intermediate_size=3 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.max_length + sizes.max_new_tokens,
            tie_word_embeddings=True,
            initializer_range=0.06,  # with the default, 0.02, a narrow model starts slowly
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def small_encoder_decoder(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> PreTrainedModel:
    """A T5 with random weights."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=sizes.width,
            d_kv=sizes.width // 4,
            d_ff=3 * sizes.width,
            num_layers=sizes.layers,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def encoded(scorer: Scorer, pairs: list[Any], most: int) -> list[Encoded]:
    """Pairs as tokens; those whose question leaves no room are left out."""
    found = []
    for pair in pairs[:most]:
        try:
            found.append(scorer.encode(Item(pair.prompt.rstrip("\n"), pair.completion)))
        except BadLineError:
            continue
    return found


def row(scorer: Scorer, one: Encoded) -> Row:
    """What the model is trained on; the question carries no label in a decoder."""
    if scorer.two_parts:
        return {"input_ids": one.prompt, "labels": one.answer}
    labels = [IGNORE] * len(one.prompt) + one.answer
    return {"input_ids": one.prompt + one.answer, "labels": labels}


def prepare(
    task: Task,
    architecture: str,
    name: str | None,
    sizes: Sizes,
    seed: int,
    saved: Path,
    train: Any,
) -> Start:
    """The initial policy of a seed; one made here is pre-trained once and kept in ``saved``.

    Args:
        task: the data.
        architecture: of a small model.
        name: of a pre-trained model instead.
        sizes: how much is done.
        seed: of the weights and of the order of the pre-training.
        saved: the folder of the weights.
        train: ``train(model, rows, collate, steps, seed)`` by maximum likelihood.
    """
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(task, name, sizes)
    model = model_of(architecture, tokenizer, name, sizes)
    scorer = Scorer(model, tokenizer, max_length=sizes.max_length)
    start = Start(
        model,
        tokenizer,
        scorer,
        [row(scorer, one) for one in encoded(scorer, task.train, sizes.train_pairs)],
        encoded(scorer, task.test, sizes.test_pairs),
    )
    if name is None:
        if saved.exists():
            model.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        else:
            rows = [row(scorer, one) for one in encoded(scorer, task.start, sizes.start_pairs)]
            # A decoder that has to find the question by cross-attention learns more slowly.
            steps = sizes.start_steps * (2 if scorer.two_parts else 1)
            train(model, rows, start.collate, steps, seed)
            saved.parent.mkdir(parents=True, exist_ok=True)
            half = saved.with_suffix(".half")
            torch.save(model.state_dict(), half)
            half.replace(saved)  # the file is whole or absent
    return start
