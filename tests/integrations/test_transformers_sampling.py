"""Samplers: padding, ends, cuts; and the buffer's age."""

import types

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from transformers import ContinuousBatchingConfig

from irl_ops.integrations.transformers import ContinuousSampler, GenerateSampler, VLLMSampler
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
