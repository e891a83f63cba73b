"""IQLearn in Hugging Face Transformers: models, the Trainer and its logs.

The model's own loss becomes IQLearn, in a Trainer and in a plain loop alike::

    model = apply_iqlearn(model, lam=0.1)
    trainer = Trainer(model, args, train_dataset=data)
    IQLearnCallback().attach(trainer)
    trainer.train()

``OnlineIQLearnTrainer`` and ``GAILTrainer`` sample the policy as well: docs/systems.md.

``iqlearn_loss_func`` is for a model that should stay as it is. Both give sum / num_items_in_batch,
for which the Trainer counts the labels of the whole accumulated batch over all ranks, and the mean
over the labelled rows where nobody counts. ``eval_loss`` is then the training loss as well; the
perplexity is exp(eval_nll), and ``IQLearnCallback`` logs that nll.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irl_ops.integrations.transformers.callbacks import (
    ApplyIQLearn,
    IQLearnCallback,
    LamScheduleCallback,
)
from irl_ops.integrations.transformers.loss import iqlearn_loss_func
from irl_ops.integrations.transformers.model import apply_iqlearn

if TYPE_CHECKING:
    from irl_ops.integrations.transformers.gail import GAILTrainer
    from irl_ops.integrations.transformers.gail_arguments import GAILArguments
    from irl_ops.integrations.transformers.online import (
        OnlineIQLearnArguments,
        OnlineIQLearnTrainer,
    )
    from irl_ops.integrations.transformers.sampling import (
        ContinuousSampler,
        GenerateSampler,
        Sampler,
        VLLMSampler,
    )

__all__ = [
    "ApplyIQLearn",
    "ContinuousSampler",
    "GAILArguments",
    "GAILTrainer",
    "GenerateSampler",
    "IQLearnCallback",
    "LamScheduleCallback",
    "OnlineIQLearnArguments",
    "OnlineIQLearnTrainer",
    "Sampler",
    "VLLMSampler",
    "apply_iqlearn",
    "iqlearn_loss_func",
]

LATER = {
    **dict.fromkeys(("OnlineIQLearnArguments", "OnlineIQLearnTrainer"), "online"),
    "GAILTrainer": "gail",
    "GAILArguments": "gail_arguments",
    **dict.fromkeys(("ContinuousSampler", "GenerateSampler", "Sampler", "VLLMSampler"), "sampling"),
}
"""What is imported when it is asked for: trainers bring accelerate and more with them."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
