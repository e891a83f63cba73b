"""Two ranks on gloo with parameters parted by FSDP2 take the updates of one process.

They are parted by the Trainer and accelerate themselves, as ``fsdp=True`` asks. pytest starts this
file as a program, with two processes, once for all systems; the models are in float64.
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

STEPS = 2
ENDS = [2, *range(5, 25)]  # answers end early, on one rank before the other
SYSTEMS = ("offline", "value head", "online", "gail", "gail lora")


def main(folder: Path) -> None:
    """The runs of this file as a program."""
    import irl_ops  # noqa: F401

    # The folder as a package, without the repository's root on sys.path: see conftest.py.
    here = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    package = types.ModuleType("tests")
    package.__path__ = [str(here)]
    sys.modules["tests"] = package
    torch.set_num_threads(1)
    offer_fsdp_on_cpus()
    for name in SYSTEMS:
        run(name, folder, 2)
    gc.collect()  # as in test_transformers_ddp.py
    torch.distributed.destroy_process_group()


def offer_fsdp_on_cpus() -> None:
    """accelerate has FSDP for accelerators alone: here it takes the CPU for one, with gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.pop("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def trainer_of(name: str, folder: Path, ranks: int) -> Any:
    """A Trainer of the system on a fresh model, for four demonstrations and samples an update."""
    from transformers import Trainer, TrainingArguments

    from irl_ops.debug.callback import CheckCallback
    from irl_ops.integrations.transformers import (
        GAILArguments,
        GAILTrainer,
        GenerateSampler,
        IQLearnCallback,
        OnlineIQLearnArguments,
        OnlineIQLearnTrainer,
        apply_iqlearn,
    )

    systems = importlib.import_module("tests.integrations.tiny_systems")
    tiny = importlib.import_module("tests.integrations.tiny_transformers")
    model = tiny.llama().double()
    model.generation_config.eos_token_id = ENDS
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // ranks,
        "max_steps": STEPS,
        "logging_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        # a state for torch to save (SGD has none), and no sign of a gradient that is all rounding
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,
    }
    if ranks > 1:
        shared |= {"use_cpu": False, "fsdp": True}
    if name == "gail lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, config).double()
    data = {
        "train_dataset": tiny.examples(model, lengths=(5, 9, 7, 3, 2, 4, 6, 8)),
        "data_collator": systems.collate,
    }
    if name in ("offline", "value head"):
        apply_iqlearn(model, lam=0.1, gamma=0.9, value_head=name == "value head")
        arguments = systems.arguments(dict, folder, **shared)
        del arguments["max_new_tokens"]
        trainer = Trainer(model, TrainingArguments(**arguments), **data)
        if name == "value head":  # which leaves the logits of the other one stored
            IQLearnCallback().attach(trainer)
            CheckCallback(lam=0.1, gamma=0.9).attach(trainer)
        return trainer
    kinds = {"online": (OnlineIQLearnTrainer, OnlineIQLearnArguments, {"refresh_every": 2})}
    gail = {"mle_weight": 0.5, "fused_linear": name == "gail"}
    trainer_class, kind, options = kinds.get(name, (GAILTrainer, GAILArguments, gail))
    sampler = GenerateSampler(4, temperature=0, batch_size=1)
    arguments = systems.arguments(kind, folder, **shared, **options)
    return trainer_class(model, arguments, sampler=sampler, **data)


def run(name: str, folder: Path, ranks: int) -> Any:
    """Two updates with a checkpoint after each; then the second again, from the first."""
    found = []
    for place, checkpoint in (("run", None), ("again", "run/checkpoint-1")):
        if checkpoint is not None and ranks == 1:
            continue  # other tests do that
        trainer = trainer_of(name, folder / name / place, ranks)
        assert trainer.args.world_size == ranks
        trainer.train(resume_from_checkpoint=checkpoint and str(folder / name / checkpoint))
        found += [whole(trainer.model), trainer.state.log_history[0]]
    found.append(trainer.evaluate(trainer.train_dataset))
    if ranks > 1 and trainer.args.process_index == 0:
        torch.save(found, folder / f"{name}.pt")
    return found


def whole(model: Any) -> dict[str, torch.Tensor]:
    """Its parameters, gathered."""
    from torch.distributed.tensor import DTensor

    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    """The folder in which two ranks have left what they found."""
    from .test_transformers_ddp import launch

    folder = tmp_path_factory.mktemp("fsdp")
    launch(__file__, folder, ranks=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_parted_parameters_take_the_updates_of_one_process(name, parted, tmp_path):
    from safetensors.torch import load_file

    before = whole(trainer_of(name, tmp_path / "before", 1).model)
    one, log, evaluation = run(name, tmp_path, 1)
    two, log_two, again, log_again, evaluation_two = torch.load(parted / f"{name}.pt")
    moved = {n: (p - before[n]).norm() for n, p in one.items() if not torch.equal(p, before[n])}
    assert len(moved) > 3 and ("value_head.weight" in moved) == (name == "value head")
    for n, p in one.items():
        # float64 sums in another order, and counts of labels that are float32
        assert (two[n] - p).norm() <= 1e-6 * moved.get(n, 0.0), n
        assert torch.equal(again[n], two[n]), n
    for key in ("loss", "nll", "td", "value_loss", "answer_length", "kl"):
        if key in log:
            assert log_two[key] == pytest.approx(log[key], rel=1e-5), key
    assert evaluation_two["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
    if name != "offline":
        assert evaluation_two["eval_nll"] == pytest.approx(evaluation["eval_nll"], rel=1e-5)
    # what is saved is whole: the policy for from_pretrained, and the networks beside it
    saved = parted / name / "run" / f"checkpoint-{STEPS}"
    weights = load_file(saved / f"{'adapter_' * (name == 'gail lora')}model.safetensors")
    assert sum(x.numel() for x in weights.values()) in (
        sum(p.numel() for n, p in two.items() if part(n))
        for part in (
            lambda n: not n.startswith(("critic", "discriminator", "reference")),
            lambda n: ".default." in n,
        )
    )
    if "gail" in name:
        beside = load_file(saved / "adversaries.safetensors")
        for n, x in beside.items():
            torch.testing.assert_close(x, two[n], rtol=0, atol=0)
        assert {n.partition(".")[0] for n in beside} == {"critic", "discriminator"}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))
