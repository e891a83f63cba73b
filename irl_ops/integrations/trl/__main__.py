"""TRL's command line with IQLearn: ``python -m irl_ops.integrations.trl --config sft.yaml``.

It takes what ``trl sft`` takes, and the fields of ``IQLearnConfig`` (``--lam 0.1``).
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from irl_ops.integrations.trl import IQLearnConfig, IQLearnSFTTrainer


def main(arguments: Sequence[str] | None = None) -> IQLearnSFTTrainer:
    """Trains, and saves the model into ``output_dir``."""
    parser = TrlParser((ScriptArguments, IQLearnConfig, ModelConfig, DatasetMixtureConfig))
    script, args, model, mixture = parser.parse_args_and_config(arguments)
    if mixture.datasets:
        data = get_dataset(mixture)
    elif script.dataset_name:
        data = load_dataset(
            script.dataset_name, script.dataset_config, streaming=script.dataset_streaming
        )
    else:
        raise ValueError("dataset_name=None and no datasets; accepted: one of them")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    evaluates = args.eval_strategy != "no"
    trainer = IQLearnSFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    return trainer


if __name__ == "__main__":
    main()
