"""IQLearn in Axolotl: ``plugins: [irl_ops.integrations.axolotl.IQLearnPlugin]``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from irl_ops.integrations.transformers import IQLearnCallback, apply_iqlearn

if TYPE_CHECKING or importlib.util.find_spec("axolotl") is None:

    class BasePlugin:
        """The shape of Axolotl's, where that is not installed."""

else:
    from axolotl.integrations.base import BasePlugin

# What replaces the model's forward or its loss by one that IQLearn would not be called in.
OTHERS = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "use_eaft",
    "orpo_alpha",
)


class IQLearnArgs(BaseModel):
    """The key that the plugin adds to a configuration."""

    iqlearn: dict[str, Any] | None = None
    """``lam``, ``gamma``, ``eos_token_id``, ...: the options of ``apply_iqlearn``."""


class IQLearnPlugin(BasePlugin):
    """Makes IQLearn the loss of the model that Axolotl has loaded, and logs its metrics.

    Sample packing is understood by ``position_ids``, or by the ids that Axolotl's collator writes
    into ``attention_mask``.

    Raises:
        ValueError: no ``iqlearn:`` in the configuration, or a key that puts another loss in its
            place; and as ``apply_iqlearn``.
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the key that it has to accept."""
        return f"{IQLearnArgs.__module__}.{IQLearnArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """After adapters, before the Trainer."""
        options = cfg.get("iqlearn")
        if options is None:
            raise ValueError(
                "iqlearn: is missing from the configuration; accepted: its options, such as "
                "{lam: 0.1, gamma: 0.99}, or {} for the defaults"
            )
        for name in OTHERS:
            if cfg.get(name):
                raise ValueError(f"{name}: {cfg.get(name)!r} beside iqlearn; accepted: no such key")
        apply_iqlearn(model, **dict(options))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Logs "nll", "td", ..., and stops before an update in which IQLearn had no part."""
        return [IQLearnCallback()]
