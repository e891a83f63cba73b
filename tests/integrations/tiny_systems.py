"""What the tests of the sampled trainers share: a task, arguments, and rows of a reference."""

import torch

from .tiny_transformers import VOCAB, collate

EOS, CUT = 2, 4  # answers have at most CUT tokens


class Canned:
    """A sampler whose answers depend on the prompt alone; every other one is cut off."""

    def __init__(self):
        self.episodes = []

    def sample(self, model, prompts):
        assert not model.training and not torch.is_grad_enabled()
        answers = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt))
            length = CUT if sum(prompt) % 2 else CUT - 1
            answer = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            answers.append(answer if length == CUT else [*answer, EOS])
        self.episodes += list(zip(prompts, answers, strict=True))
        return answers


def arguments(kind, tmp_path, **changed):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_new_tokens": CUT,
    }
    return kind(**defaults | changed)


def whole(model, prompt, answer):
    """The logits of the rows that score an answer, and of the row behind it; float64."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs = {"input_ids": [prompt], "decoder_input_ids": [[start, *answer]]}
        first = 0
    else:
        inputs, first = {"input_ids": [prompt + answer]}, len(prompt) - 1
    outputs = model(**{k: torch.tensor(v) for k, v in inputs.items()})
    return outputs.logits[0, first : first + len(answer) + 1]


def answers_of(rows, model):
    """Prompts and answers of ``examples``."""
    if model.config.is_encoder_decoder:
        return [(row["input_ids"], row["labels"]) for row in rows]
    return [(row["input_ids"][:2], row["input_ids"][2:]) for row in rows]


def counting(count, seed=0):
    """Rows that can be learned: a digit, and an answer that counts on from it and ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for first in torch.randint(3, 8, (count,), generator=generator).tolist():
        prompt, answer = [first + 20, first], [first + 1, first + 2, EOS]
        rows.append({"input_ids": prompt + answer, "labels": [-100, -100, *answer]})
    return rows


__all__ = ["CUT", "EOS", "Canned", "answers_of", "arguments", "collate", "counting", "whole"]
