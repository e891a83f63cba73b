"""Documents in the conventions of the JAX trainers, a model of two matrices, and the reference.

The reference: float64 autograd of the naive loss on the separate documents, in torch.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from .. import naive

V, D, END, LR = 23, 8, 2, 0.1
OPTIONS = {"lam": 0.3, "gamma": 0.9, "eos_token_id": END}
LENGTHS = (5, 9, 3, 7, 4)
# float32 sums of some tens of terms
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@functools.cache
def documents():
    generator = np.random.default_rng(0)
    return [[*generator.integers(3, V, n).tolist(), END] for n in LENGTHS]


def weights():
    generator = np.random.default_rng(1)
    return generator.normal(size=(V, D)), generator.normal(size=(D, V))


def reference():
    """Loss and gradients by (embedding, head) on the documents one by one, float64 autograd."""
    embed, out = (torch.tensor(w, requires_grad=True) for w in weights())
    total, count = 0, 0
    for tokens in documents():
        ids = torch.tensor([tokens])
        logits = embed[ids[:, :-1]] @ out
        total = (
            total + naive.loss("iqlearn_loss", logits, ids[:, 1:], reduction="sum", **OPTIONS)[0]
        )
        count += len(tokens) - 1
    loss = total / count
    return loss.item(), [g.numpy() for g in torch.autograd.grad(loss, (embed, out))]


LOSS, GRADIENTS = reference()


def unshifted():
    """As Hugging Face has it: [B, T] tokens that are the labels, too, with a mark of documents."""
    rows = [documents()[:2], documents()[2:]]
    ids, segments = np.zeros((2, 20), np.int32), np.zeros((2, 20), np.int32)
    for b, row in enumerate(rows):
        flat = [(x, n + 1) for n, tokens in enumerate(row) for x in tokens]
        ids[b, : len(flat)], segments[b, : len(flat)] = zip(*flat, strict=True)
    labels = np.where(segments > 0, ids, -100)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def shifted():
    """Each document shifted by itself, as torchtitan has it."""
    rows = [documents()[:2], documents()[2:]]
    ids = np.zeros((2, 20), np.int32)
    labels, segments = np.full_like(ids, -100), np.zeros_like(ids)
    for b, row in enumerate(rows):
        flat = [
            (x, y, n + 1) for n, tokens in enumerate(row) for x, y in itertools.pairwise(tokens)
        ]
        n = len(flat)
        ids[b, :n], labels[b, :n], segments[b, :n] = zip(*flat, strict=True)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def packed():
    """As MaxText has it: documents are packed, then the targets and their marks are shifted."""
    batch = unshifted()

    def left(x):
        return np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], 1)

    return {
        "inputs": batch["input_ids"],
        "targets": left(batch["input_ids"]),
        "inputs_segmentation": batch["segment_ids"],
        "targets_segmentation": left(batch["segment_ids"]),
    }


class Model(nnx.Module):
    def __init__(self):
        self.embed, self.out = (nnx.Param(jnp.asarray(w, jnp.float32)) for w in weights())

    def __call__(self, ids):
        return self.embed[...][ids] @ self.out[...]


def logits_of(ids):
    embed, out = weights()
    return jnp.asarray(embed, jnp.float32)[ids] @ jnp.asarray(out, jnp.float32)


def assert_one_step(model):
    """A step of SGD is -LR times the gradient on the separate documents."""
    for before, after, slope in zip(weights(), (model.embed, model.out), GRADIENTS, strict=True):
        close((before - np.asarray(after[...])) / LR, slope, rtol=1e-3, atol=2e-5)
