"""Samplers: padding, ends, cuts; and the buffer's age."""

import inspect
import types
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from transformers import ContinuousBatchingConfig

from irl_ops.integrations.transformers import (
    ContinuousSampler,
    GenerateSampler,
    VLLMSampler,
    apply_iqlearn,
)
from irl_ops.integrations.transformers.episodes import Buffer, Episode, batch_of, prompt_of
from irl_ops.integrations.transformers.sampling import until_end

from .tiny_transformers import VOCAB, collate, llama, t5

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12]]


def greedy(model, prompt, ends, most):
    """Token by token, in float64, without a cache, without padding."""
    encodes = model.config.is_encoder_decoder
    start = [model.config.decoder_start_token_id] if encodes else list(prompt)
    answer = []
    while len(answer) < most and not (answer and answer[-1] in ends):
        ids = torch.tensor([start + answer])
        inputs = (
            {"input_ids": torch.tensor([prompt]), "decoder_input_ids": ids}
            if encodes
            else {"input_ids": ids}
        )
        answer.append(int(model(**inputs).logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("build", [llama, t5])
@pytest.mark.parametrize("end", [False, True])
def test_generate_pads_on_the_left_and_keeps_the_end(build, end):
    model = build().eval()
    if end:  # a token that some of the answers hold
        model.generation_config.eos_token_id = [2, greedy(model.double(), [10], [], 3)[2]]
        model.float()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():
        found = GenerateSampler(5, temperature=0, batch_size=2).sample(model, PROMPTS)
        exact = model.double()
        assert found == [greedy(exact, prompt, ends, 5) for prompt in PROMPTS]
    assert any(answer[-1] in ends for answer in found) or not end


def test_sampling_has_the_policys_distribution():
    """Without top-k, which ``generate`` has by default in many models."""
    model = llama().eval()
    model.generation_config.top_k = 1
    with torch.no_grad():
        torch.manual_seed(0)
        answers = GenerateSampler(1, batch_size=2000).sample(model, [[5, 6]] * 2000)
        p = model(torch.tensor([[5, 6]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=VOCAB)
    # chi^2 with 40 degrees of freedom: below 100 but for one run in a million; the seed is fixed
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 100


def test_continuous_batching_answers_as_generate_does():
    model = llama().eval()
    with torch.no_grad():
        expected = GenerateSampler(3, temperature=0).sample(model, PROMPTS[:2])
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        sampler = ContinuousSampler(3, temperature=0, batching=small)
        assert sampler.sample(model, PROMPTS[:2]) == expected


class Client:
    """What is called of TRL's client; no server runs here."""

    communicator = object()

    def __init__(self):
        self.calls = []

    def update_named_params(self, metadata, named_params):
        self.calls.append("weights")

    def reset_prefix_cache(self):
        self.calls.append("cache")

    def generate(self, prompts, **options):
        self.calls.append(options)
        return {"completion_ids": [[7, 2, 9] for _ in prompts]}


def test_a_server_is_sent_the_weights_first():
    client = Client()
    answers = VLLMSampler(client, 8, top_p=0.9).sample(llama(), PROMPTS)
    assert answers == [[7, 2]] * 3
    assert client.calls == [
        "weights",
        "cache",
        {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9},
    ]
    with pytest.raises(ValueError, match="no communicator"):
        VLLMSampler(types.SimpleNamespace(communicator=None), 8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        VLLMSampler(client, 8).sample(t5(), PROMPTS)


class Session:
    """Answers as vLLM's OpenAI-compatible server does; notes what was posted."""

    def __init__(self):
        self.posted = []

    def post(self, url, **kwargs):
        self.posted.append((url, kwargs.get("json")))
        logprobs = {
            "tokens": ["token_id:7", "token_id:2", "token_id:9"],
            "token_logprobs": [-0.5, -0.25, -1.0],
            "top_logprobs": [None, None, None],
        }
        choices = [
            {"prompt_token_ids": prompt, "token_ids": [7, 2, 9], "logprobs": logprobs}
            for prompt in (kwargs.get("json") or {}).get("prompt", [])
        ]
        answer = {"choices": choices, "success": True}
        return types.SimpleNamespace(status_code=200, json=lambda: answer)


def test_trls_own_client_takes_these_calls(monkeypatch):
    """All of it but its requests and its NCCL transfer, which need a server and a GPU."""
    trl = pytest.importorskip("trl.generation.vllm_client", reason="needs trl")
    sent = []
    transfer = mock.create_autospec(
        trl.VLLMClient.update_named_params,
        side_effect=lambda _, metadata, tensors: sent.append((metadata, dict(tensors))),
    )
    monkeypatch.setattr(trl.VLLMClient, "update_named_params", transfer)
    client = object.__new__(trl.VLLMClient)  # its __init__ asks the server for its model
    client.base_url, client.model, client.session = "http://server", "m", Session()
    client.communicator = object()
    model = apply_iqlearn(llama(), value_head=True)
    answers = VLLMSampler(client, 8, temperature=0.5, top_p=0.9).sample(model, PROMPTS)
    assert answers == [[7, 2]] * 3
    ((metadata, tensors),) = sent
    policy = dict(llama().named_parameters())  # the server's model has no value head
    assert metadata == [(name, "float32", list(x.shape)) for name, x in policy.items()]
    assert list(tensors) == list(policy)
    assert all(torch.equal(tensors[name], model.get_parameter(name)) for name in policy)
    (cache, _), (url, asked) = client.session.posted
    assert (cache, url) == ("http://server/reset_prefix_cache", "http://server/v1/completions")
    wanted = {"prompt": PROMPTS, "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    assert wanted.items() <= asked.items()


def test_the_stand_in_is_called_as_trls_client_is():
    """The calls of ``Client`` fit the signatures of the installed TRL."""
    trl = pytest.importorskip("trl.generation.vllm_client", reason="needs trl")
    for name in ("update_named_params", "reset_prefix_cache"):
        ours, theirs = (inspect.signature(getattr(c, name)) for c in (Client, trl.VLLMClient))
        assert list(ours.parameters) == list(theirs.parameters)
    options = VLLMSampler(Client(), 8, top_p=0.9).options
    inspect.signature(trl.VLLMClient.generate).bind(None, PROMPTS, **options)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        GenerateSampler(0)
    with pytest.raises(ValueError, match="temperature=-1"):
        ContinuousSampler(3, temperature=-1)


def test_the_buffer_forgets():
    buffer = Buffer(max_age=2)
    for step in range(5):
        buffer.add(step, [Episode(step, [1], [2])])
        assert [e.step for e in buffer.episodes] == list(range(max(0, step - 2), step + 1))
    drawn = [episode.step for episode in buffer.draw(7, seed=0)]
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [2, 3, 4]
    again = Buffer(max_age=2)
    again.load([list(entry) for entry in buffer.state()])  # as JSON gives them back
    assert again.episodes == buffer.episodes and again.draw(7, seed=0) == buffer.draw(7, seed=0)
    assert Buffer(0).draw(3, seed=0) == []


@pytest.mark.parametrize("left", [False, True])
def test_a_prompt_is_all_before_the_first_label(left):
    rows = [
        {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]},
        {"input_ids": [0, 6], "labels": [0, 6]},  # 0 is the padding token, too
    ]
    assert prompt_of(collate(rows[:1], left=left), False) == [5, 6]
    assert prompt_of(collate(rows[:1], left=left), True) == [5, 6, 7, 2]
    assert prompt_of(collate(rows[1:], left=left), False) == [0]


def test_rows_of_answers():
    episodes = [Episode(0, [5, 6], [7, 2]), Episode(0, [8], [9])]
    batch = batch_of(episodes, pad=0, ends=[2], encoder_decoder=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 9, -100, -100]]
    aligned = batch_of(episodes, pad=0, ends=[2], encoder_decoder=True)
    assert aligned["labels"].tolist() == [[7, 2], [9, -100]]
    alone = batch_of(episodes[1:], pad=0, ends=[2], encoder_decoder=True)
    assert alone["labels"].tolist() == [[9, -100]]  # a row to bootstrap from
    assert until_end([3, 2, 2, 4], [2]) == [3, 2] and until_end([3], [2]) == [3]
