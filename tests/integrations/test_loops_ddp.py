"""Two ranks on gloo, in every loop of test_loops.py, take the step of float64 autograd.

pytest starts this file as a program, with two processes.
"""

import gc
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch


def main(folder: Path) -> None:
    import irl_ops  # noqa: F401

    # As in test_trl_ddp.py: the folder as a package, without the repository's root on sys.path.
    here = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here.parent]
    package = types.ModuleType("tests")
    package.__path__ = [str(here)]
    sys.modules["tests"] = package
    steps = importlib.import_module("tests.integrations.loop_steps")
    tiny = importlib.import_module("tests.integrations.tiny_transformers")

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for loop, step in steps.LOOPS.items():
        for data, make in steps.DATA.items():
            model = tiny.llama()
            before = tiny.parameters(model)
            batches = steps.of_rank(make(model)[0], rank, 2)
            if loop == "plain":
                step(torch.nn.parallel.DistributedDataParallel(model), batches)
            else:
                step(model, batches)
            update = {n: (before[n] - p.detach()) / steps.LR for n, p in model.named_parameters()}
            torch.save(update, folder / f"{loop}-{data}-{rank}.pt")
            del model
            gc.collect()
    if torch.distributed.is_initialized():  # Lightning's Trainer may have ended it
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_step_of_float64_autograd(tmp_path):
    pytest.importorskip("lightning", reason="the package lightning is not installed")
    from . import loop_steps
    from .test_transformers_ddp import launch
    from .tiny_transformers import CLOSE_UPDATE, llama, reference_gradients

    launch(__file__, tmp_path, ranks=2)
    for data, make in loop_steps.DATA.items():
        model = llama()
        gradients = reference_gradients(model, make(model)[1])
        norm = sum(g.square().sum() for g in gradients.values())
        for loop in loop_steps.LOOPS:
            one, two = (torch.load(tmp_path / f"{loop}-{data}-{rank}.pt") for rank in range(2))
            for name, update in one.items():
                assert torch.equal(update, two[name]), (loop, data, name)
            error = sum((one[n].double() - g).square().sum() for n, g in gradients.items())
            assert error.sqrt() < CLOSE_UPDATE * norm.sqrt(), (loop, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
