"""The functions under TRL's names against the ones of the TRL that is installed."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.kernels import ChunkedLogProbFunction

from irl_ops.integrations.rl import __main__ as lines
from irl_ops.integrations.rl import trl
from irl_ops.torch import sft

from .test_trl import tokenizer
from .tiny_transformers import VOCAB, gemma2, llama

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
V = 70
# Both compute in float32, by sums of up to 70 numbers in another order.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def agree(ours, theirs, *leaves):
    """Results, and gradients of a random sum of those that have some."""
    given = [[x.clone().requires_grad_() for x in leaves] for _ in range(2)]
    pairs = []
    for function, inputs in zip((ours, theirs), given, strict=True):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        weighted = [
            (x * torch.randn(x.shape, generator=generator)).sum()
            for x in outputs
            if x is not None and x.requires_grad
        ]
        pairs.append((outputs, torch.autograd.grad(sum(weighted), inputs)))
    (a, grad_a), (b, grad_b) = pairs
    for x, y in zip((*a, *grad_a), (*b, *grad_b), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype and x.requires_grad == y.requires_grad
            torch.testing.assert_close(x, y, **CLOSE)


def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5, V, generator=generator)
    index = torch.randint(V, (3, 5, 4), generator=generator)
    return logits, index, torch.rand(3, 5, generator=generator) < 0.7


@pytest.mark.parametrize(
    "name", ["selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits"]
)
def test_same_arguments(name):
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (trl, trl_utils))
    for x, y in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (x.name, x.default, x.kind) == (y.name, y.default, y.kind)


def test_same_results():
    logits, index, mask = batch()
    one = index[..., 0]
    several = mask[..., None].expand_as(index)
    for name, *arguments in (
        ("selective_log_softmax", one),
        ("selective_log_softmax", one, 0.7, mask.long()),
        ("selective_log_softmax", index, 1.3),
        ("selective_log_softmax", index, 1.3, several),
        ("selective_log_softmax_and_entropy", one),
        ("selective_log_softmax_and_entropy", one, True, 0.7, mask),
        ("selective_log_softmax_and_entropy", one, False, 0.7, mask),
        ("entropy_from_logits",),
    ):
        agree(
            lambda x, name=name, more=arguments: getattr(trl, name)(x, *more),
            lambda x, name=name, more=arguments: getattr(trl_utils, name)(x, *more),
            logits,
        )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), None])
def test_same_statistics_of_hidden_states(softcap, outputs):
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        0.5 * torch.randn(shape, generator=generator) for shape in ((40, 6), (V, 6), (V,))
    )
    targets = torch.randint(V, (40,), generator=generator)
    with torch.no_grad():  # the largest logit, twice: the first of the two is the one
        weight[7], bias[7] = weight[9], bias[9]
        targets[:20] = (hidden @ weight.T + bias)[:20].argmax(-1)
        targets[:20][targets[:20] == 7] = 9
    more = () if outputs is None else (outputs,)

    def call(function):
        return lambda h, w, b: function.apply(h, w, b, targets, 0.7, 32, softcap, 1.5, *more)

    agree(call(trl.ChunkedLogProbFunction), call(ChunkedLogProbFunction), hidden, weight, bias)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_lines_serve_the_fused_head(make, monkeypatch):
    """Of a soft-capped model too."""
    for name in ("_ChunkedLogProbFunction", "entropy_from_logits"):
        monkeypatch.setattr(trl_utils, name, getattr(trl_utils, name))  # put back in the end
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        monkeypatch.setattr(trl_utils, name, getattr(trl_utils, name))
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (2, 7))
    labels = ids.clone()
    labels[0, :3] = -100

    def step():
        model = make()
        every = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=every)
        out = model(ids, labels=labels, fused_lm_head=True)
        (out.loss - 0.1 * out.entropy.mean()).backward()
        return [getattr(out, name).detach() for name in every], model.lm_head.weight.grad

    (before, slope), code = step(), lines.LINES["trl"]
    exec("\n".join(line.strip() for line in code.splitlines()), {})
    assert trl_utils._ChunkedLogProbFunction is trl.ChunkedLogProbFunction
    after, ours = step()
    for x, y in zip((*after, ours), (*before, slope), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_dft_is_that_of_sft_trainer(tmp_path):
    data = Dataset.from_list([{"text": "w5 w6 w7 w8"}, {"text": "w9 w5"}, {"text": "w7 w7 w6"}])
    config = SFTConfig(
        output_dir=str(tmp_path), loss_type="dft", per_device_train_batch_size=3, bf16=False,
        use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = SFTTrainer(llama(), config, train_dataset=data, processing_class=tokenizer())
    inputs = next(iter(trainer.get_train_dataloader()))
    for items in (None, torch.tensor(17)):
        theirs = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items)
        logits = trainer.model(inputs["input_ids"], inputs["attention_mask"]).logits
        ours = sft.dft_loss(logits, inputs["labels"], shift=True, num_items=items)
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_example_trains_alike_and_holds_less(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # the examples are scripts, not a package
    grpo_trl = pytest.importorskip("grpo_trl")
    assert Path(grpo_trl.__file__).parent == EXAMPLES
    theirs, megabytes = grpo_trl.train(3, 32), grpo_trl.held_megabytes(grpo_trl.head(256, 4096))
    with grpo_trl.put_in_place():
        ours, fewer = grpo_trl.train(3, 32), grpo_trl.held_megabytes(grpo_trl.head(256, 4096))
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert len(ours.losses) == 3 and any(abs(x) > 1e-3 for x in ours.losses)
    assert ours.rewards == theirs.rewards
    # float32 sums in another order; Adam's first steps turn a relative error into an absolute one
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    for x, y in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-3)
    assert fewer < megabytes / 2
    sys.modules.pop("grpo_trl")
