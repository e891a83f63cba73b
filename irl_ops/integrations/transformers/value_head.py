"""A value head of one's own (A.1.1): V is a linear function of the last hidden state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

NAME = "value_head"
SAVED = "iqlearn_value_head"  # in the model's configuration


def add_value_head(base: PreTrainedModel) -> None:
    """Gives the model a submodule ``value_head`` [1, D], zero at first, or as it was saved.

    Where the configuration says that the checkpoint has one, its weights are read from there.

    Raises:
        ValueError: PEFT is there already, and would neither train nor save it; the checkpoint has
            lost it.
    """
    if getattr(base, NAME, None) is not None:
        return
    if getattr(base, "peft_config", None):
        raise ValueError(
            "value_head=True after PEFT, which would neither train nor save it; accepted: "
            "apply_iqlearn(model, value_head=True) first, then get_peft_model(model, "
            f"LoraConfig(..., modules_to_save=[{NAME!r}]))"
        )
    layer = cast(Any, base).get_output_embeddings()
    weight = layer.weight
    # ZeRO-3 may have parted the weight already, and left no shape
    width = getattr(layer, "in_features", None) or weight.shape[-1]
    head = nn.Linear(width, 1, device=weight.device, dtype=weight.dtype)
    saved = _saved(base) if getattr(base.config, SAVED, False) else None
    if saved is None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        head.load_state_dict(saved)
    setattr(base, NAME, head)
    setattr(base.config, SAVED, True)


def values_of(base: nn.Module, hidden: Tensor) -> Tensor | None:
    """The values [B, T] of hidden states [B, T, D]; None for a model without the head.

    Raises:
        ValueError: PEFT has frozen the head.
    """
    head: Any = getattr(base, NAME, None)
    if head is None:
        return None
    parameters = list(head.parameters())
    if base.training and torch.is_grad_enabled() and not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"{NAME} is frozen, and PEFT would not save it; accepted: modules_to_save=[{NAME!r}] "
            "in the configuration of PEFT"
        )
    return column(head, hidden)


def column(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a head of one column says of hidden states [..., D]; float32, or float64 as they are."""
    found: Tensor = head(hidden.to(next(head.parameters()).dtype))[..., 0]
    return found if found.dtype == torch.float64 else found.float()


def _saved(base: PreTrainedModel) -> dict[str, Tensor]:
    """The head's weights in the checkpoint that the model came from."""
    from safetensors import safe_open

    source = str(base.name_or_path)
    found: dict[str, Tensor] = {}
    for path in _files(source):
        with safe_open(path, framework="pt") as file:
            for key in set(file.keys()):
                if key.startswith(f"{NAME}."):
                    found[key.removeprefix(f"{NAME}.")] = file.get_tensor(key)
    if not found:
        raise ValueError(
            f"{source!r} has no {NAME}, though its configuration says {SAVED}=True; accepted: a "
            f"checkpoint with it in safetensors, or model.config.{SAVED} = False for a new one"
        )
    return found


def _files(source: str) -> list[str]:
    """The files of weights, one or the shards of an index."""

    def file(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)

    if (whole := file("model.safetensors")) is not None:
        return [whole]
    if (index := file("model.safetensors.index.json")) is None:
        return []
    places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    names = {place for key, place in places.items() if key.startswith(f"{NAME}.")}
    return [path for name in sorted(names) if (path := file(name)) is not None]
