"""IQLearn in the JAX trainers: a step of flax nnx with optax, and the calls of the others.

References: float64 autograd of the naive loss on the separate documents, in torch. MaxText, Tunix,
EasyDeL and Levanter are not installed here; what is repeated of each is named where it stands.
"""

import functools
import itertools
import sys
import types
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from irl_ops.integrations import easydel, equinox, flax, levanter, maxtext, tunix
from irl_ops.integrations.jax_batches import check_alignment
from irl_ops.integrations.optax import softmax_cross_entropy_with_integer_labels

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


# -------------------------------------------------------------------------------------------------
# flax nnx and optax
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "shift"), [(unshifted, True), (shifted, False)])
def test_a_step_of_nnx_is_float64_autograd_of_the_separate_documents(batch, shift):
    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(LR), wrt=nnx.Param)
    loss_fn = flax.iqlearn_loss_fn(shift=shift, **OPTIONS)

    @nnx.jit
    def step(model, optimizer, batch):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(model, batch)
        optimizer.update(model, grads)
        return loss, metrics

    loss, metrics = step(model, optimizer, batch())
    close(loss, LOSS)
    assert metrics["tokens"] == sum(LENGTHS)
    assert_one_step(model)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = Model()
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(2 * LR), 2), wrt=nnx.Param)
    grad_fn = nnx.value_and_grad(flax.iqlearn_loss_fn(shift=True, **OPTIONS), has_aux=True)
    total = 0
    for b in range(2):
        part = {name: x[b : b + 1] for name, x in unshifted().items()}
        (loss, _), grads = grad_fn(model, part | {"num_items": sum(LENGTHS)})
        optimizer.update(model, grads)  # MultiSteps averages over 2
        total += loss
    close(total, LOSS)
    assert_one_step(model)


def test_a_step_with_the_name_of_optax():
    model = Model()
    batch = shifted()
    where = batch["labels"] != -100

    def loss_fn(model):
        losses = softmax_cross_entropy_with_integer_labels(
            model(batch["input_ids"]),
            batch["labels"],
            where=where,
            segment_ids=batch["segment_ids"],
            **OPTIONS,
        )
        return losses.sum() / where.sum()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    nnx.Optimizer(model, optax.sgd(LR), wrt=nnx.Param).update(model, grads)
    close(loss, LOSS)
    assert_one_step(model)


AXES = [(-1, (0, 1, 2)), (0, (2, 0, 1)), (-2, (0, 2, 1))]


@pytest.mark.parametrize(("axis", "order"), AXES)
def test_without_a_td_term_it_is_optax(axis, order):
    logits = logits_of(shifted()["input_ids"]).transpose(order)
    labels = jnp.maximum(shifted()["labels"], 0)
    where = jnp.asarray(shifted()["labels"] != -100)
    ours = functools.partial(softmax_cross_entropy_with_integer_labels, lam=0.0)
    theirs = optax.softmax_cross_entropy_with_integer_labels
    close(ours(logits, labels, axis), theirs(logits, labels, axis))
    close(ours(logits, labels, axis, where), theirs(logits, labels, axis, where))
    columns = jnp.ones(logits.shape, bool).at[..., :1].set(axis != -1)
    labels = jnp.maximum(labels, 1)
    close(ours(logits, labels, axis, columns), theirs(logits, labels, axis, columns))


def test_several_axes_of_classes_are_one():
    logits = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    labels = jax.random.randint(jax.random.key(1), (2, 5), 0, 12)
    for axis in ((0, 3), (3, 0)):
        close(
            softmax_cross_entropy_with_integer_labels(logits, labels, axis, lam=0.0),
            optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis),
        )


def test_what_the_look_alike_refuses():
    logits, labels = jnp.zeros((4, 5)), jnp.zeros(4, jnp.int32)
    ours = softmax_cross_entropy_with_integer_labels
    with pytest.raises(ValueError, match=r"is this axis a batch, or a sequence"):
        ours(logits, labels)
    assert ours(logits, labels, segment_ids=jnp.zeros(4, jnp.int32)).shape == (4,)
    with pytest.raises(ValueError, match="axis is 3; accepted: axes of logits"):
        ours(logits[None], labels[None], 3)
    with pytest.raises(TypeError, match="has no option 'reduction'"):
        ours(logits[None], labels[None], reduction="mean")
    with pytest.raises(TypeError, match="are float32; accepted: integers"):
        ours(logits[None], labels[None].astype(jnp.float32))


# -------------------------------------------------------------------------------------------------
# Equinox, whose modules are callables of one sequence
# -------------------------------------------------------------------------------------------------


def test_a_step_of_equinox():
    embed, out = (jnp.asarray(w, jnp.float32) for w in weights())
    loss_fn = equinox.iqlearn_loss_fn(shift=True, **OPTIONS)

    def of(parameters):
        return loss_fn(lambda ids: parameters[0][ids] @ parameters[1], unshifted())

    (loss, _), grads = jax.value_and_grad(of, has_aux=True)((embed, out))
    close(loss, LOSS)
    for got, slope in zip(grads, GRADIENTS, strict=True):
        close(got, slope, rtol=1e-3, atol=2e-5)


def test_a_step_with_equinox_itself():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Tiny(eqx.Module):
        embed: jax.Array
        out: jax.Array

        def __call__(self, ids):
            return self.embed[ids] @ self.out

    model = Tiny(*(jnp.asarray(w, jnp.float32) for w in weights()))
    loss_fn = equinox.iqlearn_loss_fn(shift=True, **OPTIONS)
    grad_fn = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))
    (loss, _), grads = grad_fn(model, unshifted())
    close(loss, LOSS)
    updates, _ = optax.sgd(LR).update(grads, optax.sgd(LR).init(model))
    model = eqx.apply_updates(model, updates)
    close((weights()[0] - np.asarray(model.embed)) / LR, GRADIENTS[0], rtol=1e-3, atol=2e-5)


# -------------------------------------------------------------------------------------------------
# One loss in all conventions, and labels that lie one row off
# -------------------------------------------------------------------------------------------------


def test_the_conventions_agree():
    values = [
        flax.iqlearn_loss_fn(shift=True, call=lambda m, b: logits_of(b["input_ids"]), **OPTIONS)(
            None, unshifted()
        )[0],
        flax.iqlearn_loss_fn(shift=False, call=lambda m, b: logits_of(b["input_ids"]), **OPTIONS)(
            None, shifted()
        )[0],
    ]
    data = packed()
    data["targets_segmentation"] = maxtext.within_documents(data)
    xent, _ = maxtext.cross_entropy_with_logits(logits_of(data["inputs"]), data, **OPTIONS)
    values.append(xent.sum() / (data["targets_segmentation"] != 0).sum())
    close(values, [LOSS] * 3)


@pytest.mark.parametrize("compiled", [False, True])
def test_labels_that_lie_one_row_off(compiled):
    run = jax.jit if compiled else lambda f: f
    forward = {"call": lambda model, batch: jnp.zeros((2, 20, V))}
    twice = run(functools.partial(flax.iqlearn_loss_fn(shift=True, **forward), None))
    never = run(functools.partial(flax.iqlearn_loss_fn(shift=False, **forward), None))
    with pytest.raises(Exception, match="the labels are shifted already"):
        jax.block_until_ready(twice(shifted()))
        jax.effects_barrier()
    with pytest.raises(Exception, match="the labels are not shifted"):
        jax.block_until_ready(never(unshifted()))
        jax.effects_barrier()
    jax.block_until_ready((never(shifted()), twice(unshifted())))
    jax.effects_barrier()
    unseen = flax.iqlearn_loss_fn(shift=True, verify=False, **forward)
    assert jnp.isfinite(run(functools.partial(unseen, None))(shifted())[0])


def test_labels_that_are_both_or_neither_pass():
    same = np.full((1, 6), 7)
    every = np.ones((1, 6), bool)
    for shift in (True, False):
        check_alignment(same, same, every, shift=shift)
        check_alignment(same, same[:, ::-1] + 1, every, shift=shift)
        check_alignment(same, same, ~every, shift=shift)


def test_what_the_loss_functions_refuse():
    with pytest.raises(TypeError, match="has no option 'lamda'; accepted: lam, gamma"):
        flax.iqlearn_loss_fn(shift=True, lamda=0.1)
    with pytest.raises(TypeError, match="has no option 'num_items'"):
        equinox.iqlearn_loss_fn(shift=True, num_items=3)
    with pytest.raises(ValueError, match="gamma is 2"):
        tunix.iqlearn_loss_fn(gamma=2.0)
    with pytest.raises(TypeError, match="shift is None"):
        flax.iqlearn_loss_fn(shift=None)
    with pytest.raises(ValueError, match=r"batch=\['input_ids'\]; accepted"):
        flax.iqlearn_loss_fn(shift=True)(None, {"input_ids": 0})
    with pytest.raises(TypeError, match="has no option 'ignore_index'"):
        levanter.iqlearn_loss_fn(ignore_index=-1)


# -------------------------------------------------------------------------------------------------
# MaxText: src/maxtext/trainers/pre_train/train.py, loss_fn, as of August 2026
# -------------------------------------------------------------------------------------------------


def maxtext_loss_fn(logits, data, steps, **options):
    """What follows the two lines that are replaced: mask, sum, and the number of targets."""
    data = dict(data)
    data["targets_segmentation"] = maxtext.within_documents(data)
    xent, z_loss = maxtext.cross_entropy_with_logits(logits, data, **options)
    xent = xent * (data["targets_segmentation"] != 0)
    z_loss = z_loss * (data["targets_segmentation"] != 0)
    xent_sum, total_z_loss = jnp.sum(xent), jnp.sum(z_loss)
    total_weights = jnp.sum(data["targets_segmentation"] != 0)
    loss = xent_sum if steps > 1 else xent_sum / (total_weights + 1e-8)
    return loss, (xent_sum, total_z_loss / (total_weights + 1e-8), total_weights)


def test_a_step_of_maxtext():
    def of(parameters):
        return maxtext_loss_fn(
            parameters[0][packed()["inputs"]] @ parameters[1], packed(), 1, **OPTIONS
        )

    parameters = tuple(jnp.asarray(w, jnp.float32) for w in weights())
    (loss, _), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(parameters)
    close(loss, LOSS)
    for got, slope in zip(grads, GRADIENTS, strict=True):
        close(got, slope, rtol=1e-3, atol=2e-5)


def test_maxtext_accumulates_gradients():
    """``gradient_accumulation_loss_and_grad`` adds up xent_sum and total_weights in a scan."""
    data = {name: x[:, None] for name, x in packed().items()}

    def body(carry, part):
        _, (xent_sum, _, count) = maxtext_loss_fn(logits_of(part["inputs"]), part, 2, **OPTIONS)
        return (carry[0] + xent_sum, carry[1] + count), None

    (total, count), _ = jax.lax.scan(body, (0.0, 0), jax.tree.map(jnp.asarray, data))
    close(total / count, LOSS)


def test_maxtext_has_its_z_loss():
    data = packed()
    mask = maxtext.within_documents(data) != 0
    logits = logits_of(data["inputs"])
    plain, none = maxtext.cross_entropy_with_logits(logits, data, **OPTIONS)
    xent, z_loss = maxtext.cross_entropy_with_logits(logits, data, z_loss=0.01, **OPTIONS)
    value = np.where(mask, jax.nn.logsumexp(logits, -1), 0)
    close(none, 0 * value)
    close(z_loss, 0.01 * value**2)
    close(xent - plain, z_loss, rtol=1e-3, atol=1e-4)


def test_what_maxtext_is_refused():
    data = packed()
    logits = logits_of(data["inputs"])
    with pytest.raises(ValueError, match="accepted: a batch of MaxText with 'targets'"):
        maxtext.within_documents({"inputs": data["inputs"]})
    with pytest.raises(ValueError, match="the labels are not shifted"):
        maxtext.cross_entropy_with_logits(
            logits,
            data | {"targets": data["inputs"], "targets_segmentation": data["inputs_segmentation"]},
        )
    with pytest.raises(TypeError, match="has no option 'segment_ids'"):
        maxtext.cross_entropy_with_logits(logits, data, segment_ids=data["inputs"])


# -------------------------------------------------------------------------------------------------
# Tunix: tunix/sft/peft_trainer.py, ``_train_step`` of 0.1.7 and of later versions
# -------------------------------------------------------------------------------------------------


class TunixModel(Model):
    def __call__(self, tokens, positions, cache, attention_mask):
        return super().__call__(tokens), cache


def tunix_inputs():
    """One document a row, since its trainer packs nothing; the mask is that of the tokens."""
    tokens = np.zeros((5, 12), np.int32)
    for row, document in zip(tokens, documents(), strict=True):
        row[: len(document)] = document
    mask = tokens != 0
    return {"input_tokens": tokens, "input_mask": mask, "positions": None, "attention_mask": None}


def test_a_step_of_tunix():
    model = TunixModel()
    optimizer = nnx.Optimizer(model, optax.sgd(LR), wrt=nnx.Param)
    loss_fn = tunix.iqlearn_loss_fn(**OPTIONS)
    grad_fn = nnx.value_and_grad(loss_fn, argnums=0, has_aux=False)
    loss, grads = grad_fn(model, **tunix_inputs())
    optimizer.update(model, grads)
    close(loss, LOSS)
    assert_one_step(model)


@dataclass
class WeightedMetric:
    unreduced_sum: object
    denominator: object


@dataclass
class LossOutput:
    primary_loss: WeightedMetric
    aux_metrics: dict


def test_tunix_divides_a_sum_where_it_can(monkeypatch):
    utils = types.ModuleType("tunix.sft.utils")
    utils.LossOutput, utils.WeightedMetric = LossOutput, WeightedMetric
    for name in ("tunix", "tunix.sft"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tunix.sft.utils", utils)
    out = tunix.iqlearn_loss_fn(**OPTIONS)(TunixModel(), **tunix_inputs())
    assert out.primary_loss.denominator == sum(LENGTHS)
    close(out.primary_loss.unreduced_sum / out.primary_loss.denominator, LOSS)
    assert {"nll", "td"} <= set(out.aux_metrics)


def test_what_tunix_is_refused():
    inputs = tunix_inputs()
    with pytest.raises(ValueError, match=r"input_mask has shape \[5, 11\]"):
        tunix.iqlearn_loss_fn()(
            TunixModel(), **inputs | {"input_mask": inputs["input_mask"][:, 1:]}
        )
    with pytest.raises(
        ValueError, match=r"logits have shape \[5, 11, 23\]; accepted: \[5, 12, V\]"
    ):
        tunix.iqlearn_loss_fn()(lambda t, *_: (logits_of(t)[:, 1:], None), **inputs)


# -------------------------------------------------------------------------------------------------
# EasyDeL 0.3: infra/loss_utils.py, ``FunctionalLossStrategy.compute`` and ``LossMetrics``
# -------------------------------------------------------------------------------------------------


@dataclass
class LossConfig:
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    loss_normalizing_factor: str = "NUM_REAL_TARGET_TOKENS"
    divide_weight_sum: bool = False
    shift_tokens: bool = True
    reduction: str | None = None


@pytest.fixture
def easydel_loss(monkeypatch):
    utils = types.ModuleType("easydel.infra.loss_utils")
    utils.LossMetrics = types.SimpleNamespace
    for name in ("easydel", "easydel.infra"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "easydel.infra.loss_utils", utils)

    def compute(batch, config=None, **options):
        """``loss_fn(labels=, config=, paxis=, **loss_kwargs, **outputs, **batch)``."""
        loss_fn = easydel.iqlearn_loss_function(**OPTIONS | options)
        assert loss_fn.__name__ == "ForCausalLMLoss"
        batch = dict(batch)
        labels = batch.pop("labels")
        outputs = {"logits": logits_of(batch["input_ids"]), "last_hidden_state": None}
        return loss_fn(labels=labels, config=config, paxis=None, **outputs, **batch)

    return compute


def test_the_call_of_easydel(easydel_loss):
    found = easydel_loss(unshifted())
    close(found.loss, LOSS)
    assert found.weight_sum == sum(LENGTHS)
    batch = unshifted()
    batch["attention_mask"] = (batch["segment_ids"] > 0).astype(np.int32)
    batch["labels"] = np.where(batch["labels"] == -100, 5, batch["labels"])
    close(easydel_loss(batch, LossConfig()).loss, LOSS)
    close(easydel_loss(shifted(), LossConfig(shift_tokens=False)).loss, LOSS)
    half = easydel_loss(unshifted() | {"num_items_in_batch": 2 * sum(LENGTHS)})
    close(half.loss, LOSS / 2)


def test_what_easydel_is_refused(easydel_loss):
    for config, name in (
        (LossConfig(label_smoothing=0.1), "label_smoothing is 0.1"),
        (LossConfig(reduction="sum"), "reduction is 'sum'"),
        (LossConfig(loss_normalizing_factor=3), "loss_normalizing_factor is 3"),
    ):
        with pytest.raises(ValueError, match=f"LossConfig.{name}, which IQLearn would ignore"):
            easydel_loss(unshifted(), config)
    with pytest.raises(ValueError, match="the labels are shifted already"):
        easydel_loss(shifted())


# -------------------------------------------------------------------------------------------------
# Levanter: models/lm_model.py, ``LmExample`` and ``compute_next_token_loss``; haliax's NamedArray
# -------------------------------------------------------------------------------------------------


@dataclass
class Named:
    """An array whose axes have names."""

    array: jax.Array
    names: tuple

    @property
    def axes(self):
        sizes = zip(self.names, self.array.shape, strict=True)
        return [types.SimpleNamespace(name=name, size=size) for name, size in sizes]

    def rearrange(self, names):
        return Named(self.array.transpose([self.names.index(name) for name in names]), names)


class LevanterModel:
    Pos, Embed, Vocab = (types.SimpleNamespace(name=n) for n in ("position", "embed", "vocab"))

    def __init__(self, parameters, auxiliary=None):
        self.parameters, self.auxiliary = parameters, auxiliary

    def activations(self, tokens, attn_mask, *, key=None):
        hidden = Named(self.parameters[0][tokens.array], (*tokens.names, "embed"))
        return hidden if self.auxiliary is None else (hidden, self.auxiliary)

    def get_lm_head(self):
        return Named(self.parameters[1], ("embed", "vocab"))


def levanter_example(batch_axis=True):
    """``LmExample.causal``: the weight at t is that of the row which scores token t + 1."""
    batch = unshifted()
    segments = batch["segment_ids"]
    weight = np.zeros(segments.shape, np.float32)
    weight[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    named = {
        "tokens": batch["input_ids"],
        "loss_weight": weight,
        "segments": segments,
    }
    names = ("batch", "position")
    if not batch_axis:
        named, names = {name: x[0] for name, x in named.items()}, ("position",)
    made = {name: Named(jnp.asarray(x), names) for name, x in named.items()}
    mask = types.SimpleNamespace(segment_ids=(made["segments"], made["segments"]))
    return types.SimpleNamespace(
        tokens=made["tokens"], loss_weight=made["loss_weight"], attn_mask=mask
    )


def test_a_step_of_levanter():
    loss_fn = levanter.iqlearn_loss_fn(chunk_size=16, **OPTIONS)

    def of(parameters):
        return loss_fn(LevanterModel(parameters), levanter_example(), key=None)

    parameters = tuple(jnp.asarray(w, jnp.float32) for w in weights())
    (loss, metrics), grads = jax.value_and_grad(of, has_aux=True)(parameters)
    close(loss.mean(), LOSS)
    assert metrics["tokens"] == sum(LENGTHS)
    for got, slope in zip(grads, GRADIENTS, strict=True):
        close(got, slope, rtol=1e-3, atol=2e-5)


def test_levanter_adds_an_auxiliary_loss_and_takes_one_sequence():
    parameters = tuple(jnp.asarray(w, jnp.float32) for w in weights())
    loss_fn = levanter.iqlearn_loss_fn(**OPTIONS)
    example = levanter_example(batch_axis=False)
    plain, _ = loss_fn(LevanterModel(parameters), example)
    routed, _ = loss_fn(LevanterModel(parameters, 0.5), example)
    close(routed - plain, 0.5)
    example.loss_weight = Named(jnp.ones(2), ("batch",))
    with pytest.raises(ValueError, match=r"loss_weight has the axes \['batch'\]"):
        loss_fn(LevanterModel(parameters), example)
