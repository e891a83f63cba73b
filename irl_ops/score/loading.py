"""Model and tokenizer, as the command line names them."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from irl_ops.score.scorer import Scorer


class LoadError(ValueError):
    """What cannot be loaded, and why."""


def load(options: argparse.Namespace) -> Scorer:
    """The scorer of ``--model``, on ``--device``.

    Raises:
        LoadError: no such model, tokenizer or device.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = device_of(options.device)
    try:
        config = AutoConfig.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(options.model, dtype=options.dtype)
    except (OSError, ValueError, ImportError) as error:
        raise LoadError(f"--model {options.model}: {error}") from error
    try:
        return Scorer(
            model.to(device),
            tokenizer,
            gamma=options.gamma,
            separator=options.separator,
            max_length=options.max_length,
            stored_logits=options.stored_logits,
        )
    except ValueError as error:
        raise LoadError(f"--model {options.model}: {error}") from error


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU that is there, or the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(
            f"--device {name}: {str(error).splitlines()[0]}; accepted: cpu, or cuda where "
            "there is one"
        ) from error
    return device
