"""A router's auxiliary loss does not grow with the number of micro-batches or processes."""

import copy

import pytest
import torch

from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn

from .tiny_transformers import (
    OPTIONS,
    assert_one_step,
    close_loss,
    collate,
    examples,
    mixtral,
    naive_sum,
    parameters,
    train,
)

COEFFICIENT = 0.5  # of tiny_transformers.mixtral


def parts_of(model, batch):
    """Summed IQLearn loss, count, and the router's mean; the experts' kernels have no float64."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs)
    return *naive_sum(outputs.logits, batch["labels"], shift=True), outputs.aux_loss


def test_an_accumulated_step_takes_the_mean_over_labels(tmp_path):
    model = mixtral()
    data = examples(model, (5, 9, 7, 3, 11, 2, 4, 6))
    seen, twin, before = [], mixtral(), parameters(model)

    def collator(rows):
        seen.append(collate(rows))
        return seen[-1]

    trainer = train(
        apply_iqlearn(model, **OPTIONS),
        data,
        tmp_path,
        collator=collator,
        callbacks=[IQLearnCallback()],
        gradient_accumulation_steps=4,
    )
    micro_batches = [parts_of(twin, batch) for batch in seen[:4]]
    count = sum(n for _, n, _ in micro_batches)
    loss = sum(total + COEFFICIENT * n * aux for total, n, aux in micro_batches) / count
    loss.backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert_one_step(model, before, gradients)
    close_loss(torch.tensor(trainer.state.log_history[0]["loss"]), loss, rtol=1e-4)  # rounded


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("by_argument", [True, False])
def test_a_batch_gets_its_share(return_dict, by_argument):
    model = mixtral()
    batch = collate(examples(model))
    total, count, aux = parts_of(model, batch)
    if by_argument:
        model.config.output_router_logits = False
    extra = {"output_router_logits": True} if by_argument else {}
    model = apply_iqlearn(model, **OPTIONS)
    whole = model(**batch, **extra, return_dict=return_dict)[0]
    close_loss(whole, total / count + COEFFICIENT * aux)
    for num_items in (3 * count, 3 * count.item(), (3 * count)[None]):
        loss = model(**batch, **extra, num_items_in_batch=num_items, return_dict=return_dict)[0]
        close_loss(loss, (total / count + COEFFICIENT * aux) / 3)


def test_a_batch_without_labels_has_no_share():
    model = apply_iqlearn(mixtral(), **OPTIONS)
    batch = collate(examples(model))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for num_items in (7, torch.tensor(0)):
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        assert loss == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_without_routers_nothing_is_split():
    model = mixtral()
    model.config.output_router_logits = False
    batch = collate(examples(model))
    total, _ = naive_sum(copy.deepcopy(model)(**batch).logits, batch["labels"], shift=True)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch, num_items_in_batch=9).loss, total / 9)
