"""Fine-tune a small Llama with the Hugging Face Trainer: maximum likelihood against IQLearn.

    python examples/finetune_transformers.py
    python examples/finetune_transformers.py --data my.jsonl --lams 0 0.1 --gamma 0.9

Nothing is downloaded: the tokenizer and the model are made on the spot, and pre-trained for a
minute on the docstrings of Python's standard library. The model is then fine-tuned once for each
of --lams, from the same weights, on the same batches in the same order; lam = 0 is maximum
likelihood. Those of --head-lams have a head of its own for the values, which are otherwise read off
the logits. The run ends with a table, a figure and the numbers behind them, in a folder of its own.
"""

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_line import Sizes, parse, run_folder
from diversity import self_bleu
from measure import held_out, loss_megabytes, loss_milliseconds, sample
from report import Progress, write_report
from rich.console import Console
from run_record import Point, Run
from text_data import DataError, Row, Text, prepare
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import irl_ops
from irl_ops.integrations.transformers import apply_iqlearn

FULL = Sizes(4096, 128, 4, 600, 200, held_out=96, prompts=32, samples=4, max_new_tokens=128)
QUICK = Sizes(512, 32, 4, 4, 4, held_out=8, prompts=2, samples=3, max_new_tokens=8)
LAMS = (0.0, 0.05, 0.1, 0.5)
HEAD_LAMS = (0.1,)
OUT = Path("runs/demo")
MAX_LENGTH = 192  # tokens of a prompt with its completion
BATCH_SIZE = 8  # small, since a short training needs many steps more than large ones
EVALUATIONS = 10  # points of a learning curve, beside its start


def main() -> None:
    """Run the comparison that the command line asks for, in a folder of its own."""
    options, sizes = parse(__doc__, full=FULL, quick=QUICK, lams=LAMS, out=OUT, head_lams=HEAD_LAMS)
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with run_folder(options, console) as folder:
        compare(options, sizes, console, folder)


def compare(options: argparse.Namespace, sizes: Sizes, console: Console, folder: Path) -> None:
    """Pre-train one model, fine-tune it with each loss, measure, and write the report."""
    set_seed(options.seed)
    began = time.perf_counter()

    console.print("reading text, training a tokenizer")
    text = prepare(
        options.data,
        seed=options.seed,
        held_out=sizes.held_out,
        vocab_size=sizes.vocab_size,
        max_length=MAX_LENGTH,
    )
    losses = [(lam, False) for lam in options.lams] + [(lam, True) for lam in options.head_lams]
    with Progress(console, sizes.start_steps + len(losses) * sizes.steps) as progress:
        progress.phase("pre-training")
        start = small_llama(text.tokenizer, sizes)
        train(start, text.start, text, options.seed, sizes.start_steps, 3e-3, Watch(progress))

        models, runs = [], []
        for lam, head in losses:
            name = f"lam = {lam:g}" + (" with a value head" if head else "")
            progress.phase(f"fine-tuning, {name}")
            model = copy.deepcopy(start)
            if lam > 0:
                # The one line that makes it IQLearn. Without it this is maximum likelihood.
                model = apply_iqlearn(
                    model,
                    lam=lam,
                    gamma=options.gamma,
                    value_head=head,
                    eos_token_id=text.tokenizer.eos_token_id,
                )
            watch = Watch(progress, lambda m: evaluate(m, text, options), sizes.steps)
            train(model, text.train, text, options.seed, sizes.steps, 1e-3, watch)

            progress.phase(f"sampling, {name}")
            models.append(model)
            runs.append(measured(lam, head, model, watch, text, options, sizes))

        progress.phase("timing the losses")
        batch = collator(text)(text.train[:BATCH_SIZE])
        times = loss_milliseconds(models, batch)
        for run, model, milliseconds in zip(runs, models, times, strict=True):
            run.loss_ms, run.loss_ms_quartiles = milliseconds
            run.loss_mb = loss_megabytes(model, batch)

    if options.save_models:
        for run, model in zip(runs, models, strict=True):
            run.model = f"models/lam-{run.lam:g}" + ("-head" if run.value_head else "")
            model.save_pretrained(folder / run.model)
            text.tokenizer.save_pretrained(folder / run.model)
    reference_length, reference_cut = text.reference(sizes.max_new_tokens)
    facts = {
        "data": str(options.data or "topics of pydoc"),
        "seed": options.seed,
        "gamma": options.gamma,
        "mle": "Transformers",
        "batch_size": BATCH_SIZE,
        **sizes._asdict(),
        "vocab_size": start.config.vocab_size,
        "train_pairs": len(text.train),
        "held_out": len(text.held_out),
        "prompts": len(text.prompts(sizes.prompts)),
        "parameters": start.num_parameters(),
        "reference_length": reference_length,
        "reference_cut": reference_cut,
        "loss_rows": batch["labels"].numel(),
        "device": start.device.type,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "irl_ops": irl_ops.__version__,
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }
    write_report(console, folder, runs, facts)


def small_llama(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> LlamaForCausalLM:
    """Make a Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            intermediate_size=3 * sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            max_position_embeddings=2 * MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.06,  # with the default, 0.02, a narrow model starts slowly
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    rows: list[Row],
    text: Text,
    seed: int,
    steps: int,
    learning_rate: float,
    watch: "Watch",
) -> None:
    """Train a model with the loss that it carries. The seed fixes the order of the rows."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.gettempdir(),  # it is asked for, and nothing is written there
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            seed=seed,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=collator(text),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def collator(text: Text) -> DataCollatorForSeq2Seq:
    """Pad the inputs with the padding token and the labels with -100."""
    return DataCollatorForSeq2Seq(text.tokenizer)


def evaluate(model: LlamaForCausalLM, text: Text, options: argparse.Namespace) -> dict[str, float]:
    """Measure a model on the held-out pairs."""
    rows, collate = text.held_out, collator(text)
    batches = [collate(rows[i : i + BATCH_SIZE]) for i in range(0, len(rows), BATCH_SIZE)]
    return held_out(model, batches, gamma=options.gamma, eos_token_id=text.tokenizer.eos_token_id)


class Watch(TrainerCallback):
    """Advance the bar, time the steps, and evaluate along the way."""

    def __init__(
        self,
        progress: Progress,
        evaluate: Callable[[LlamaForCausalLM], dict[str, float]] | None = None,
        steps: int = 0,
    ) -> None:
        self.progress = progress
        self.evaluate = evaluate
        self.every = max(1, steps // EVALUATIONS)
        self.curve: list[Point] = []
        self.step_ms: list[float] = []
        self.step_began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the starting point."""
        self.add_point(0, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock; evaluate when it is time."""
        self.step_ms.append(1e3 * (time.perf_counter() - self.step_began))
        self.progress.advance()
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.add_point(state.global_step, kwargs["model"])

    def add_point(self, step: int, model: LlamaForCausalLM) -> None:
        """Add a point to the learning curves, if they are drawn."""
        if self.evaluate:
            means = self.evaluate(model)
            self.curve.append(Point(step, means["nll"], means["td"]))


def measured(
    lam: float,
    head: bool,
    model: LlamaForCausalLM,
    watch: Watch,
    text: Text,
    options: argparse.Namespace,
    sizes: Sizes,
) -> Run:
    """Sample from a fine-tuned model, and put everything known about the run together."""
    prompts = text.prompts(sizes.prompts)
    groups = sample(
        model,
        text.tokenizer,
        prompts,
        samples=sizes.samples,
        max_new_tokens=sizes.max_new_tokens,
        seed=options.seed,
    )
    lengths = [len(tokens) for group in groups for tokens in group]
    texts = [text.tokenizer.batch_decode(group) for group in groups]
    return Run(
        lam=lam,
        value_head=head,
        curve=watch.curve,
        **evaluate(model, text, options),
        self_bleu=self_bleu(texts),
        length=statistics.mean(lengths),
        unfinished=statistics.mean(length == sizes.max_new_tokens for length in lengths),
        step_ms=statistics.median(watch.step_ms),
        samples=dict(zip(text.tokenizer.batch_decode(prompts), texts, strict=True)),
    )


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
