"""IQLearn in loops of flax nnx, optax and Equinox: one step, and one loss in all conventions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from irl_ops.integrations import equinox, flax, levanter, maxtext, tunix
from irl_ops.integrations.jax_batches import check_alignment
from irl_ops.integrations.optax import softmax_cross_entropy_with_integer_labels

from .jax_documents import (
    GRADIENTS,
    LENGTHS,
    LOSS,
    LR,
    OPTIONS,
    Model,
    V,
    assert_one_step,
    close,
    logits_of,
    packed,
    shifted,
    unshifted,
    weights,
)

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
    loss_fn = flax.iqlearn_loss_fn(shift=True, **OPTIONS)
    grad_fn = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))
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

    loss, grads = nnx.jit(nnx.value_and_grad(loss_fn))(model)
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
    close(ours(logits, labels, axis, where), theirs(logits, labels, axis, where))
    if axis != -1:
        return
    close(ours(logits, labels), theirs(logits, labels))
    columns = jnp.ones(logits.shape, bool).at[..., :1].set(False)
    labels = jnp.maximum(labels, 1)
    close(ours(logits, labels, axis, columns), theirs(logits, labels, axis, columns))


def test_several_axes_of_classes_are_one():
    logits = jax.random.normal(jax.random.key(0), (3, 2, 5, 4))
    labels = jax.random.randint(jax.random.key(1), (2, 5), 0, 12)
    close(
        softmax_cross_entropy_with_integer_labels(logits, labels, (3, 0), lam=0.0),
        optax.softmax_cross_entropy_with_integer_labels(logits, labels, (3, 0)),
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

    (loss, _), grads = jax.jit(jax.value_and_grad(of, has_aux=True))((embed, out))
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
