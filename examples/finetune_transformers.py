"""Fine-tune a small Llama with the Hugging Face Trainer: maximum likelihood against IQLearn.

    python examples/finetune_transformers.py
    python examples/finetune_transformers.py --data my.jsonl --lams 0 0.1 --gamma 0.9

Nothing is downloaded: the tokenizer and the model are made on the spot, and pre-trained for a
minute on the docstrings of Python's standard library. The model is then fine-tuned once for each
of ``--lams``, from the same weights, on the same batches in the same order; lam = 0 is maximum
likelihood. The run ends with a table, a figure and the numbers behind them in ``--out``.
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import held_out, loss_megabytes, loss_milliseconds, sample, self_bleu
from report import Progress, Run, write_report
from rich.console import Console
from text_data import (
    DataError,
    Row,
    docstring_pairs,
    encode,
    load_pairs,
    packed,
    prompt_of,
    train_tokenizer,
)
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import irl_ops
from irl_ops.integrations.transformers import apply_iqlearn


class Sizes(NamedTuple):
    """How much is done."""

    vocab_size: int
    hidden_size: int
    start_steps: int  # of the pre-training
    steps: int  # of each fine-tuning run
    held_out: int  # completions
    prompts: int  # to sample from
    samples: int  # of each prompt
    max_new_tokens: int


FULL = Sizes(4096, 128, 300, 150, held_out=96, prompts=32, samples=4, max_new_tokens=128)
QUICK = Sizes(512, 32, 4, 4, held_out=8, prompts=2, samples=3, max_new_tokens=8)
MAX_LENGTH = 192  # tokens of a prompt with its completion
BATCH_SIZE = 16
EVALUATIONS = 10  # of the held-out NLL, along a run


def main() -> None:
    """Run the comparison that the command line asks for."""
    options = parse_options()
    sizes = QUICK if options.quick else FULL
    steps = options.steps or sizes.steps
    console = Console()
    logging.set_verbosity_error()
    set_seed(options.seed)
    began = time.perf_counter()

    # Text. The tokenizer does not see the held-out pairs either.
    console.print("reading text, training a tokenizer")
    pairs = load_pairs(options.data, options.seed)
    train_pairs, held_out_pairs = pairs[: -sizes.held_out], pairs[-sizes.held_out :]
    start_pairs = docstring_pairs(options.seed)
    tokenizer = train_tokenizer(start_pairs + train_pairs, sizes.vocab_size)
    start_rows = packed(tokenizer, start_pairs, length=128)
    train_rows = [encode(tokenizer, p, MAX_LENGTH) for p in train_pairs]
    held_out_rows = [encode(tokenizer, p, MAX_LENGTH) for p in held_out_pairs]
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
    prompts = [prompt_of(row) for row in held_out_rows[: sizes.prompts]]

    def evaluate(model: LlamaForCausalLM) -> dict[str, float]:
        batches = [collate(held_out_rows[i : i + 16]) for i in range(0, len(held_out_rows), 16)]
        return held_out(model, batches, gamma=options.gamma, eos_token_id=tokenizer.eos_token_id)

    # Training: the common starting point, then one run for each lam.
    models: list[LlamaForCausalLM] = []
    runs: list[Run] = []
    written: list[dict[str, Any]] = []
    with Progress(console, sizes.start_steps + len(options.lams) * steps) as progress:
        progress.phase("pre-training")
        start = small_llama(tokenizer, sizes.hidden_size)
        train(start, start_rows, collate, options, sizes.start_steps, 3e-3, Watch(progress))

        for lam in options.lams:
            progress.phase(f"fine-tuning, lam = {lam:g}")
            model = copy.deepcopy(start)
            if lam > 0:
                # The one line that makes it IQLearn; without it this is maximum likelihood.
                model = apply_iqlearn(
                    model, lam=lam, gamma=options.gamma, eos_token_id=tokenizer.eos_token_id
                )
            watch = Watch(progress, evaluate, every=max(1, steps // EVALUATIONS))
            train(model, train_rows, collate, options, steps, 1e-3, watch)
            models.append(model)

            progress.phase(f"sampling, lam = {lam:g}")
            groups = sample(
                model,
                tokenizer,
                prompts,
                samples=sizes.samples,
                max_new_tokens=sizes.max_new_tokens,
                seed=options.seed,
            )
            texts = [tokenizer.batch_decode(group) for group in groups]
            lengths = [len(ids) for group in groups for ids in group]
            run = Run(
                lam=lam,
                curve=watch.curve,
                **evaluate(model),
                self_bleu=self_bleu(texts),
                length=statistics.mean(lengths),
                unfinished=statistics.mean(n == sizes.max_new_tokens for n in lengths),
                step_ms=statistics.median(watch.step_ms),
            )
            runs.append(run)
            written += [
                {"run": run.name, "prompt": tokenizer.decode(prompt), "samples": group}
                for prompt, group in zip(prompts, texts, strict=True)
            ]

        progress.phase("timing the losses")
        batch = dict(collate(train_rows[:BATCH_SIZE]))
        for run, model, ms in zip(runs, models, loss_milliseconds(models, batch), strict=True):
            run.loss_ms, run.loss_mb = ms, loss_megabytes(model, batch)

    facts = {
        "data": str(options.data or "pydoc topics"),
        "seed": options.seed,
        "gamma": options.gamma,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "train_pairs": len(train_pairs),
        "held_out_pairs": len(held_out_pairs),
        "parameters": start.num_parameters(),
        "prompts": sizes.prompts,
        "samples": sizes.samples,
        "max_new_tokens": sizes.max_new_tokens,
        "reference_length": statistics.mean(
            len(row["input_ids"]) - len(prompt_of(row)) - 1 for row in held_out_rows
        ),
        "loss_rows": batch["labels"].numel(),
        "vocab_size": len(tokenizer),
        "seconds": round(time.perf_counter() - began, 1),
        "device": start.device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"irl_ops": irl_ops.__version__},
    }
    write_report(console, options.out, runs, facts, written)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="a .txt or .jsonl file; default: pydoc's topics")
    add("--lams", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.5], metavar="LAM")
    add("--gamma", type=float, default=1.0, help="discount of the next value; default: 1")
    add("--steps", type=int, help=f"of each fine-tuning run; default: {FULL.steps}")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that it runs")
    options = parser.parse_args()
    if any(not 0 <= lam < float("inf") for lam in options.lams):
        parser.error(f"--lams: {options.lams} given, finite numbers from 0 up are accepted")
    if len(set(options.lams)) < len(options.lams):
        parser.error(f"--lams: {options.lams} given, each may appear once")
    if not 0 <= options.gamma <= 1:
        parser.error(f"--gamma: {options.gamma} given, a number from 0 to 1 is accepted")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps} given, a number from 1 up is accepted")
    return options


def small_llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> LlamaForCausalLM:
    """Make a Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2 * MAX_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    rows: list[Row],
    collate: DataCollatorForSeq2Seq,
    options: argparse.Namespace,
    steps: int,
    learning_rate: float,
    watch: "Watch",
) -> None:
    """Train with the Trainer; whatever loss the model carries."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            seed=options.seed,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class Watch(TrainerCallback):
    """Advance the bar, time the steps, and evaluate every few of them."""

    def __init__(
        self,
        progress: Progress,
        evaluate: Callable[[LlamaForCausalLM], dict[str, float]] | None = None,
        every: int = 1,
    ) -> None:
        self.progress, self.evaluate, self.every = progress, evaluate, every
        self.curve: list[tuple[int, float]] = []
        self.step_ms: list[float] = []
        self.began = 0.0

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        """Evaluate the starting point."""
        self.point(0, model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        """Stop the clock; evaluate when it is time."""
        self.step_ms.append(1e3 * (time.perf_counter() - self.began))
        self.progress.advance()
        if state.global_step % self.every == 0:
            self.point(state.global_step, model)

    def point(self, step: int, model: LlamaForCausalLM) -> None:
        """Add a point to the learning curve."""
        if self.evaluate:
            self.curve.append((step, self.evaluate(model)["nll"]))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
