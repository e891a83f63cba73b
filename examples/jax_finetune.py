"""Fine-tune a small language model in JAX, flax and optax: maximum likelihood against IQLearn.

    python examples/jax_finetune.py
    python examples/jax_finetune.py --data my.jsonl --lams 0 0.1 --gamma 0.9

Nothing is downloaded: the tokenizer and the model are made on the spot, and pre-trained for a
minute on the docstrings of Python's standard library. The model is then fine-tuned once for each
of --lams, from the same weights, on the same batches in the same order; lam = 0 is maximum
likelihood, with optax's loss. The run ends with a table, a figure and the numbers behind them, in
a folder of its own.
"""

import argparse
import functools
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import Sizes, parse, run_folder
from diversity import self_bleu
from flax import nnx
from jax_decoder import Decoder, decode
from report import Progress, write_report
from rich.console import Console
from run_record import Point, Run, Spread, spread
from text_data import IGNORE_INDEX, DataError, Row, Text, prepare

import irl_ops
import irl_ops.jax as irl
from irl_ops.algebra import IGNORED, NO_TD

Batch = Mapping[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


FULL = Sizes(4096, 128, 4, 300, 200, held_out=96, prompts=32, samples=4, max_new_tokens=128)
QUICK = Sizes(512, 32, 2, 4, 4, held_out=8, prompts=2, samples=3, max_new_tokens=8)
LAMS = (0.0, 0.1)
OUT = Path("runs/demo-jax")
MAX_LENGTH = 192  # tokens of a prompt with its completion; shorter ones are padded
START_LENGTH = 128  # tokens of a row of the pre-training
BATCH_SIZE = 8
EVALUATIONS = 10  # points of a learning curve, beside its start


def main() -> None:
    """Run the comparison that the command line asks for, in a folder of its own."""
    options, sizes = parse(__doc__, full=FULL, quick=QUICK, lams=LAMS, out=OUT)
    console = Console()
    with run_folder(options, console) as folder:
        compare(options, sizes, console, folder)


def compare(options: argparse.Namespace, sizes: Sizes, console: Console, folder: Path) -> None:
    """Pre-train one model, fine-tune it with each loss, measure, and write the report."""
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
            runs.append(fine_tune(lam, model, losses[-1], text, options, sizes, progress))
            if options.save_models:
                runs[-1].model = f"models/lam-{lam:g}"
                save(model, text, folder / runs[-1].model)

        progress.phase("timing the losses")
        logits = jax.jit(start.__call__)(batch["input_ids"])
        costs = cost(losses, logits, batch["labels"])
        for run, (milliseconds, megabytes) in zip(runs, costs, strict=True):
            run.loss_ms, run.loss_ms_quartiles = milliseconds
            run.loss_mb = megabytes

    reference_length, reference_cut = text.reference(sizes.max_new_tokens)
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
        "reference_length": reference_length,
        "reference_cut": reference_cut,
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
    write_report(console, folder, runs, facts)


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


def fine_tune(
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
    every, curve = max(1, sizes.steps // EVALUATIONS), []

    def watch(step: int) -> None:
        if step % every == 0 or step == sizes.steps:
            means = evaluate()
            curve.append(Point(step, means["nll"], means["td"]))

    watch(0)
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


def save(model: Decoder, text: Text, folder: Path) -> None:
    """Write the weights as ``model.npz``, named by their place in the model, and the tokenizer."""
    text.tokenizer.save_pretrained(folder)
    weights = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = {"/".join(map(str, path)): np.asarray(value[...]) for path, value in weights}
    np.savez(folder / "model.npz", **named)


def cost(
    losses: Sequence[Loss], logits: jax.Array, labels: jax.Array, repeats: int = 15
) -> list[tuple[Spread, float]]:
    """Milliseconds and megabytes of each loss with its gradient, beside the logits.

    The losses take turns, in an order drawn anew each time; the memory is what the compiler says:
    results and temporaries.
    """
    compiled = [
        jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile() for loss in losses
    ]
    times: list[list[float]] = [[] for _ in compiled]
    order = random.Random(0)
    for repeat in range(repeats + 2):
        turns = list(zip(compiled, times, strict=True))
        for run, series in order.sample(turns, len(turns)):
            began = time.perf_counter()
            jax.block_until_ready(run(logits, labels))
            if repeat >= 2:  # the first calls warm up
                series.append(1e3 * (time.perf_counter() - began))
    memory = (run.memory_analysis() for run in compiled)
    megabytes = [(m.temp_size_in_bytes + m.output_size_in_bytes) / 1e6 for m in memory]
    return list(zip(map(spread, times), megabytes, strict=True))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
