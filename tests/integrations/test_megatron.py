"""The loss as Megatron-Core 0.16.1 calls it: [S, B, V], shifted labels, a mask of its own.

Megatron is not installed here: ``GPTModel`` below is the end of its forward, and ``loss_func`` what
Megatron-LM's and Bridge's loss functions and schedule do with the result.
"""

import copy
import types

import pytest
import torch
from torch.nn import functional as F

from irl_ops.integrations.megatron import apply_iqlearn

from .tiny_transformers import close_loss, naive_sum

VOCAB, PADDED, END = 11, 16, 2
OPTIONS = {"lam": 0.3, "gamma": 0.9, "vocab_size": VOCAB}


class GPTModel(torch.nn.Module):
    """An embedding and its output layer; hidden states are [S, B, H]."""

    def __init__(self, post_process=True, **config):
        super().__init__()
        self.config = types.SimpleNamespace(
            **{"tensor_model_parallel_size": 1, "context_parallel_size": 1, "mtp_num_layers": None}
            | config
        )
        self.post_process = post_process
        self.embedding = torch.nn.Embedding(PADDED, 8)
        self.output_layer = torch.nn.Linear(8, PADDED, bias=False)

    def compute_language_model_loss(self, labels, logits):
        """Cross-entropy [B, S] of labels [B, S] and logits [S, B, V]."""
        return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")

    def forward(
        self,
        input_ids,
        position_ids,
        attention_mask,
        decoder_input=None,
        labels=None,
        inference_context=None,
        packed_seq_params=None,
        extra_block_kwargs=None,
        runtime_gather_output=None,
        *,
        inference_params=None,
        loss_mask=None,
        padding_mask=None,
    ):
        hidden = self.embedding(input_ids).transpose(0, 1).contiguous()
        if not self.post_process:
            return hidden
        logits = self.output_layer(hidden)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)


def loss_func(loss_mask, output):
    """Sum and number of tokens, as with ``calculate_per_token_loss``."""
    loss_mask = loss_mask.reshape(-1).float()
    return (output.reshape(-1).float() * loss_mask).sum(), loss_mask.sum()


def documents(lengths=(5, 8, 3, 6, 7, 4)):
    torch.manual_seed(0)
    return [[*torch.randint(3, VOCAB, (n,)).tolist(), END] for n in lengths]


def unshifted(tokens):
    """Labels: some documents have no prompt, and long ones a second turn, whose question has none.

    So neither the mask nor the positions could be left out: a label is followed by a row that does
    not count, and an end by a row that does.
    """
    labels = torch.tensor([tokens])
    labels[:, : 1 + len(tokens) % 2] = -100
    if len(tokens) > 6:
        labels[:, 4:6] = -100
    return labels


def reference(model, made):
    """Sum and count over separate documents of a float64 copy."""
    model = copy.deepcopy(model).double()
    total = count = 0
    for tokens in made:
        ids = torch.tensor([tokens])
        labels = unshifted(tokens)
        logits = model.output_layer(model.embedding(ids))[..., :VOCAB]
        loss, n = naive_sum(logits, labels, shift=True, lam=0.3, gamma=0.9)
        total, count = total + loss, count + n
    (total / count).backward()
    return total / count, {n: p.grad for n, p in model.named_parameters()}


def row(tokens):
    """Inputs, shifted labels and mask of a document, as data sets for fine-tuning make them."""
    mask = (unshifted(tokens)[0, 1:] != -100).float().tolist()
    return tokens[:-1], tokens[1:], mask, list(range(len(tokens) - 1))


def padded(made):
    rows = [row(tokens) for tokens in made]
    width = max(len(r[0]) for r in rows)
    parts = (torch.tensor([list(r[i]) + [0] * (width - len(r[i])) for r in rows]) for i in range(4))
    ids, labels, mask, positions = parts
    return {"input_ids": ids, "labels": labels, "loss_mask": mask, "position_ids": positions}


def one_row(made):
    """One after the other, with positions that start again (``reset_position_ids``)."""
    rows = [row(tokens) for tokens in made]
    parts = (torch.tensor([[x for r in rows for x in r[i]]]) for i in range(4))
    ids, labels, mask, positions = parts
    return {"input_ids": ids, "labels": labels, "loss_mask": mask, "position_ids": positions}


def thd(made):
    """As Megatron's packed sequences: ``cu_seqlens`` in the place of positions."""
    batch = one_row(made)
    ends = torch.tensor([0, *(len(tokens) - 1 for tokens in made)]).cumsum(0).int()
    batch["position_ids"] = torch.arange(batch["labels"].shape[1])[None]
    batch["packed_seq_params"] = types.SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_q_padded=None
    )
    return batch


def run(model, batch):
    """As a forward step calls the model."""
    rest = {k: batch[k] for k in ("labels", "loss_mask", "packed_seq_params") if k in batch}
    return model(batch["input_ids"], batch["position_ids"], None, **rest)


@pytest.mark.parametrize("make", [padded, one_row, thd])
def test_micro_batches_are_float64_autograd_of_the_separate_documents(make):
    torch.manual_seed(0)
    model, made = GPTModel(), documents()
    expected, gradients = reference(model, made)
    model = apply_iqlearn(model, **OPTIONS)
    batches = [make(made[:2]), make(made[2:])]
    total = sum(batch["loss_mask"].sum() for batch in batches)
    losses = []
    for batch in batches:
        output = run(model, batch)
        assert output.shape == batch["labels"].shape and output.dtype == torch.float32
        loss, _ = loss_func(batch["loss_mask"], output)
        (loss / total).backward()
        losses.append(loss.detach() / total)
    close_loss(sum(losses), expected)
    for name, parameter in model.named_parameters():
        close_loss(parameter.grad, gradients[name])


def test_columns_of_a_tensor_parallel_group():
    """A group of one: who has which columns is tests/torch/test_parallel.py's."""
    torch.manual_seed(0)
    model, made = GPTModel(), documents()
    expected, gradients = reference(model, made)
    batch = padded(made)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        model = apply_iqlearn(model, vocab_group=group, **OPTIONS)
        loss, count = loss_func(batch["loss_mask"], run(model, batch))
        (loss / count).backward()
    finally:
        torch.distributed.destroy_process_group()
    close_loss(loss.detach() / count, expected)
    for name, parameter in model.named_parameters():
        close_loss(parameter.grad, gradients[name])


def test_the_group_is_the_models_own():
    groups = types.SimpleNamespace(tp="the ranks")
    model = GPTModel(tensor_model_parallel_size=2)
    model.pg_collection = groups
    assert apply_iqlearn(model).compute_language_model_loss.vocab_group == "the ranks"
    gathered = GPTModel(tensor_model_parallel_size=2)
    gathered.parallel_output = False
    assert apply_iqlearn(gathered).compute_language_model_loss.vocab_group is None


def test_documents_of_a_pre_training_data_set_end_at_the_end_token():
    """Positions run on, and the end token predicts the next document's first, as Megatron has it.

    So with ``eos_token_id`` it is the naive loss of the whole row.
    """
    from .. import naive

    torch.manual_seed(0)
    model = GPTModel()
    stream = torch.tensor([[t for tokens in documents() for t in tokens]])
    batch = {
        "input_ids": stream[:, :-1],
        "labels": stream[:, 1:],
        "loss_mask": torch.ones(1, stream.shape[1] - 1),
        "position_ids": torch.arange(stream.shape[1] - 1)[None],
    }
    logits = model.output_layer(model.embedding(stream[:, :-1])).double()[..., :VOCAB]
    options = {"lam": 0.3, "gamma": 0.9, "eos_token_id": END}
    expected, _ = naive.loss("iqlearn_loss", logits, batch["labels"], reduction="none", **options)
    output = run(apply_iqlearn(model, vocab_size=VOCAB, **options), batch)
    close_loss(output, expected)


def test_a_forward_without_labels_and_a_stage_without_the_head_are_left_alone():
    made = documents()
    model, batch = GPTModel(), padded(made)
    expected = model(batch["input_ids"], batch["position_ids"], None)
    logits = apply_iqlearn(model, **OPTIONS)(batch["input_ids"], batch["position_ids"], None)
    assert torch.equal(logits, expected)
    stage = apply_iqlearn(GPTModel(post_process=False), **OPTIONS)
    assert stage(batch["input_ids"], batch["position_ids"], None).ndim == 3


def test_what_is_refused():
    batch = padded(documents())
    without = {k: v for k, v in batch.items() if k != "loss_mask"}
    with pytest.raises(ValueError, match="loss_mask=None: which labels count is unknown"):
        run(apply_iqlearn(GPTModel(), **OPTIONS), without)
    counted = apply_iqlearn(GPTModel(), without_loss_mask="all", **OPTIONS)
    assert (run(counted, without) > 0).all()
    unshifted = batch | {"labels": batch["input_ids"]}
    with pytest.raises(ValueError, match="the labels are not shifted, and each row would predict"):
        run(apply_iqlearn(GPTModel(), **OPTIONS), unshifted)
    with pytest.raises(ValueError, match="logits of 16 columns; accepted: at least vocab_size=17"):
        run(apply_iqlearn(GPTModel(), vocab_size=17), batch)
    with pytest.raises(ValueError, match="the model names no group"):
        apply_iqlearn(GPTModel(tensor_model_parallel_size=2))
    for name, value in (("context_parallel_size", 2), ("mtp_num_layers", 1)):
        with pytest.raises(NotImplementedError, match=f"{name}={value}"):
            apply_iqlearn(GPTModel(**{name: value}))
    with pytest.raises(TypeError, match="no option 'reduction', which Megatron decides"):
        apply_iqlearn(GPTModel(), reduction="sum")
    with pytest.raises(ValueError, match="without_loss_mask='none'"):
        apply_iqlearn(GPTModel(), without_loss_mask="none")
    with pytest.raises(RuntimeError, match="outside the model's forward"):
        apply_iqlearn(GPTModel()).compute_language_model_loss(None, None)


class Fused(GPTModel):
    """A forward that computes its loss elsewhere, as fused output layers do."""

    def forward(self, input_ids, position_ids, attention_mask, labels=None, loss_mask=None):
        return F.cross_entropy(self.output_layer(self.embedding(input_ids)).mT, labels)


def test_a_forward_with_a_loss_of_its_own_is_noticed():
    with pytest.raises(RuntimeError, match="computed a loss without compute_language_model_loss"):
        run(apply_iqlearn(Fused(), **OPTIONS), padded(documents()))
