"""GRPO with TRL on a tiny model made on the spot: TRL's log-probabilities, and those of irl_ops.

    python examples/grpo_trl.py

Both runs start from the same weights and draw with the same seeds. Printed are the losses of each
step, how far apart the weights are in the end, and the memory that the log-probabilities and
entropies of a batch take with their gradients, on a CPU. Needs irl_ops[trl] and rich.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from measure import held_megabytes
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from irl_ops.integrations.rl import trl as irl_trl

TEMPERATURE = 0.7


class Run(NamedTuple):
    """What a run leaves."""

    losses: list[float]
    rewards: list[float | None]  # None where a batch is used again
    weights: list[torch.Tensor]


@contextlib.contextmanager
def put_in_place() -> Iterator[None]:
    """The function that TRL's fused head calls is that of irl_ops, for as long as it lasts."""
    original = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = irl_trl.ChunkedLogProbFunction
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... and three special tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model(vocab: int) -> LlamaForCausalLM:
    """One layer with random weights, the same ones each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **heads, **tokens))


def even_words(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of words with an even number."""
    numbers = [[int(word[1:]) for word in text.split() if word[0] == "w"] for text in completions]
    return [sum(n % 2 == 0 for n in row) / max(1, len(row)) for row in numbers]


def train(steps: int, vocab: int) -> Run:
    """Train with GRPO, each batch twice, so that ratios differ from 1; and keep near the start."""
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start"  # on disk, from where TRL takes the reference model too
        model(vocab).save_pretrained(start)
        config = GRPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "float32"},
            max_steps=steps,
            per_device_train_batch_size=4,
            num_generations=4,
            num_iterations=2,
            max_completion_length=12,
            temperature=TEMPERATURE,
            beta=0.1,
            learning_rate=0.01,
            bf16=False,
            use_cpu=True,
            seed=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        prompts = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(3, 19)])
        trainer = GRPOTrainer(
            start, even_words, config, train_dataset=prompts, processing_class=tokenizer(vocab)
        )
        with contextlib.redirect_stdout(None):
            trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Run(
        [log["loss"] for log in logs],
        [log.get("reward") for log in logs],
        [x.detach().clone() for x in trainer.model.parameters()],
    )


def head(rows: int, vocab: int, width: int = 64) -> Callable[[], None]:
    """The log-probabilities and entropies of a batch, and the gradients of both."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (rows,))

    def call() -> None:
        logprobs, entropy, *_ = trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, TEMPERATURE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            None, 1.0, ("log_probs", "entropy"),
        )  # fmt: skip
        torch.autograd.grad((logprobs - 0.01 * entropy).mean(), (hidden, weight))

    return call


def main() -> None:
    """Run both, and print what they have in common and what not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=512, help="of the model; default: 512")
    parser.add_argument("--rows", type=int, default=1024, help="of the batch that is measured")
    parser.add_argument("--wide", type=int, default=32768, help="the vocabulary that is measured")
    args = parser.parse_args()
    disable_progress_bar()

    theirs, megabytes = train(args.steps, args.vocab), held_megabytes(head(args.rows, args.wide))
    with put_in_place():
        ours, fewer = train(args.steps, args.vocab), held_megabytes(head(args.rows, args.wide))

    table = Table("step", "reward", "loss: TRL", "loss: irl_ops")
    for step, row in enumerate(zip(theirs.rewards, theirs.losses, ours.losses, strict=True), 1):
        table.add_row(str(step), *("" if x is None else f"{x:.6f}" for x in row))
    console = Console(width=100)
    console.print(table)
    gap = max((x - y).abs().max().item() for x, y in zip(theirs.weights, ours.weights, strict=True))
    console.print(f"largest difference of a weight: {gap:.1e}")
    stored = 4 * args.rows * args.wide / 1e6
    console.print(
        f"log-probabilities, entropies and their gradients at [{args.rows}, {args.wide}]:\n"
        f"TRL {megabytes:.0f} MB, irl_ops {fewer:.0f} MB; the logits alone would be {stored:.0f} MB"
    )


if __name__ == "__main__":
    main()
