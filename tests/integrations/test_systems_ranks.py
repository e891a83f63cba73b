"""Two ranks on gloo, under FSDP2 and DDP, take the updates of one process: each system's.

The Trainer and accelerate part the weights themselves, as ``fsdp=True`` asks. The ranks
are started once for all systems; the models are in float64.
"""

import gc
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ..launch import launch
from . import tiny_systems as systems
from . import tiny_transformers as tiny

STEPS = 2
ENDS = [2, *range(5, 25)]  # answers end early, on one rank before the other
RUNS = {  # by the system, the engines; DDP of the losses alone is test_transformers_ddp.py's
    "offline": ["fsdp"],
    "value head": ["fsdp"],
    "online": ["fsdp", "ddp"],
    "gail": ["fsdp", "ddp"],
    "gail lora": ["fsdp"],
}


def main(folder: Path) -> None:
    """The runs of a rank."""
    torch.set_num_threads(1)
    for engine in ("fsdp", "ddp"):
        choose(engine)
        for name, engines in RUNS.items():
            if engine in engines:
                run(name, folder, engine)
    gc.collect()  # as in test_transformers_ddp.py
    torch.distributed.destroy_process_group()


def choose(engine: str) -> None:
    """accelerate has FSDP for accelerators alone: here it takes the CPU for one, with gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    kind = DistributedType.MULTI_CPU if engine == "ddp" else DistributedType.MULTI_GPU
    PartialState._prepare_backend = lambda *_: ("gloo", kind)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": str(engine == "ddp")}


def trainer_of(name: str, folder: Path, engine: str) -> Any:
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

    model = tiny.llama().double()
    model.generation_config.eos_token_id = ENDS
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 if engine == "one" else 2,
        "max_steps": STEPS,
        "logging_steps": STEPS,
        "save_strategy": "no" if engine == "one" else "steps",
        "save_steps": 1,
        # a state for torch to save (SGD has none), and no sign of a gradient that is all rounding
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,
    }
    if engine == "fsdp":
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


def run(name: str, folder: Path, engine: str) -> Any:
    """Two updates with a checkpoint after each; then the second again, from the first."""
    found = []
    for place, checkpoint in (("run", None), ("again", f"{engine} run/checkpoint-1")):
        if checkpoint is not None and (engine == "one" or name == "offline"):
            continue  # other tests do that
        trainer = trainer_of(name, folder / name / f"{engine} {place}", engine)
        assert trainer.args.world_size == 1 + (engine != "one")
        trainer.train(resume_from_checkpoint=checkpoint and str(folder / name / checkpoint))
        found += [whole(trainer.model), trainer.state.log_history[0]]
    if name == "online" and engine == "fsdp":
        assert_sent_whole(trainer, found[-2])
    found.append(trainer.evaluate(trainer.train_dataset))
    if engine != "one" and trainer.args.process_index == 0:
        torch.save(found, folder / f"{name} {engine}.pt")
    return found


def assert_sent_whole(trainer: Any, weights: dict[str, torch.Tensor]) -> None:
    """A server is sent whole weights, though no process has them."""
    from irl_ops.integrations.transformers import VLLMSampler

    sent: dict[str, torch.Tensor] = {}
    client = types.SimpleNamespace(
        communicator=True,
        update_named_params=lambda told, named: sent.update(named),
        reset_prefix_cache=lambda: None,
        generate=lambda prompts, **_: {"completion_ids": [[2]] * len(prompts)},
    )
    main = trainer.args.process_index == 0
    VLLMSampler(client, 4, main_process=main).sample(trainer.policy(), [[5], [6]])
    assert set(sent) == (set(weights) if main else set())
    assert all(torch.equal(x, weights[n]) for n, x in sent.items())


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
    folder = tmp_path_factory.mktemp("ranks")
    launch(__file__, folder, ranks=2, timeout=900)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_take_the_updates_of_one_process(name, parted, tmp_path):
    before = whole(trainer_of(name, tmp_path / "before", "one").model)
    one, log, evaluation = run(name, tmp_path, "one")
    moved = {n: (p - before[n]).norm() for n, p in one.items() if not torch.equal(p, before[n])}
    assert len(moved) > 3 and ("value_head.weight" in moved) == (name == "value head")
    for engine in RUNS[name]:
        two, log_two, *again, evaluation_two = torch.load(parted / f"{name} {engine}.pt")
        for n, p in one.items():
            # float64 sums in another order, and counts of labels that are float32
            assert (two[n] - p).norm() <= 1e-6 * moved.get(n, 0.0), (engine, n)
            assert not again or torch.equal(again[0][n], two[n]), (engine, n)
        for key in ("loss", "nll", "td", "value_loss", "answer_length", "kl"):
            if key in log:
                assert log_two[key] == pytest.approx(log[key], rel=1e-5), (engine, key)
        for key in ("eval_loss", "eval_nll"):
            if key in evaluation:
                assert evaluation_two[key] == pytest.approx(evaluation[key], rel=1e-5)
        assert_saved_whole(parted / name / f"{engine} run" / f"checkpoint-{STEPS}", name, two)


def assert_saved_whole(folder, name, parameters):
    """The policy for ``from_pretrained``, and the networks beside it."""
    from safetensors.torch import load_file

    lora = name == "gail lora"
    saved = load_file(folder / f"{'adapter_' * lora}model.safetensors")
    beside = ("critic", "discriminator", "reference")
    ours = [n for n in parameters if (".default." in n if lora else not n.startswith(beside))]
    assert len(saved) == len(ours)
    for n, x in saved.items():
        here = n.replace(".weight", ".default.weight") if lora else n
        assert torch.equal(x, parameters["policy." * ("gail" in name) + here]), n
    if "gail" in name:
        saved = load_file(folder / "adversaries.safetensors")
        assert {n.partition(".")[0] for n in saved} == {"critic", "discriminator"}
        assert all(torch.equal(x, parameters[n]) for n, x in saved.items())
