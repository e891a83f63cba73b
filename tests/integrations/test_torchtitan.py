"""The loss as torchtitan 0.3.0 builds and calls it: shifted labels, positions, a global count."""

import copy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

import irl_ops.torch as irl
from irl_ops.integrations.torchtitan import IQLearnLoss, LinearIQLearnLoss

from .. import naive

VOCAB, END = 11, 2
OPTIONS = {"lam": 0.3, "gamma": 0.9, "eos_token_id": END}
# float32 sums of some tens of terms
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)


def documents(lengths):
    """As its data sets make them: inputs tok[:-1], labels tok[1:], positions from 0."""
    made = []
    for length in lengths:
        tokens = [*torch.randint(3, VOCAB, (length,)).tolist(), END]
        made.append((tokens[:-1], tokens[1:], list(range(length))))
    return made


def rows(made):
    """Documents one after the other in rows of 8, the last of each cut off where it ends."""
    ids, labels, positions = ([x for d in made for x in d[i]] for i in range(3))
    usable = len(ids) // 8 * 8
    return [torch.tensor(x[:usable]).reshape(-1, 8) for x in (ids, labels, positions)]


def reference(logits, labels, positions, count):
    """The naive loss: segments by position, the cut ends bootstrap nowhere."""
    options = OPTIONS | {"position_ids": positions, "num_items": count}
    return naive.loss("iqlearn_loss", logits, labels, **options)[0]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    _, labels, positions = rows(documents((5, 3, 7, 1, 9, 4, 6)))
    logits = torch.randn(*labels.shape, VOCAB, requires_grad=True)
    return logits, labels, positions


def test_a_step_is_float64_autograd_over_micro_batches(batch):
    logits, labels, positions = batch
    double = logits.detach().double().requires_grad_()
    count = torch.tensor(labels.numel())
    loss_fn = IQLearnLoss.Config(**OPTIONS, vocab_size=VOCAB).build(compile_config=None)
    total = 0
    for part in (slice(0, 1), slice(1, None)):
        loss, metrics = loss_fn(logits[part], labels[part], count, positions=positions[part])
        loss.backward()
        total += loss.detach()
    expected = reference(double, labels, positions, count)
    expected.backward()
    close(total, expected)
    close(logits.grad, double.grad)
    assert {"nll_mean", "td_mean", "value_mean", "reward_mean"} <= set(metrics)


def test_logits_of_loss_parallelism_are_read_where_they_are(batch):
    """DTensors on a mesh of one: who has which columns is tests/torch/test_parallel_calls.py's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    logits, labels, positions = batch
    double = logits.detach().double().requires_grad_()
    store, count = torch.distributed.HashStore(), torch.tensor(labels.numel())
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        loss_fn = IQLearnLoss.Config(**OPTIONS, vocab_size=VOCAB).build(compile_config=None)
        with loss_parallel():
            pred = DTensor.from_local(logits, mesh, [Shard(-1)])
            loss, _ = loss_fn(pred, labels, count, positions=positions)
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    expected = reference(double, labels, positions, count)
    expected.backward()
    close(loss.detach(), expected.detach())
    close(logits.grad, double.grad)


def test_metrics_add_up_to_the_mean_over_all_tokens(batch):
    logits, labels, positions = batch
    loss_fn = IQLearnLoss.Config(**OPTIONS).build()
    count = torch.tensor(labels.numel())
    parts = [
        loss_fn(logits[i : i + 1], labels[i : i + 1], count, positions=positions[i : i + 1])[1]
        for i in range(len(labels))
    ]
    nll = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    close(sum(m["nll_mean"] for m in parts), nll)


def test_without_a_count_it_is_the_sum(batch):
    logits, labels, positions = batch
    loss, _ = IQLearnLoss.Config(**OPTIONS).build()(logits, labels, positions=positions)
    close(loss, reference(logits.double(), labels, positions, 1))


def test_a_batch_without_positions(batch):
    """As torchtitan's validation calls it."""
    logits, labels, _ = batch
    with pytest.raises(ValueError, match=r"positions=None: .* accepted: positions \[B, T\]"):
        IQLearnLoss.Config(**OPTIONS).build()(logits, labels)
    nll = IQLearnLoss.Config(**OPTIONS, without_positions="nll").build()
    flat = logits.double().flatten(0, 1), labels.flatten()
    close(nll(logits, labels)[0], torch.nn.functional.cross_entropy(*flat, reduction="sum"))
    whole = IQLearnLoss.Config(**OPTIONS, without_positions="documents").build()
    expected = naive.loss("iqlearn_loss", logits.double(), labels, reduction="sum", **OPTIONS)[0]
    close(whole(logits, labels)[0], expected)


class ChunkedLossWrapper:
    """Named and shaped as torchtitan's: it builds its inner loss, and calls it on chunks of T."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        num_chunks: int = 4
        loss_fn: object = field(default_factory=partial(IQLearnLoss.Config, **OPTIONS))

        def build(self, **kwargs):
            return ChunkedLossWrapper(self, **kwargs)

    def __init__(self, config, *, compile_config=None):
        self.num_chunks = config.num_chunks
        self.loss_fn = config.loss_fn.build(compile_config=compile_config)

    def __call__(self, pred, labels, global_valid_tokens=None, **inputs):
        total = 0
        pieces = zip(
            *(
                x.chunk(self.num_chunks, dim=1)
                for x in (pred, labels, *(inputs[k] for k in inputs))
            ),
            strict=True,
        )
        for logits, label, *rest in pieces:
            given = dict(zip(inputs, rest, strict=True))
            total = total + self.loss_fn(logits, label, global_valid_tokens, **given)[0]
        return total, {}


class Renamed(ChunkedLossWrapper):
    """A subclass, as other models of torchtitan have them."""


def test_chunks_are_refused_when_built_and_when_called(batch):
    logits, labels, positions = batch
    message = "IQLearnLoss inside ChunkedLossWrapper: at each cut the next row is missing"
    for wrapper in (ChunkedLossWrapper, Renamed):
        with pytest.raises(RuntimeError, match=message):
            wrapper(ChunkedLossWrapper.Config(), compile_config=None)
    inner = IQLearnLoss.Config(**OPTIONS).build()
    wrapped = ChunkedLossWrapper.__new__(ChunkedLossWrapper)
    wrapped.num_chunks, wrapped.loss_fn = 4, inner
    with pytest.raises(RuntimeError, match=message):
        wrapped(logits, labels, positions=positions)
    # what it would have been: the bare function cannot know
    wrapped.loss_fn = lambda pred, labels, count, positions: (
        irl.iqlearn_loss(pred, labels, position_ids=positions, reduction="sum", **OPTIONS),
        {},
    )
    chunked, _ = wrapped(logits, labels, positions=positions)
    whole, _ = inner(logits, labels, positions=positions)
    assert abs(chunked - whole) > 0.01 * whole


def linear(**options):
    """In the wrapper's place, as the trainer makes it and gives it the last layer."""
    config = LinearIQLearnLoss.Config(loss_fn=IQLearnLoss.Config(**OPTIONS | options))
    return config.build(compile_config=None)


def test_hidden_states_take_the_step_of_float64_autograd(batch):
    """Two micro-batches; the last layer's forward hooks, where FSDP gathers, run once for each."""
    _, labels, positions = batch
    layer = torch.nn.Linear(6, VOCAB)
    hidden = torch.randn(*labels.shape, 6, requires_grad=True)
    double = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    count = torch.tensor(labels.numel())
    expected = reference(double[0](double[1]), labels, positions, count)
    expected.backward()
    loss_fn = linear(vocab_size=VOCAB)
    loss_fn.set_lm_head(layer)
    gathered = []
    layer.register_forward_pre_hook(lambda module, given: gathered.append(given))
    total = 0
    for part in (slice(0, 1), slice(1, None)):
        given = hidden[part], labels[part], count
        loss, metrics = loss_fn(*given, positions=positions[part])
        loss.backward()
        total += loss.detach()
    close(total, expected)
    close(hidden.grad, double[1].grad)
    for ours, theirs in zip(layer.parameters(), double[0].parameters(), strict=True):
        close(ours.grad, theirs.grad)
    assert len(gathered) == 2 and "forward" not in vars(layer)
    assert {"nll_mean", "td_mean", "value_mean", "reward_mean"} <= set(metrics)
    with torch.no_grad():
        close(loss_fn(hidden, labels, count, positions=positions)[0], expected)


def test_hidden_states_that_are_refused(batch):
    _, labels, positions = batch
    hidden = torch.randn(*labels.shape, 6)
    with pytest.raises(RuntimeError, match="lm_head=None; accepted: after set_lm_head"):
        linear()(hidden, labels, positions=positions)
    with pytest.raises(TypeError, match=r"loss_fn=.*; accepted: IQLearnLoss\.Config"):
        LinearIQLearnLoss.Config(loss_fn=ChunkedLossWrapper.Config()).build()
    loss_fn = linear(vocab_size=22)
    loss_fn.set_lm_head(torch.nn.Linear(6, VOCAB))
    with pytest.raises(ValueError, match="lm_head has 11 columns; accepted: vocab_size=22"):
        loss_fn(hidden, labels, positions=positions)
    with pytest.raises(ValueError, match="positions=None"):
        loss_fn(hidden, labels)
    with pytest.raises(TypeError, match=r"inputs \['weights'\]"):
        loss_fn(hidden, labels, positions=positions, weights=labels)
    loss_fn.set_lm_head(torch.nn.Identity())
    with pytest.raises(TypeError, match="lm_head=Identity; accepted: nn"):
        loss_fn(hidden, labels, positions=positions)


def test_the_refusal_of_chunks_names_what_stores_no_logits_either():
    with pytest.raises(RuntimeError, match=r"accepted: .* loss=LinearIQLearnLoss\.Config"):
        ChunkedLossWrapper(ChunkedLossWrapper.Config(), compile_config=None)


def test_bad_options_and_inputs_are_named(batch):
    logits, labels, positions = batch
    with pytest.raises(ValueError, match="lam"):
        IQLearnLoss.Config(lam=-1.0).build()
    with pytest.raises(ValueError, match="without_positions='no'; accepted: 'raise'"):
        IQLearnLoss.Config(without_positions="no").build()
    with pytest.raises(ValueError, match="pred has 11 columns; accepted: vocab_size=22"):
        IQLearnLoss.Config(vocab_size=22).build()(logits, labels, positions=positions)
    with pytest.raises(TypeError, match=r"inputs \['weights'\]; accepted: positions"):
        IQLearnLoss.Config().build()(logits, labels, positions=positions, weights=labels)
