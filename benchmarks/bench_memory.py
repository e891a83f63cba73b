"""How far one step raises the memory that the process holds: the gradient and O(rows), no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process of its own: the high-water mark of this one already holds everything before.
PROGRAM = """
import resource, sys
import torch
import irl_ops.torch as irl

dtype, inplace = getattr(torch, sys.argv[1]), sys.argv[2] == "in place"
torch.set_num_threads(2)

class Produced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor):
        return torch.ones(2, 512, 32768, dtype=dtype)

    @staticmethod
    def backward(ctx, dlogits):
        return torch.zeros(())

labels = torch.zeros(2, 512, dtype=torch.int64)
small = torch.zeros(1, 2, 8, dtype=dtype, requires_grad=True)
irl.iqlearn_loss(small, labels[:1, :2]).backward()  # what is loaded once is not the step's
logits = Produced.apply(torch.zeros((), requires_grad=True))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
irl.iqlearn_loss(logits, labels, inplace=inplace).backward()
print((peak() - before) / (logits.numel() * logits.element_size()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss in KiB")
@pytest.mark.parametrize("where", ["of its own", "in place"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype, where, benchmark) -> None:
    def measure() -> float:
        command = [sys.executable, "-P", "-c", PROGRAM, dtype, where]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    grown = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["gradient"] = where
    benchmark.extra_info["peak growth / size of the logits"] = round(grown, 3)
    # Beside the gradient: row vectors, and a scratch row a thread; below 5 % of the logits.
    assert grown < (0.05 if where == "in place" else 1.05), grown
