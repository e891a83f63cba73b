"""What a model may do with logits that are never stored, and what is refused aloud."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from irl_ops.integrations.transformers import apply_iqlearn
from irl_ops.integrations.transformers.fused import Made, UnstoredLogits
from irl_ops.torch import linear_token_stats

from .tiny_transformers import OPTIONS, VOCAB, close_loss, collate, examples, llama, naive_loss


def fused(model):
    return apply_iqlearn(model, fused_linear=True, **OPTIONS).train()


CAP = torch.tensor(0.7)
BIAS = torch.linspace(-1, 1, VOCAB)
TREATMENTS = {
    "nothing": lambda q: q,
    "scale": lambda q: q * 0.3,
    "scale in front": lambda q: torch.tensor(0.3) * q,
    "scale in place": lambda q: q.mul_(0.3),
    "divisor": lambda q: q / 0.4,
    "cap": lambda q: torch.tanh(q / 0.7) * 0.7,
    "cap by a tensor": lambda q: CAP * (q / CAP).tanh(),
    "scale and cap": lambda q: 0.7 * torch.tanh(0.3 * q.float() / 0.7).to(torch.float32),
    "unequal cap": lambda q: 3 * torch.tanh(q / 0.7) / 2,
    "cap in place": lambda q: q.div_(0.7).tanh_().mul_(0.7),
    "bias": lambda q: q + BIAS,
    "bias and cap": lambda q: 0.7 * torch.tanh((q + BIAS[None]) / 0.7),
    "all of them": lambda q: q[..., :].contiguous()[:, :, :],
}


@pytest.mark.parametrize("treat", TREATMENTS.values(), ids=TREATMENTS)
def test_scales_caps_and_biases_are_taken_down(treat):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, VOCAB)
    hidden, labels = torch.randn(2, 5, 8), torch.randint(VOCAB, (2, 5))
    expected = treat(layer(hidden).detach())
    value = []

    def compute(logits):
        stats = linear_token_stats(logits.hidden, logits.weight, labels, **logits.layer)
        value.append(stats.value)
        return logits.iqlearn_loss(labels)[0]

    treat(UnstoredLogits(Made(layer, hidden), torch.float32)).within_layer(compute)
    close_loss(value[0], expected.double().logsumexp(-1))
    assert "forward" not in vars(layer)


class MaskedLlama(LlamaForCausalLM):
    """A head with something that is neither scale nor cap."""

    def head(self, hidden):
        return self.lm_head(hidden).masked_fill(torch.arange(VOCAB) > 30, -1e9)

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        logits = self.head(self.model(input_ids, attention_mask=attention_mask)[0])
        return {"loss": self.loss_function(logits=logits, labels=labels), "logits": logits}


class UnlinkedLlama(MaskedLlama):
    def head(self, hidden):
        return hidden @ self.lm_head.weight.T


class TrainedScaleLlama(MaskedLlama):
    def head(self, hidden):
        return self.lm_head(hidden) * self.model.norm.weight[0]


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (MaskedLlama, "calls masked_fill on its logits; accepted: a scale"),
        (UnlinkedLlama, "logits that the module of model.get_output_embeddings.. has not made"),
        (TrainedScaleLlama, "mul by a tensor that is trained"),
    ],
)
def test_other_heads_are_refused(model_class, message):
    model = fused(model_class(llama().config))
    batch = collate(examples(model))
    with pytest.raises(NotImplementedError, match=message):
        model(**batch)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert apply_iqlearn(model)(**batch)["loss"] > 0


REFUSED = {
    "a negative scale": (lambda q: -2 * q, "mul by -2"),
    "a cap of a cap": (lambda q: q.tanh().tanh(), "tanh twice"),
    "a bias behind a scale": (lambda q: 2 * q + BIAS, "add of what is no bias"),
    "a number added": (lambda q: q + 1.0, "add of what is no bias"),
    "columns left out": (lambda q: q[..., :20], "the index"),
    "a divisor": (lambda q: 1 / q, "calls"),
    "logits as numbers": (lambda q: q.argmax(-1), "calls argmax"),
    "out of torch.nn": (lambda q: F.cross_entropy(q, BIAS), "calls cross_entropy"),
}


@pytest.mark.parametrize(("treat", "message"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused(treat, message):
    logits = UnstoredLogits(Made(torch.nn.Linear(8, VOCAB), torch.randn(2, 5, 8)), torch.float32)
    with pytest.raises(NotImplementedError, match=f"{message}.* accepted: a scale, a soft cap"):
        treat(logits)


@pytest.mark.parametrize("place", ["forward", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_head_is_refused(place):
    model = fused(llama())
    getattr(model.lm_head, f"register_{place}_hook")(lambda *args: None)
    with pytest.raises(NotImplementedError, match="last layer has the hook"):
        model(**collate(examples(model)))


def test_a_replaced_forward_of_the_head_is_refused():
    model = fused(llama())
    model.lm_head.forward = lambda hidden: 2 * F.linear(hidden, model.lm_head.weight)
    with pytest.raises(NotImplementedError, match="forward of the last layer has been replaced"):
        model(**collate(examples(model)))


def test_a_head_on_a_device_of_its_own():
    """accelerate's device_map puts its own forward around the head's."""
    model = llama()
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", io_same_device=True))
    batch = collate(examples(model))
    expected = naive_loss(copy.deepcopy(llama()).double(), [batch])
    for _ in range(2):
        close_loss(fused(model)(**batch).loss, expected)
    model.lm_head._old_forward = lambda hidden: 2 * hidden
    with pytest.raises(NotImplementedError, match="forward of the last layer has been replaced"):
        model(**batch)


@pytest.mark.parametrize("kind", ["part", "subclass"])
def test_another_weight_is_refused(kind):
    """As of tensor parallelism, whose shards are parameters or DTensors, and of quantisation."""
    model = fused(llama())
    weight = model.lm_head.weight.detach()
    if kind == "part":
        weight = weight[:20]
    else:
        weight = weight.as_subclass(type("Quantised", (torch.Tensor,), {}))
    model.lm_head.register_parameter("weight", None)
    model.lm_head._parameters["weight"] = torch.nn.Parameter(weight)
    with pytest.raises(
        NotImplementedError, match=r"parted over devices .* a plain tensor \[41, 16"
    ):
        model(**collate(examples(model)))
