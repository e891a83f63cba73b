"""Two ranks on gloo take the updates of one process, of online IQLearn and of GAIL.

pytest starts this file as a program, with two processes.
"""

import gc
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 3


def main(folder: Path) -> None:
    """The runs of this file as a program."""
    import irl_ops  # noqa: F401

    # The folder as a package, without the repository's root on sys.path: see conftest.py.
    here = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    package = types.ModuleType("tests")
    package.__path__ = [str(here)]
    sys.modules["tests"] = package
    systems = importlib.import_module("tests.integrations.tiny_systems")
    tiny = importlib.import_module("tests.integrations.tiny_transformers")
    torch.set_num_threads(1)
    train(folder, int(os.environ["WORLD_SIZE"]), systems, tiny)
    gc.collect()  # as in test_transformers_ddp.py
    torch.distributed.destroy_process_group()


def train(folder: Path, ranks: int, systems: Any, tiny: Any) -> None:
    """Some updates on four demonstrations and four samples, by however many ranks there are."""
    from irl_ops.integrations.transformers import (
        GAILArguments,
        GAILTrainer,
        OnlineIQLearnArguments,
        OnlineIQLearnTrainer,
    )

    shared = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // ranks,
        "max_steps": STEPS,
        "logging_steps": STEPS,
    }
    for name, trainer_class, kind, options in (
        ("online", OnlineIQLearnTrainer, OnlineIQLearnArguments, {"refresh_every": 2}),
        ("gail", GAILTrainer, GAILArguments, {"mle_weight": 0.5}),
    ):
        model = tiny.llama()
        data = tiny.examples(model, lengths=(5, 9, 7, 3, 2, 4, 6, 8, 1, 5, 7, 2))
        trainer = trainer_class(
            model,
            systems.arguments(kind, folder, **shared, **options),
            sampler=systems.Canned(),
            train_dataset=data,
            data_collator=systems.collate,
        )
        assert trainer.args.world_size == ranks
        trainer.train()
        if trainer.args.process_index == 0:
            found = tiny.parameters(trainer.model), trainer.state.log_history[0]
            torch.save(found, folder / f"{name}-{ranks}.pt")


@pytest.mark.slow
def test_two_ranks_take_the_updates_of_one(tmp_path):
    from . import tiny_systems
    from . import tiny_transformers as tiny
    from .test_transformers_ddp import launch

    train(tmp_path, 1, tiny_systems, tiny)
    launch(__file__, tmp_path, ranks=2)
    for name in ("online", "gail"):
        (one, log_one), (two, log_two) = (
            torch.load(tmp_path / f"{name}-{ranks}.pt") for ranks in (1, 2)
        )
        start = dict(tiny.llama().named_parameters())
        moved = sum(
            (p - start[n.removeprefix("policy.")]).square().sum()
            for n, p in one.items()
            if n.removeprefix("policy.") in start
        )
        apart = sum((p - two[n]).square().sum() for n, p in one.items())
        # float32 sums in another order
        assert apart.sqrt() < 1e-4 * moved.sqrt(), name
        for key in ("loss", "answer_length", "td" if name == "online" else "value_loss"):
            assert log_two[key] == pytest.approx(log_one[key], rel=1e-3), (name, key)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))
