"""Answers of the current policy to prompts, by whatever engine generates them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.integrations.transformers.value_head import NAME

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig


class Sampler(Protocol):
    """Generates answers; it knows nothing of losses, and a trainer nothing of how it is done."""

    def sample(self, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """An answer to each prompt, without the prompt; an end token, where one came, is kept."""


class GenerateSampler:
    """``model.generate``, prompts padded on the left, a batch of them at a time.

    Args:
        max_new_tokens: the length at which an answer is cut off.
        temperature: of the softmax; 0 takes the likeliest token each time.
        batch_size: prompts in one call of ``generate``. They are sorted by length first.
        **options: more of ``transformers.GenerationConfig``, such as ``top_p`` or ``num_beams``.
    """

    def __init__(
        self, max_new_tokens: int, temperature: float = 1.0, batch_size: int = 16, **options: Any
    ) -> None:
        self.batch_size = batch_size
        self.options = _generation(max_new_tokens, temperature) | options

    def sample(self, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """See ``Sampler``."""
        base = transformers_model(model)
        ends = end_tokens(base)
        config = _config(self.options, base, use_cache=True, **_start(base))
        answers: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids, mask = _left_padded([prompts[i] for i in chosen], pad_token(base), base.device)
            generate = cast(Any, model).generate
            found = generate(input_ids=ids, attention_mask=mask, generation_config=config)
            skip = 1 if base.config.is_encoder_decoder else ids.shape[1]
            for i, answer in zip(chosen, found[:, skip:].tolist(), strict=True):
                answers[i] = until_end(answer, ends)
        return [answers[i] for i in range(len(prompts))]


class ContinuousSampler:
    """The continuous batching of Transformers (``model.generate_batch``), for decoders.

    Sequences that end make room for others at once. It needs a model whose attention runs paged.

    Args:
        max_new_tokens: the length at which an answer is cut off.
        temperature: of the softmax; 0 takes the likeliest token each time.
        batching: the memory that it may take, among others; by default nearly all that is free.
        **options: more of ``transformers.GenerationConfig``.

    Raises:
        RuntimeError: when sampling, some prompts were not answered.
    """

    def __init__(
        self,
        max_new_tokens: int,
        temperature: float = 1.0,
        batching: ContinuousBatchingConfig | None = None,
        **options: Any,
    ) -> None:
        from transformers import ContinuousBatchingConfig

        self.batching = batching or ContinuousBatchingConfig()
        self.options = _generation(max_new_tokens, temperature) | options

    def sample(self, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """See ``Sampler``."""
        base = transformers_model(model)
        seed = int(torch.randint(2**31, ()))  # its thread has random numbers of its own
        found = cast(Any, base).generate_batch(
            inputs=prompts,
            generation_config=_config(self.options, base),
            continuous_batching_config=replace(self.batching, seed=seed),
            warmup=False,
        )
        if len(found) != len(prompts):
            raise RuntimeError(
                f"continuous batching answered {len(found)} of {len(prompts)} prompts; what went "
                "wrong is in the log of Transformers"
            )
        ends = end_tokens(base)
        return [until_end(list(answer.generated_tokens), ends) for answer in found.values()]


class VLLMSampler:
    """A vLLM server, by TRL's client; it is sent the weights before it samples.

    Start the server as TRL's documentation says, and on the main process let the client join it
    (``client.init_communicator(device)``). For decoders without adapters.

    Args:
        client: ``trl.generation.vllm_client.VLLMClient(base_url=...)``.
        max_new_tokens: the length at which an answer is cut off.
        temperature: of the softmax.
        main_process: whether this process sends the weights.
        **options: more of ``client.generate``, such as ``top_p``.

    Raises:
        ValueError: the main process's client has not joined the server: its weights would be old.
    """

    def __init__(
        self,
        client: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        main_process: bool = True,
        **options: Any,
    ) -> None:
        if main_process and client.communicator is None:
            raise ValueError(
                "client has no communicator, so that the server would keep its first weights; "
                "accepted: a client after client.init_communicator(device)"
            )
        self.client, self.main_process = client, main_process
        self.options = {"max_tokens": max_new_tokens, "temperature": temperature, **options}

    def sample(self, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        """See ``Sampler``."""
        base = transformers_model(model)
        if base is not model or base.config.is_encoder_decoder:
            raise ValueError(
                f"model={type(model).__name__}; accepted by VLLMSampler: a decoder without adapters"
            )
        if self.main_process:
            weights = [
                (name, weight.data)
                for name, weight in base.named_parameters()
                if not name.startswith(f"{NAME}.")  # vLLM's model has no value head
            ]
            described = [
                (n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in weights
            ]
            self.client.update_named_params(described, iter(weights))
            self.client.reset_prefix_cache()  # its keys and values are of the old weights
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        ends = end_tokens(base)
        found = self.client.generate(prompts, **self.options)["completion_ids"]
        return [until_end(answer, ends) for answer in found]


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer.

    Raises:
        ValueError: there is none.
    """
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return list(ends) if isinstance(ends, list | tuple) else [int(ends)]
    raise ValueError(
        "model.generation_config.eos_token_id is None, so no answer would ever end; accepted: a "
        "token, or a list of them"
    )


def pad_token(model: PreTrainedModel) -> int:
    """What fills up short rows, behind a mask: the padding token, or else an end token."""
    for config in (model.generation_config, model.config):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return end_tokens(model)[0]


def until_end(answer: list[int], ends: list[int]) -> list[int]:
    """``answer`` up to its first end token, and with it."""
    for t, token in enumerate(answer):
        if token in ends:
            return answer[: t + 1]
    return answer


def _generation(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; accepted: 1 or more")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; accepted: 0 or more")
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
    }


def _config(options: dict[str, Any], model: PreTrainedModel, **more: Any) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        **options, eos_token_id=end_tokens(model), pad_token_id=pad_token(model), **more
    )


def _start(model: PreTrainedModel) -> dict[str, int]:
    if not model.config.is_encoder_decoder:
        return {}
    start = model.generation_config.decoder_start_token_id
    if start is None:
        start = model.config.decoder_start_token_id
    return {} if start is None else {"decoder_start_token_id": start}


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")
