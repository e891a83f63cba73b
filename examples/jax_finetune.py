"""Fine-tune a small language model in JAX, flax and optax: maximum likelihood against IQLearn.

    python examples/jax_finetune.py
    python examples/jax_finetune.py --data my.jsonl --lams 0 0.1 --gamma 0.9

Nothing is downloaded: the tokenizer and the model are made on the spot, and pre-trained for a
minute on the docstrings of Python's standard library. The model is then fine-tuned once for each
of --lams, from the same weights, on the same batches in the same order; lam = 0 is maximum
likelihood, with optax's loss. The run ends with a table, a figure and the numbers in --out.
"""

import argparse
import functools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diversity import self_bleu
from flax import nnx
from jax_decoder import Decoder, decode
from report import Progress, Run, write_report
from rich.console import Console
from text_data import ACCEPTED, IGNORE_INDEX, DataError, Row, Text, prepare

import irl_ops
import irl_ops.jax as irl
from irl_ops.algebra import IGNORED, NO_TD

Batch = Mapping[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Sizes(NamedTuple):
    """How much is done."""

    vocab_size: int
    hidden_size: int
    layers: int
    start_steps: int  # of the pre-training
    steps: int  # of each fine-tuning run
    held_out: int  # pairs, at most
    prompts: int  # of the held-out pairs, to sample from
    samples: int  # of each prompt
    max_new_tokens: int


FULL = Sizes(4096, 128, 4, 300, 200, held_out=96, prompts=32, samples=4, max_new_tokens=128)
QUICK = Sizes(512, 32, 2, 4, 4, held_out=8, prompts=2, samples=3, max_new_tokens=8)
MAX_LENGTH = 192  # tokens of a prompt with its completion; shorter ones are padded
START_LENGTH = 128  # tokens of a row of the pre-training
BATCH_SIZE = 8
EVALUATIONS = 10  # points of a learning curve, beside its start


def main() -> None:
    """Run the comparison that the command line asks for."""
    options, sizes = parse_options()
    console = Console()
    began = time.perf_counter()

    console.print("reading text, training a tokenizer")
    text = prepare(
        options.data,
        seed=options.seed,
        held_out=sizes.held_out,
        vocab_size=sizes.vocab_size,
        max_length=MAX_LENGTH,
    )
    vocab_size = len(text.tokenizer)
    make = functools.partial(Decoder, vocab_size, sizes.hidden_size, sizes.layers)
    with Progress(console, sizes.start_steps + len(options.lams) * sizes.steps) as progress:
        progress.phase("pre-training")
        start = make(rngs=nnx.Rngs(options.seed))
        batches = padded(text.start, text, START_LENGTH, options.seed)
        train(start, mle, batches, sizes.start_steps, 3e-3, progress)

        losses, runs = [], []
        batch = next(padded(text.train, text, MAX_LENGTH, options.seed))
        for lam in options.lams:
            progress.phase(f"fine-tuning, lam = {lam:g}")
            model = nnx.clone(start)
            losses.append(loss_of(lam, options.gamma, text.tokenizer.eos_token_id))
            runs.append(compare(lam, model, losses[-1], text, options, sizes, progress))

        progress.phase("timing the losses")
        logits = jax.jit(start.__call__)(batch["input_ids"])
        for run, measured in zip(runs, cost(losses, logits, batch["labels"]), strict=True):
            run.loss_ms, run.loss_mb = measured

    facts = {
        "data": str(options.data or "topics of pydoc"),
        "seed": options.seed,
        "gamma": options.gamma,
        "mle": "optax",
        "batch_size": BATCH_SIZE,
        **sizes._asdict(),
        "vocab_size": vocab_size,
        "train_pairs": len(text.train),
        "held_out": len(text.held_out),
        "prompts": len(text.prompts(sizes.prompts)),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(start, nnx.Param))),
        "reference_length": text.reference_length(),
        "loss_rows": batch["labels"].size,
        "device": jax.default_backend(),
        "threads": os.cpu_count(),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "irl_ops": irl_ops.__version__,
            **{name: version(name) for name in ("jax", "flax", "optax", "tokenizers")},
        },
    }
    write_report(console, options.out, runs, facts)


def parse_options() -> tuple[argparse.Namespace, Sizes]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=ACCEPTED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="text to fine-tune on; default: pydoc's topics")
    add("--lams", type=float, nargs="+", default=[0.0, 0.1], metavar="LAM")
    add("--gamma", type=float, default=1.0, help="discount of the next value; default: 1")
    add("--steps", type=int, help=f"of each fine-tuning run; default: {FULL.steps}")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/demo-jax"), metavar="FOLDER")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that it runs")
    options = parser.parse_args()
    if not all(0 <= lam < math.inf for lam in options.lams):
        parser.error(f"--lams: {options.lams} given, finite numbers from 0 up are accepted")
    if len(set(options.lams)) < len(options.lams):
        parser.error(f"--lams: {options.lams} given, distinct numbers are accepted")
    if not 0 <= options.gamma <= 1:
        parser.error(f"--gamma: {options.gamma} given, a number from 0 to 1 is accepted")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: {options.steps} given, a number from 1 up is accepted")
    sizes = QUICK if options.quick else FULL
    return options, sizes._replace(steps=options.steps or sizes.steps)


def mle(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Maximum likelihood as optax has it: shifted, masked, averaged by hand."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    labelled = labels != IGNORE_INDEX
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(labelled, labels, 0))
    return jnp.sum(nll, where=labelled) / jnp.sum(labelled)


def loss_of(lam: float, gamma: float, eos_token_id: int) -> Loss:
    """The loss of one run."""
    if lam == 0:
        return mle
    # The one line that makes it IQLearn.
    return functools.partial(
        irl.iqlearn_loss, lam=lam, gamma=gamma, eos_token_id=eos_token_id, shift=True
    )


def padded(rows: Sequence[Row], text: Text, length: int, seed: int) -> Iterator[Batch]:
    """Batches of ``length`` tokens without end, in an order that the seed fixes."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for i in range(0, len(rows) - BATCH_SIZE + 1, BATCH_SIZE):
            yield collate([rows[k] for k in order[i : i + BATCH_SIZE]], text, length)


def collate(rows: Sequence[Row], text: Text, length: int) -> Batch:
    """Pad the inputs with the padding token and the labels with -100."""
    fill = {"input_ids": text.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    return {
        name: jnp.array([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def train(
    model: Decoder,
    loss: Loss,
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    progress: Progress,
    watch: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train a model; returns the milliseconds of each step."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, max(1, steps // 20), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Decoder, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
        value, gradient = nnx.value_and_grad(
            lambda model: loss(model(batch["input_ids"]), batch["labels"])
        )(model)
        optimizer.update(model, gradient)
        return value

    milliseconds = []
    for number in range(1, steps + 1):
        batch = next(batches)
        began = time.perf_counter()
        step(model, optimizer, batch).block_until_ready()
        milliseconds.append(1e3 * (time.perf_counter() - began))
        progress.advance()
        watch(number)
    return milliseconds


def compare(
    lam: float,
    model: Decoder,
    loss: Loss,
    text: Text,
    options: argparse.Namespace,
    sizes: Sizes,
    progress: Progress,
) -> Run:
    """Fine-tune with one loss, and measure what came of it."""
    batches = [
        collate(text.held_out[i : i + BATCH_SIZE], text, MAX_LENGTH)
        for i in range(0, len(text.held_out) - BATCH_SIZE + 1, BATCH_SIZE)
    ]
    evaluate = functools.partial(
        held_out,
        model,
        batches,
        gamma=options.gamma,
        eos_token_id=text.tokenizer.eos_token_id,
    )
    every, curve = max(1, sizes.steps // EVALUATIONS), [(0, evaluate()["nll"])]

    def watch(step: int) -> None:
        if step % every == 0 or step == sizes.steps:
            curve.append((step, evaluate()["nll"]))

    rows = padded(text.train, text, MAX_LENGTH, options.seed)
    step_ms = train(model, loss, rows, sizes.steps, 1e-3, progress, watch)
    progress.phase(f"sampling, lam = {lam:g}")
    prompts = text.prompts(sizes.prompts)
    groups = sample(model, text, prompts, sizes, options.seed)
    lengths = [len(tokens) for group in groups for tokens in group]
    texts = [text.tokenizer.batch_decode(group) for group in groups]
    return Run(
        lam=lam,
        curve=curve,
        **evaluate(),
        self_bleu=self_bleu(texts),
        length=statistics.mean(lengths),
        unfinished=statistics.mean(length == sizes.max_new_tokens for length in lengths),
        step_ms=statistics.median(step_ms),
        samples=dict(zip(text.tokenizer.batch_decode(prompts), texts, strict=True)),
    )


def held_out(
    model: Decoder, batches: Sequence[Batch], *, gamma: float, eos_token_id: int
) -> dict[str, float]:
    """Average the token statistics of held-out completions: ``nll``, ``entropy``, ``td``."""

    @nnx.jit
    def sums(model: Decoder, batch: Batch) -> dict[str, jax.Array]:
        stats = irl.token_stats(
            model(batch["input_ids"]),
            batch["labels"],
            shift=True,
            gamma=gamma,
            eos_token_id=eos_token_id,
        )
        labelled = stats.kind != IGNORED
        has_td = labelled & (stats.kind != NO_TD)
        return {
            "nll": -jnp.sum(stats.logprob, where=labelled),
            "entropy": jnp.sum(stats.entropy, where=labelled),
            "labelled": jnp.sum(labelled),
            "td": jnp.sum(stats.reward**2, where=has_td),
            "has_td": jnp.sum(has_td),
        }

    total = jax.tree.map(lambda *x: float(sum(x)), *(sums(model, batch) for batch in batches))
    counts = {"nll": "labelled", "entropy": "labelled", "td": "has_td"}
    return {name: total[name] / total[count] for name, count in counts.items()}


def sample(
    model: Decoder, text: Text, prompts: list[list[int]], sizes: Sizes, seed: int
) -> list[list[list[int]]]:
    """Draw completions of each prompt at temperature 1, without their end tokens."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), text.tokenizer.pad_token_id)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = prompt  # left-padded, so that all go on from one place
    starts = np.array([longest - len(prompt) for prompt in prompts])
    out = decode(
        model,
        jnp.repeat(ids, sizes.samples, axis=0),
        jnp.repeat(starts, sizes.samples),
        sizes.max_new_tokens,
        text.tokenizer.eos_token_id,
        jax.random.key(seed),
    )
    rows = [
        [token for token in row if token != text.tokenizer.eos_token_id] for row in out.tolist()
    ]
    return [rows[i : i + sizes.samples] for i in range(0, len(rows), sizes.samples)]


def cost(
    losses: Sequence[Loss], logits: jax.Array, labels: jax.Array, repeats: int = 15
) -> list[tuple[float, float]]:
    """Milliseconds and megabytes of each loss with its gradient, beside the logits.

    The losses take turns; the memory is what the compiler says: results and temporaries.
    """
    compiled = [
        jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile() for loss in losses
    ]
    times: list[list[float]] = [[] for _ in compiled]
    for repeat in range(repeats + 2):
        for run, series in zip(compiled, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(run(logits, labels))
            if repeat >= 2:  # the first calls warm up
                series.append(1e3 * (time.perf_counter() - began))
    memory = (run.memory_analysis() for run in compiled)
    megabytes = [(m.temp_size_in_bytes + m.output_size_in_bytes) / 1e6 for m in memory]
    return list(zip(map(statistics.median, times), megabytes, strict=True))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
