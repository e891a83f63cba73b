"""The loss as torchtune 0.6.1's recipes call it; ``step`` repeats their lines.

torchtune is not installed here.
"""

import copy

import pytest
import torch

from irl_ops.integrations.torchtune import IQLearnLoss

from .tiny_transformers import (
    OPTIONS,
    assert_one_step,
    collate,
    examples,
    llama,
    parameters,
    reference_gradients,
)

LENGTHS = (5, 9, 3, 7, 4, 8)


def loss_step(model, loss_fn, batch):
    """``_loss_step`` of full_finetune_single_device.py."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    ignored = torch.full((labels.shape[0], 1), loss_fn.ignore_index)
    labels = torch.hstack((labels[..., 1:], ignored))
    if not isinstance(logits, list):
        labels = labels.reshape(-1)
        logits = logits.reshape(-1, logits.size(-1))
    return loss_fn(logits, labels)


def step(model, loss_fn, batches, lr=0.1):
    """``train`` of the same: accumulated, divided by the tokens, one update."""
    num_tokens = 0
    for batch in map(dict, batches):
        current = (batch["labels"] != loss_fn.ignore_index).sum()
        num_tokens += current
        (loss_step(model, loss_fn, batch) * current).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad / num_tokens


def packed(rows):
    """As ``PackedDataset``, with positions for the model alone; prompts are masked."""
    ids, labels, positions = [], [], []
    for row in rows:
        ids += row["input_ids"]
        labels += row["labels"]
        positions += range(len(row["input_ids"]))
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([x]) for name, x in batch.items()}


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_is_float64_autograd_of_the_separate_documents(packing):
    model = llama()
    data = examples(model, LENGTHS)
    gradients = reference_gradients(model, [collate([row]) for row in data])
    before = parameters(model)
    make = packed if packing else collate
    step(model, IQLearnLoss(**OPTIONS), [make(data[:2]), make(data[2:5]), make(data[5:])])
    assert_one_step(model, before, gradients)


def test_ignore_index_is_what_recipes_read():
    assert IQLearnLoss().ignore_index == -100
    assert IQLearnLoss(ignore_index=-1).ignore_index == -1


def test_what_is_refused():
    loss_fn = IQLearnLoss(**OPTIONS)
    logits, labels = torch.zeros(6, 41), torch.arange(6)
    with pytest.raises(TypeError, match="logits=list of 2 chunks: at each cut the next row is"):
        loss_fn([logits[None, :3], logits[None, 3:]], labels)
    with pytest.raises(ValueError, match=r"labels\[-1\]=5: recipes of torchtune shift labels"):
        loss_fn(logits, labels)
    assert copy.deepcopy(loss_fn)(logits, labels) > 0  # it looks once
    with pytest.raises(TypeError, match="no option 'shift', which torchtune decides"):
        IQLearnLoss(shift=True)
    with pytest.raises(ValueError, match="lam"):
        IQLearnLoss(lam=-1.0)
