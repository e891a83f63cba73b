"""Two ranks on gloo, in every loop of test_loops.py, take the step of float64 autograd."""

import gc
from pathlib import Path

import pytest
import torch

from ..launch import launch
from . import tiny_transformers as tiny


def main(folder: Path) -> None:
    from . import loop_steps as steps

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

    launch(__file__, tmp_path, ranks=2)
    for data, make in loop_steps.DATA.items():
        model = tiny.llama()
        gradients = tiny.reference_gradients(model, make(model)[1])
        norm = sum(g.square().sum() for g in gradients.values())
        for loop in loop_steps.LOOPS:
            one, two = (torch.load(tmp_path / f"{loop}-{data}-{rank}.pt") for rank in range(2))
            for name, update in one.items():
                assert torch.equal(update, two[name]), (loop, data, name)
            error = sum((one[n].double() - g).square().sum() for n, g in gradients.items())
            assert error.sqrt() < tiny.CLOSE_UPDATE * norm.sqrt(), (loop, data)
