"""IQLearn in JAX trainers that are not installed here: their calls, against the reference.

What is repeated of each is named where it stands.
"""

import sys
import types
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from irl_ops.integrations import easydel, levanter, maxtext, tunix

from .jax_documents import (
    GRADIENTS,
    LENGTHS,
    LOSS,
    LR,
    OPTIONS,
    Model,
    assert_one_step,
    close,
    documents,
    logits_of,
    packed,
    shifted,
    unshifted,
    weights,
)

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
    grad_fn = nnx.jit(nnx.value_and_grad(loss_fn, argnums=0, has_aux=False))
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
    (loss, metrics), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(parameters)
    close(loss.mean(), LOSS)
    assert metrics["tokens"] == sum(LENGTHS)
    for got, slope in zip(grads, GRADIENTS, strict=True):
        close(got, slope, rtol=1e-3, atol=2e-5)


def test_levanter_adds_an_auxiliary_loss_and_takes_one_sequence():
    parameters = tuple(jnp.asarray(w, jnp.float32) for w in weights())
    loss_fn = levanter.iqlearn_loss_fn(**OPTIONS)
    example = levanter_example(batch_axis=False)

    @jax.jit
    def of(parameters, auxiliary):
        return loss_fn(LevanterModel(parameters, auxiliary), example)[0]

    close(of(parameters, 0.5) - of(parameters, 0.0), 0.5)
    assert jnp.isfinite(of(parameters, None))
    example.loss_weight = Named(jnp.ones(2), ("batch",))
    with pytest.raises(ValueError, match=r"loss_weight has the axes \['batch'\]"):
        loss_fn(LevanterModel(parameters), example)
