"""What the demo measures: held-out statistics, samples, the cost of a loss."""

import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from run_record import Spread, spread
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

import irl_ops.torch as irl
from irl_ops.algebra import IGNORED, NO_TD
from irl_ops.integrations.transformers.fused import input_of
from irl_ops.integrations.transformers.value_head import values_of

Batch = Mapping[str, torch.Tensor]


@torch.no_grad()
def held_out(
    model: PreTrainedModel, batches: Sequence[Batch], *, gamma: float, eos_token_id: int
) -> dict[str, float]:
    """Average the token statistics of held-out completions.

    Returns:
        ``nll`` and ``entropy``, means over the completions' tokens, and ``td``, the mean squared
        TD residual. ``eos_token_id`` tells a finished completion from one that was cut.
    """
    model.eval()
    nll, entropy, td = [], [], []
    for batch in batches:
        labels = batch["labels"].to(model.device)
        with input_of(model.get_output_embeddings()) as hidden:  # type: ignore[no-untyped-call]
            logits = model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
            ).logits
        values = values_of(model, hidden[0])  # None without a value head
        stats = irl.token_stats(
            logits, labels, shift=True, gamma=gamma, eos_token_id=eos_token_id, values=values
        )
        assert stats.entropy is not None  # it was not turned off
        labelled = stats.kind != IGNORED
        nll.append(-stats.logprob[labelled])
        entropy.append(stats.entropy[labelled])
        td.append(stats.reward[labelled & (stats.kind != NO_TD)].square())
    means = {"nll": nll, "entropy": entropy, "td": td}
    return {name: torch.cat(values).mean().item() for name, values in means.items()}


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> list[list[list[int]]]:
    """Draw ``samples`` completions of each prompt at temperature 1, without their end tokens."""
    model.eval()
    set_seed(seed)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(  # type: ignore[operator]
        **batch.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, batch["input_ids"].shape[1] :]
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    texts = [[token for token in row if token not in special] for row in ids.tolist()]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def loss_milliseconds(
    models: Sequence[PreTrainedModel], batch: Batch, repeats: int = 25
) -> list[Spread]:
    """Time each model's own loss, forward and backward, on the same logits, in milliseconds.

    The models take turns, in an order drawn anew each time: a disturbance of the machine meets them
    all, and so does what another loss leaves in the caches.
    """
    logits, labels = logits_of(models[0], batch)
    times: list[list[float]] = [[] for _ in models]
    order = random.Random(0)
    for repeat in range(repeats + 2):
        turns = list(zip(models, times, strict=True))
        for model, series in order.sample(turns, len(turns)):
            synchronize(model)
            start = time.perf_counter()
            loss_and_gradient(model, logits, labels)
            synchronize(model)
            if repeat >= 2:  # the first calls warm up
                series.append(1e3 * (time.perf_counter() - start))
    return [spread(series) for series in times]


def loss_megabytes(model: PreTrainedModel, batch: Batch) -> float:
    """Measure the most memory that the loss and its gradient hold at once, beside the logits."""
    logits, labels = logits_of(model, batch)
    if logits.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradient(model, logits, labels)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return held_megabytes(lambda: loss_and_gradient(model, logits, labels))


def held_megabytes(call: Callable[[], Any]) -> float:
    """Measure the most memory that a call on a CPU holds at once.

    From torch's own allocation events: the resident size of the process says little, as freed
    memory is kept for reuse.
    """
    with (
        silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = peak = 0
    for event in memory:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 1e6


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send what C++ code writes to file descriptor 2 nowhere; the profiler greets there."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def logits_of(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the labels of a batch, cut off from the model."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits.requires_grad_(), labels


def loss_and_gradient(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor) -> Any:
    """Call the loss that the model would call, and differentiate it with respect to the logits."""
    if getattr(model, "value_head", None) is not None:
        values = logits.new_zeros(labels.shape, dtype=torch.float32).requires_grad_()
        loss = model.loss_function.compute(logits, labels, None, shift=True, values=values)
    else:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    return torch.autograd.grad(loss, logits)


def synchronize(model: PreTrainedModel) -> None:
    """Wait for the GPU, where there is one."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
