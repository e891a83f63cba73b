"""The networks of GAIL: a policy, its critic, a discriminator, and the policy as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from irl_ops.integrations.transformers.fused import last_layer, unstored_logits
from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.integrations.transformers.ranges import INITIAL_POLICY
from irl_ops.integrations.transformers.reading import Reader, Readout
from irl_ops.integrations.transformers.value_head import column

Found = TypeVar("Found")


class CopiedScorer(nn.Module):
    """A number for each row [B, T]: a copy of a language model whose last layer has one column."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        base = copy.deepcopy(transformers_model(model))
        last: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        base.config.tie_word_embeddings = False
        weight = last.weight
        head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        base.set_output_embeddings(zeroed(head))  # type: ignore[no-untyped-call]
        self.model = base

    def forward(self, **inputs: Tensor) -> Tensor:
        """The scores of a batch."""
        scores: Tensor = self.model(**inputs, use_cache=False).logits[..., 0]
        return scores if scores.dtype == torch.float64 else scores.float()


class AdaptedScorer(nn.Module):
    """A number for each row [B, T]: the policy's frozen trunk, adapters of its own, and a head.

    The trunk belongs to the policy, and is no submodule of this.
    """

    def __init__(self, policy: Any, reader: Reader, adapter: str) -> None:
        super().__init__()
        base = transformers_model(policy)
        last_layer(base)
        if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            raise ValueError(
                "gradient checkpointing runs layers again when other adapters are in use; accepted "
                "with PEFT: gradient_checkpointing=False"
            )
        policy.add_adapter(adapter, copy.deepcopy(policy.peft_config[policy.active_adapter]))
        width = cast(Any, base).get_output_embeddings().weight.shape[1]
        self.head = zeroed(nn.Linear(width, 1, device=base.device))
        self.shared = [policy, base, reader]  # a list: what is in it is not registered
        self.adapter = adapter

    def forward(self, **inputs: Tensor) -> Tensor:
        """The scores of a batch."""
        policy, base, reader = cast(Any, self.shared)
        without = nullcontext() if reader.fused_linear else unstored_logits(base)

        def score(readout: Readout) -> Tensor:
            return column(self.head, readout.hidden)

        with using(policy, self.adapter), without:
            found: Tensor = policy(**inputs, read=score)
        return found


class Adversaries(nn.Module):
    """All of them: one module, so that DDP, an optimizer and a checkpoint hold them together.

    With a PEFT model the trunk is shared, and critic and discriminator are adapters beside the
    policy's; the initial policy is the trunk without any. Otherwise each is a copy of the model.

    Args:
        policy: a Transformers model, or a PEFT model around one.
        fused_linear: the policy's losses store no logits.
        reference: whether the initial policy is needed.

    Raises:
        ValueError: ZeRO-3 has parted the policy's weights already.
    """

    def __init__(self, policy: Any, fused_linear: bool, reference: bool) -> None:
        super().__init__()
        if any(hasattr(weight, "ds_id") for weight in policy.parameters()):
            raise ValueError(
                "model has weights that ZeRO-3 has parted when it was loaded, and copies of them "
                "would be empty; accepted: a model that is loaded before TrainingArguments("
                "deepspeed=...) is made, or FSDP2, ZeRO-2 or DDP"
            )
        self.shared = hasattr(policy, "peft_config")
        self.reference: nn.Module | None = None
        if self.shared:
            reader = Reader(policy, fused_linear)
            self.critic: nn.Module = AdaptedScorer(policy, reader, "critic")
            self.discriminator: nn.Module = AdaptedScorer(policy, reader, "discriminator")
        else:
            self.critic, self.discriminator = CopiedScorer(policy), CopiedScorer(policy)
            if reference:
                self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
                Reader(self.reference, fused_linear).attach()
            reader = Reader(policy, fused_linear)
        reader.attach()
        self.policy = policy
        if self.shared:
            train_all_adapters(policy)

    @property
    def config(self) -> Any:
        """The policy's, which the Trainer asks for."""
        return self.policy.config

    @property
    def model_tags(self) -> Any:
        """Of the policy, for the page of a model that is pushed."""
        return transformers_model(self.policy).model_tags

    @property
    def _no_split_modules(self) -> Any:
        """The layers' classes, which FSDP shards one by one."""
        return transformers_model(self.policy)._no_split_modules

    @property
    def generation_config(self) -> Any:
        """Likewise."""
        return self.policy.generation_config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """For all copies; with adapters it would run layers again under the wrong ones."""
        if self.shared:
            raise ValueError(
                "gradient_checkpointing=True runs layers again when other adapters are in use; "
                "accepted with PEFT: False"
            )
        for module in (self.policy, self.critic.model, self.discriminator.model):
            cast(Any, module).activation_checkpointing_enable(**options)

    gradient_checkpointing_enable = (
        activation_checkpointing_enable  # its name before Transformers 6
    )

    def train(self, mode: bool = True) -> Adversaries:
        """The reference stays in evaluation mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(self, compute: Callable[[Adversaries], Found]) -> Found:
        """``compute`` of these networks, called inside the forward of what wraps them."""
        return compute(self)

    def initial(self, inputs: dict[str, Tensor], read: Callable[[Readout], Tensor]) -> Tensor:
        """``read`` of what the initial policy makes of a batch."""
        with record_function(INITIAL_POLICY):
            if not self.shared:
                found: Tensor = cast(Any, self.reference)(**inputs, read=read)
                return found
            with self.policy.disable_adapter():
                found = self.policy(**inputs, read=read)
            train_all_adapters(self.policy)
            return found

    def beside_policy(self) -> nn.ModuleDict:
        """What a checkpoint holds beside the policy."""
        return nn.ModuleDict({"critic": self.critic, "discriminator": self.discriminator})


def zeroed(head: nn.Linear) -> nn.Linear:
    """A head that says 0 before it is trained."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


@contextmanager
def using(policy: Any, adapter: str) -> Iterator[None]:
    """While it lasts, the trunk is read with that adapter; none of them is frozen by it."""
    before = policy.active_adapter
    policy.set_adapter(adapter)
    train_all_adapters(policy)
    try:
        yield
    finally:
        policy.set_adapter(before)
        train_all_adapters(policy)


def train_all_adapters(policy: Any) -> None:
    """PEFT freezes those that are not in use."""
    names = tuple(policy.peft_config)
    for name, parameter in policy.named_parameters():
        if any(part in names for part in name.split(".")):
            parameter.requires_grad_(True)
