"""One optimiser step of a tiny decoder in the loops that people write, for test_loops*.py.

``micro_batches`` are those of this process. Each function changes the model and returns nothing.
"""

from contextlib import nullcontext

import torch

from irl_ops.integrations.loops import whole_batch
from irl_ops.torch import iqlearn_loss

from .tiny_transformers import OPTIONS, VOCAB, collate, examples

LR = 0.1
LENGTHS = (5, 9, 3, 7, 4, 8, 2, 11)


def padded(model):
    """Four micro-batches of two documents: prompts and answers, and the documents again."""
    data = examples(model, LENGTHS)
    return [collate(data[i : i + 2]) for i in range(0, len(data), 2)], [collate([r]) for r in data]


def packed(model):
    """Four micro-batches of two documents in one row, the first label of each not masked."""
    torch.manual_seed(1)
    documents = [torch.cat([torch.randint(3, VOCAB, (n,)), torch.tensor([2])]) for n in LENGTHS]
    rows = []
    for pair in zip(documents[::2], documents[1::2], strict=True):
        ids = torch.cat(pair)[None]
        positions = torch.cat([torch.arange(len(d)) for d in pair])[None]
        rows.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    return rows, [{"input_ids": d[None], "labels": d[None]} for d in documents]


def of_rank(batches, rank, ranks):
    """A part of them, so that ranks differ in their number of labels."""
    return batches[rank::ranks]


def logits_of(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return model(**inputs, use_cache=False).logits


def loss_of(model, batch, **options):
    return iqlearn_loss(
        logits_of(model, batch),
        batch["labels"],
        shift=True,
        position_ids=batch.get("position_ids"),
        **OPTIONS,
        **options,
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


def plain(model, micro_batches):
    optimiser = sgd(model)
    num_items, factor = whole_batch(micro_batches, shift=True)
    for batch in micro_batches:
        (loss_of(model, batch, num_items=num_items) * factor).backward()
    optimiser.step()


def accelerate(model, micro_batches):
    from accelerate import Accelerator

    # more than there are, as at the end of an epoch: what divides is what was configured
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(micro_batches) + 1)
    model, optimiser = accelerator.prepare(model, sgd(model))
    num_items, factor = whole_batch(micro_batches, accelerator, shift=True)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            accelerator.backward(loss_of(model, batch, num_items=num_items) * factor)
    optimiser.step()


def fabric(model, micro_batches):
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", strategy=strategy(), devices=ranks())
    if fabric.world_size > 1:
        fabric.launch()
    model, optimiser = fabric.setup(model, sgd(model))
    num_items, factor = whole_batch(micro_batches, fabric, shift=True)
    for i, batch in enumerate(micro_batches):
        with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1):
            fabric.backward(loss_of(model, batch, num_items=num_items) * factor)
    optimiser.step()


def lightning(model, micro_batches, *, accumulate=None, max_steps=1, **arguments):
    from lightning.pytorch import LightningModule, Trainer

    from irl_ops.integrations.lightning import IQLearn

    iqlearn = IQLearn(shift=True, **OPTIONS)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            loss = iqlearn(
                logits_of(self.model, batch),
                batch["labels"],
                position_ids=batch.get("position_ids"),
            )
            self.log("loss", loss)
            self.log_dict({name: iqlearn.metrics[name] for name in ("nll", "td")})
            return loss

        def validation_step(self, batch, index):
            self.log("val", iqlearn(logits_of(self.model, batch), batch["labels"]))

        def configure_optimizers(self):
            return sgd(self.model)

    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy(),
        devices=ranks(),
        callbacks=[iqlearn],
        accumulate_grad_batches=len(micro_batches) if accumulate is None else accumulate,
        max_steps=max_steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0} | arguments,
    )
    data = torch.utils.data.DataLoader(micro_batches, batch_size=None)
    trainer.fit(Module(), data, data if arguments.get("limit_val_batches") else None)
    return trainer


def ranks():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def strategy():
    return "ddp" if ranks() > 1 else "auto"


LOOPS = {"plain": plain, "accelerate": accelerate, "fabric": fabric, "lightning": lightning}
DATA = {"padded": padded, "packed": packed}
