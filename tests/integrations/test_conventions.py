"""The same documents in the conventions of the trainers: one loss and one gradient.

Unshifted (Transformers), shifted within documents with positions (torchtitan), shifted and
flattened (torchtune), with a mask of their own and in [S, B, V] (Megatron), shifted across
documents with two segmentations (MaxText). Each in separate rows, padded to one length, and one
document after the other. The reference is float64 autograd of the documents one by one.
"""

import pytest
import torch
from torch.nn import functional as F

import irl_ops.torch as irl
from irl_ops.integrations.batches import count_labels, segment_ids
from irl_ops.integrations.torchtitan import IQLearnLoss as TitanLoss
from irl_ops.integrations.torchtitan import LinearIQLearnLoss as TitanLinearLoss
from irl_ops.integrations.torchtune import IQLearnLoss as TuneLoss
from irl_ops.integrations.transformers import iqlearn_loss_func

from .. import naive
from . import test_megatron as megatron
from .tiny_transformers import close_loss

VOCAB, END, PAD, PROMPT = 11, 2, 0, 2
ENDS = {"no end token": {}, "an end token": {"eos_token_id": END}}
BASE = {"lam": 0.3, "gamma": 0.9}


def documents():
    """Prompts of two tokens, and answers; the last is cut off where the others end."""
    torch.manual_seed(0)
    made = [[*torch.randint(3, VOCAB, (n,)).tolist(), END] for n in (5, 8, 3, 6)]
    return [*made[:-1], made[-1][:-1]]


class Model(torch.nn.Module):
    """Logits of a token that know no other, so that nothing but the loss can join documents."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(VOCAB, 6)
        self.head = torch.nn.Linear(6, VOCAB)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def reference(model, made, options):
    """Float64 autograd, document by document, and by hand from the tokens on."""
    model = model.double()
    total = count = 0
    for tokens in made:
        ids = torch.tensor([tokens])
        labels = torch.tensor([[-100] * PROMPT + tokens[PROMPT:]])
        loss, rows = naive.loss(
            "iqlearn_loss", model(ids), labels, shift=True, reduction="sum", **options
        )
        total, count = total + loss, count + sum(r.kind != naive.IGNORED for s in rows for r in s)
    (total / count).backward()
    return total / count, [p.grad for p in model.parameters()]


# -------------------------------------------------------------------------------------------------
# The layouts: rows of (ids, unshifted labels, document, position), 0 is no document
# -------------------------------------------------------------------------------------------------


def separate(made):
    width = max(map(len, made))
    return [layout([tokens], width) for tokens in made]


def packed(made):
    """Two documents in one row, the others in another, with padding behind them."""
    width = max(len(made[0]) + len(made[1]), len(made[2]) + len(made[3])) + 2
    return [layout(made[:2], width), layout(made[2:], width)]


def layout(made, width):
    row = []
    for number, tokens in enumerate(made, 1):
        labels = [-100] * PROMPT + tokens[PROMPT:]
        row += zip(tokens, labels, [number] * len(tokens), range(len(tokens)), strict=True)
    return row + [(PAD, -100, 0, 0)] * (width - len(row))


def tensors(rows):
    return [torch.tensor([[cell[i] for cell in row] for row in rows]) for i in range(4)]


def within(labels, segments):
    """Labels shifted by one, none across documents."""
    same = F.pad((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0), (0, 1))
    return torch.where(same, F.pad(labels[:, 1:], (0, 1), value=-100), -100)


# -------------------------------------------------------------------------------------------------
# The conventions
# -------------------------------------------------------------------------------------------------


def transformers(model, rows, options):
    """``position_ids`` and a mask beside unshifted labels, as ``apply_iqlearn`` reads them."""
    ids, labels, segments, positions = tensors(rows)
    batch = {
        "labels": labels,
        "position_ids": positions,
        "attention_mask": (segments != 0).long(),
    }
    return irl.iqlearn_loss(
        model(ids),
        labels,
        shift=True,
        segment_ids=segment_ids(batch),
        num_items=count_labels(batch, shift=True),
        **options,
    )


def segments_in_the_mask(model, rows, options):
    """Axolotl's and LLaMA-Factory's: the mask holds 0 and 1..n."""
    ids, labels, segments, _ = tensors(rows)
    batch = {"labels": labels, "attention_mask": segments}
    return irl.iqlearn_loss(
        model(ids), labels, shift=True, segment_ids=segment_ids(batch), **options
    )


def labels_alone(model, rows, options):
    """``compute_loss_func``: masked prompts part documents, and nothing else does."""
    ids, labels, _, _ = tensors(rows)
    return iqlearn_loss_func(**options)({"logits": model(ids)}, labels, (labels != -100).sum())


def torchtitan(model, rows, options):
    ids, labels, segments, positions = tensors(rows)
    labels = within(labels, segments)
    loss_fn = TitanLoss.Config(**options).build()
    return loss_fn(model(ids), labels, (labels != -100).sum(), positions=positions)[0]


def torchtitan_linear(model, rows, options):
    ids, labels, segments, positions = tensors(rows)
    labels = within(labels, segments)
    loss_fn = TitanLinearLoss.Config(loss_fn=TitanLoss.Config(**options)).build()
    loss_fn.set_lm_head(model.head)
    hidden = model.embedding(ids)
    return loss_fn(hidden, labels, (labels != -100).sum(), positions=positions)[0]


def torchtune(model, rows, options):
    ids, labels, _, _ = tensors(rows)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return TuneLoss(**options)(model(ids).flatten(0, 1), labels.flatten())


def megatron_core(model, rows, options):
    """Labels are tokens throughout; what counts is in ``loss_mask``."""
    ids, labels, segments, positions = tensors(rows)
    mask = (within(labels, segments) != -100).float()
    tokens = F.pad(ids[:, 1:], (0, 1), value=PAD)
    gpt = megatron.GPTModel()
    gpt.embedding, gpt.output_layer = model.embedding, model.head
    batch = {"input_ids": ids, "labels": tokens, "loss_mask": mask, "position_ids": positions}
    output = megatron.run(megatron.apply_iqlearn(gpt, **options), batch)
    total, count = megatron.loss_func(mask, output)
    return total / count


def maxtext(model, rows, options):
    """Packed, then shifted: a document's last row has the next one's first token for a target.

    Its target's segment is another than its own, and no term may count it.
    """
    ids, labels, segments, _ = tensors(rows)
    targets = F.pad(ids[:, 1:], (0, 1), value=PAD)
    of_targets = F.pad(segments[:, 1:], (0, 1), value=0)
    answers = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    return irl.iqlearn_loss(
        model(ids),
        targets,
        segment_ids=segments,
        where=(of_targets != 0) & (of_targets == segments) & answers,
        **options,
    )


CONVENTIONS = [
    transformers,
    segments_in_the_mask,
    labels_alone,
    torchtitan,
    torchtitan_linear,
    torchtune,
    megatron_core,
    maxtext,
]


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("lay", [separate, packed])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_loss_and_one_gradient(convention, lay, ends):
    made, options = documents(), BASE | ends
    expected, gradients = reference(Model(), made, options)
    model = Model()
    loss = convention(model, lay(made), options)
    loss.backward()
    close_loss(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close_loss(parameter.grad, gradient)


def test_the_end_rules_differ_on_these_documents():
    """Or the test above would not notice an end that is taken for another."""
    values = [reference(Model(), documents(), BASE | ends)[0].item() for ends in ENDS.values()]
    assert abs(values[0] - values[1]) > 0.01


def test_a_convention_taken_for_another_gives_another_loss():
    made = documents()
    expected, _ = reference(Model(), made, BASE)
    ids, labels, _, _ = tensors(packed(made))
    twice = irl.iqlearn_loss(
        Model()(ids), F.pad(labels[:, 1:], (0, 1), value=-100), shift=True, **BASE
    )
    assert abs(twice.item() - expected.item()) > 0.01
