"""IQLearn in Hugging Face Transformers: models, the Trainer and its logs.

The model's own loss becomes IQLearn, in a Trainer and in a plain loop alike::

    model = apply_iqlearn(model, lam=0.1)
    trainer = Trainer(model, args, train_dataset=data)
    IQLearnCallback().attach(trainer)
    trainer.train()

``iqlearn_loss_func`` is for a model that should stay as it is. Both give sum / num_items_in_batch,
for which the Trainer counts the labels of the whole accumulated batch over all ranks, and the mean
over the labelled rows where nobody counts. ``eval_loss`` is then the training loss as well; the
perplexity is exp(eval_nll), and ``IQLearnCallback`` logs that nll.
"""

from irl_ops.integrations.transformers.callbacks import (
    ApplyIQLearn,
    IQLearnCallback,
    LamScheduleCallback,
)
from irl_ops.integrations.transformers.callbacks import IQLearnCallback, LamScheduleCallback
from irl_ops.integrations.transformers.gail import GAILTrainer
from irl_ops.integrations.transformers.gail_arguments import GAILArguments
from irl_ops.integrations.transformers.loss import iqlearn_loss_func
from irl_ops.integrations.transformers.model import apply_iqlearn
from irl_ops.integrations.transformers.online import OnlineIQLearnArguments, OnlineIQLearnTrainer
from irl_ops.integrations.transformers.sampling import (
    ContinuousSampler,
    GenerateSampler,
    Sampler,
    VLLMSampler,
)

__all__ = [
    "ApplyIQLearn",
    "IQLearnCallback",
    "LamScheduleCallback",
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
