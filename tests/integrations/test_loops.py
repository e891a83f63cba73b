"""A step in a loop of one's own, under accelerate, Fabric and Lightning, against float64 autograd.

The references are of separate documents, divided by all labels of the step.
"""

import types

import pytest
import torch

from irl_ops.integrations.loops import whole_batch
from irl_ops.torch import iqlearn_loss

from . import loop_steps
from .tiny_transformers import assert_one_step, close_loss, llama, parameters, reference_gradients

lightning = pytest.importorskip("lightning", reason="the package lightning is not installed")

from irl_ops.integrations.lightning import IQLearn  # noqa: E402


@pytest.mark.parametrize("data", loop_steps.DATA)
@pytest.mark.parametrize("loop", loop_steps.LOOPS)
def test_a_step_is_float64_autograd_of_the_separate_documents(loop, data):
    model = llama()
    micro_batches, documents = loop_steps.DATA[data](model)
    gradients = reference_gradients(model, documents)
    before = parameters(model)
    loop_steps.LOOPS[loop](model, micro_batches)
    assert_one_step(model, before, gradients)


# -------------------------------------------------------------------------------------------------
# Lightning
# -------------------------------------------------------------------------------------------------


def test_lightning_steps_with_what_is_left_of_an_epoch():
    """Three micro-batches, then one, which Lightning divides by three all the same."""
    model = llama()
    micro_batches, documents = loop_steps.padded(model)
    before = parameters(model)
    gradients = reference_gradients(model, documents[:6])
    loop_steps.lightning(model, micro_batches, accumulate=3)
    assert_one_step(model, before, gradients)
    again, before = llama(), parameters(model)
    gradients = reference_gradients(model, documents[6:])
    loop_steps.lightning(again, micro_batches, accumulate=3, max_steps=2)
    assert_one_step(again, before, gradients)


def test_lightning_clips_the_divided_gradient():
    model = llama()
    micro_batches, documents = loop_steps.padded(model)
    gradients = reference_gradients(model, documents)
    before = parameters(model)
    norm = sum(g.square().sum() for g in gradients.values()).sqrt()
    loop_steps.lightning(model, micro_batches, gradient_clip_val=norm.item() / 2)
    assert_one_step(model, before, {name: g / 2 for name, g in gradients.items()})


def test_lightning_logs_means_and_validates():
    model = llama()
    micro_batches, _ = loop_steps.padded(model)
    expected = loop_steps.loss_of(model, micro_batches[0])
    trainer = loop_steps.lightning(
        model, micro_batches[:1], limit_val_batches=1, num_sanity_val_steps=0, val_check_interval=1
    )
    close_loss(trainer.callback_metrics["loss"], expected)
    close_loss(trainer.callback_metrics["val"], loop_steps.loss_of(model, micro_batches[0]))
    assert {"nll", "td"} <= set(trainer.callback_metrics)


def fit(module, callbacks):
    lightning.pytorch.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader([0], batch_size=None))


class Line(lightning.LightningModule):
    """Ten logits of nothing; ``loss`` is what trains."""

    def __init__(self, loss):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(1, 4, 10))
        self.loss = loss

    def training_step(self, batch, index):
        return self.loss(self.logits, torch.ones(1, 4, dtype=torch.long))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_refuses_a_loss_that_is_no_callback_and_a_callback_that_is_no_loss():
    with pytest.raises(RuntimeError, match="IQLearn is no callback of the Trainer"):
        fit(Line(IQLearn()), [])
    with pytest.raises(RuntimeError, match="IQLearn was not called in this step"):
        fit(Line(iqlearn_loss), [IQLearn()])


def test_lightning_options():
    for name in ("reduction", "num_items"):
        with pytest.raises(TypeError, match=f"IQLearn has no option '{name}'"):
            IQLearn(**{name: None})
    with pytest.raises(ValueError, match="lam"):
        IQLearn(lam=-1)
    weighed = IQLearn(token_weights=torch.ones(1, 4))
    with pytest.raises(NotImplementedError, match="token_weights"):
        fit(Line(weighed), [weighed])
    deepspeed = types.SimpleNamespace(strategy=type("DeepSpeedStrategy", (), {})())
    with pytest.raises(NotImplementedError, match="DeepSpeed keeps gradients"):
        IQLearn().setup(deepspeed, None, "fit")


def test_a_step_without_any_label_changes_nothing():
    loss = IQLearn()
    module = Line(lambda logits, labels: loss(logits, torch.full_like(labels, -100)))
    fit(module, [loss])
    assert not module.logits.any()


# -------------------------------------------------------------------------------------------------
# The others
# -------------------------------------------------------------------------------------------------


class DeepSpeedEngine:
    """Divides as DeepSpeed's: by its accumulation steps in ``backward``, then over processes."""

    __module__ = "deepspeed.runtime.engine"
    device = torch.device("cpu")
    dp_world_size = 1

    def gradient_accumulation_steps(self):
        return 4

    def backward(self, loss):
        (loss / self.gradient_accumulation_steps()).backward()


def test_a_deepspeed_engine():
    model, engine = llama(), DeepSpeedEngine()
    micro_batches, documents = loop_steps.padded(model)
    gradients = reference_gradients(model, documents)
    before = parameters(model)
    num_items, factor = whole_batch(micro_batches, engine, shift=True)
    for batch in micro_batches:
        engine.backward(loop_steps.loss_of(model, batch, num_items=num_items) * factor)
    loop_steps.sgd(model).step()
    assert_one_step(model, before, gradients)


def test_labels_alone_and_shifted_labels_are_counted():
    labels = torch.tensor([[5, 6, -100, 7], [-100, 5, 6, 6]])
    assert whole_batch([labels], shift=True) == (5, 1.0)
    assert whole_batch([labels, labels], shift=False) == (12, 1.0)
    segments = {"labels": labels, "segment_ids": torch.tensor([[1, 1, 2, 2], [1, 2, 2, 3]])}
    assert whole_batch([segments], shift=True) == (3, 1.0)


def test_what_nobody_tried_is_refused():
    labels = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="micro_batches is empty"):
        whole_batch([], shift=True)
    with pytest.raises(TypeError, match="loop=SimpleNamespace; accepted: None, accel"):
        whole_batch([labels], types.SimpleNamespace(), shift=True)
    split = types.SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)
    accelerator = type("Accelerator", (), {"__module__": "accelerate.accelerator"})()
    accelerator.parallelism_config = split
    with pytest.raises(NotImplementedError, match=r"parallelism_config\.cp_size=2"):
        whole_batch([labels], accelerator, shift=True)
    fabric = type("Fabric", (), {"__module__": "lightning.fabric.fabric"})()
    fabric.strategy = type("DeepSpeedStrategy", (), {})()
    with pytest.raises(NotImplementedError, match="Fabric with DeepSpeed"):
        whole_batch([labels], fabric, shift=True)
