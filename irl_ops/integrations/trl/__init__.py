"""IQLearn in TRL: ``SFTTrainer`` with the loss as fields of its configuration, and its mixin.

A trainer of its own, whose model needs nothing done to it::

    args = IQLearnConfig("out", lam=0.1, gamma=0.99)
    trainer = IQLearnSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

``IQLearnMixin`` goes in front of another subclass of ``SFTTrainer``, and takes a model after
``apply_iqlearn``. ``python -m irl_ops.integrations.trl --config sft.yaml`` is TRL's command line.
"""

from irl_ops.integrations.trl.config import IQLearnConfig
from irl_ops.integrations.trl.mixin import IQLearnMixin
from irl_ops.integrations.trl.trainer import IQLearnSFTTrainer

__all__ = ["IQLearnConfig", "IQLearnMixin", "IQLearnSFTTrainer"]
