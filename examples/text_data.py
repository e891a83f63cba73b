"""Text for the demo: prompt/completion pairs, a tokenizer trained on them, and labelled tokens.

Nothing is downloaded. The default text is Python's own documentation, which comes with Python.
"""

import ast
import json
import random
import re
import statistics
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ACCEPTED = """Accepted data:
  .txt    UTF-8 text, documents separated by blank lines
  .jsonl  one JSON object per line, with "prompt" and "completion", or "question" and "answer",
          or "messages": a list of {"role": ..., "content": ...} that ends with the assistant"""

OPENING = 8  # words of a document that become its prompt
SHORTEST, LONGEST = 16, 100  # words of a document; shorter ones are left out, longer ones are cut
FEWEST_PAIRS = 40
IGNORE_INDEX = -100

Row = dict[str, list[int]]


class Pair(NamedTuple):
    """A prompt and the text that should follow it."""

    prompt: str
    completion: str


class DataError(ValueError):
    """A data file that cannot be used: says which file, which line and what is accepted."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}. {ACCEPTED}")


class Text(NamedTuple):
    """The text of one comparison, as tokens."""

    tokenizer: PreTrainedTokenizerFast
    start: list[Row]  # for the pre-training
    train: list[Row]
    held_out: list[Row]

    def prompts(self, number: int) -> list[list[int]]:
        """Return the first held-out prompts."""
        return [prompt_of(row) for row in self.held_out[:number]]

    def reference(self, longest: int) -> tuple[float, float]:
        """Measure the held-out completions as samples are measured.

        Returns:
            Their mean length in tokens, without end tokens, where each is cut after ``longest``;
            and the share of those that have no end within it.
        """
        ended, lengths = self.tokenizer.eos_token_id, []
        cut = 0
        for row in self.held_out:
            length = sum(label not in (IGNORE_INDEX, ended) for label in row["labels"])
            cut += length >= longest or ended not in row["labels"]
            lengths.append(min(length, longest))
        return statistics.mean(lengths), cut / len(lengths)


def prepare(
    path: Path | None, *, seed: int, held_out: int, vocab_size: int, max_length: int
) -> Text:
    """Read text and make tokens of it; the tokenizer never sees the held-out pairs.

    Args:
        path: as for ``load_pairs``.
        seed: of the order of the pairs.
        held_out: number of pairs to hold out, at most a quarter of all.
        vocab_size: of the tokenizer.
        max_length: tokens of a prompt with its completion.

    Raises:
        DataError: as ``load_pairs``, or for too few pairs.
    """
    pairs, start = load_pairs(path, seed), docstring_pairs(seed)
    if len(pairs) < FEWEST_PAIRS:
        raise DataError(str(path), f"{len(pairs)} usable pairs, the demo needs {FEWEST_PAIRS}")
    held_out = min(held_out, len(pairs) // 4)
    tokenizer = train_tokenizer(start + pairs[held_out:], vocab_size)
    rows = [encode(tokenizer, pair, max_length) for pair in pairs]
    return Text(
        tokenizer,
        start=packed(tokenizer, start, length=128),
        train=rows[held_out:],
        held_out=rows[:held_out],
    )


def load_pairs(path: Path | None, seed: int) -> list[Pair]:
    """Read the pairs of a file, or of Python's documentation; shuffled, without repetitions.

    Args:
        path: a ``.txt`` or ``.jsonl`` file; ``None`` for the topics of ``pydoc``.
        seed: of the shuffling.

    Raises:
        DataError: if the file cannot be read as one of the accepted forms.
    """
    if path is None:
        pairs = distinct(pair for title in topics for pair in document_pairs(topics[title], title))
    elif path.suffix.lower() == ".txt":
        pairs = distinct(document_pairs(read_text(path)))
    elif path.suffix.lower() == ".jsonl":
        pairs = list(dict.fromkeys(jsonl_pairs(path, read_text(path))))
    else:
        raise DataError(str(path), f"the suffix {path.suffix!r} is not known")
    random.Random(seed).shuffle(pairs)
    return pairs


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"byte {error.start} is not UTF-8") from error


def document_pairs(text: str, title: str = "") -> Iterator[Pair]:
    """Split text at blank lines; the first words of each document are its prompt."""
    for document in re.split(r"\n\s*\n", text):
        words = document.split()
        for start in range(0, len(words), LONGEST):
            window = words[start : start + LONGEST]
            if len(window) >= SHORTEST:
                prompt = " ".join(window[:OPENING])
                yield Pair(
                    f"{title}: {prompt}" if title else prompt, " " + " ".join(window[OPENING:])
                )


def jsonl_pairs(path: Path, text: str) -> Iterator[Pair]:
    """Read one pair from each non-empty line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(where, f"not JSON ({error.msg}, column {error.colno})") from error
            yield row_pair(row, where)


def row_pair(row: object, where: str) -> Pair:
    """Turn one row of a ``.jsonl`` file into a pair."""
    if not isinstance(row, dict):
        raise DataError(where, f"a JSON {type(row).__name__}, not an object")
    if "messages" in row:
        return chat_pair(row["messages"], where)
    for prompt, completion in (("prompt", "completion"), ("question", "answer")):
        if prompt in row and completion in row:
            return Pair(text_field(row, prompt, where) + "\n", text_field(row, completion, where))
    raise DataError(where, f"an object with the fields {sorted(row)}")


def chat_pair(messages: object, where: str) -> Pair:
    """Make the last message the completion and everything before it the prompt."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise DataError(where, '"messages" is not a list of objects')
    turns = [(text_field(t, "role", where), text_field(t, "content", where)) for t in messages]
    if len(turns) < 2 or turns[-1][0] != "assistant":
        roles = [role for role, _ in turns]
        raise DataError(where, f'"messages" has the roles {roles}, not ending with the assistant')
    prompt = "".join(f"{role}: {content}\n" for role, content in turns[:-1])
    return Pair(prompt + "assistant:\n", turns[-1][1])


def text_field(row: Mapping[str, object], name: str, where: str) -> str:
    """Return a field that must be a non-empty string."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(where, f"{name!r} is {value!r}, not a string with text in it")
    return value


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Keep one pair of each completion, so that no held-out text was also trained on."""
    return list({pair.completion: pair for pair in pairs}.values())


def docstring_pairs(seed: int) -> list[Pair]:
    """Read the docstrings of Python's standard library: the text of the common starting point."""
    folder = Path(sysconfig.get_path("stdlib"))
    pairs: list[Pair] = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                pairs += document_pairs(ast.get_docstring(node) or "", path.stem)
    if not pairs:
        raise FileNotFoundError(f"no docstrings of the standard library found in {folder}")
    pairs = distinct(pairs)
    random.Random(seed).shuffle(pairs)
    return pairs


def train_tokenizer(pairs: Iterable[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the padding token is not the end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((pair.prompt + pair.completion for pair in pairs), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def encode(tokenizer: PreTrainedTokenizerFast, pair: Pair, max_length: int) -> Row:
    """Turn a pair into ``input_ids`` and ``labels`` of the same length.

    Prompt tokens are labelled -100. The completion ends with the end token; where ``max_length``
    cuts it, the end token is missing, which is how the loss knows. A long prompt keeps its last
    ``max_length // 2`` tokens, so that there is always a completion.
    """
    prompt = tokenizer.encode(pair.prompt)[-(max_length // 2) :]
    completion = [*tokenizer.encode(pair.completion), tokenizer.eos_token_id]
    ids = (prompt + completion)[:max_length]
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]}


def packed(tokenizer: PreTrainedTokenizerFast, pairs: Iterable[Pair], length: int) -> list[Row]:
    """Join whole documents into rows of ``length`` tokens, every one of them labelled."""
    texts = [pair.prompt + pair.completion for pair in pairs]
    stream = [
        token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]
    ]
    rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


def prompt_of(row: Row) -> list[int]:
    """Return the tokens that carry no label."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return [token for token, label in pairs if label == IGNORE_INDEX]
