"""How far one step raises the memory that the process holds.

With logits that are given: by the gradient and O(rows), no more. With a last layer, whose gradients
are not counted: by a chunk of logits where they are never stored.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

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


LAST_LAYER = """
import sys
import torch
import torch.nn.functional as F
import irl_ops.torch as irl

dtype, name, chunk = getattr(torch, sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)

def options():
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

steps = {
    "linear": lambda h, w, y: irl.linear_iqlearn_loss(h, w, y, chunk_size=chunk),
    "stored": lambda h, w, y: irl.iqlearn_loss(h @ w.T, y),
    "stored, in place": lambda h, w, y: irl.iqlearn_loss(h @ w.T, y, inplace=True),
    "cross_entropy": lambda h, w, y: F.cross_entropy(h @ w.T, y),
    "F.linear_cross_entropy": lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options()),
}

def layer(rows, width, vocab):
    hidden, weight = torch.ones(rows, width), torch.ones(vocab, width) / width
    labels = torch.zeros(rows, dtype=torch.int64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x.split()[1] for x in lines if x.startswith(field)))

steps[name](*layer(4, 8, 16)).backward()  # what is loaded once is not the step's
given = layer(2048, 512, 65536)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again from what is held
before = status("VmRSS")
steps[name](*given).backward()
gradients = sum(x.grad.numel() * x.grad.element_size() for x in given[:2])
logits = 2048 * 65536 * dtype.itemsize
print((status("VmHWM") - before - gradients) / logits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("linear", 256),
        ("linear", 64),
        ("stored", 0),
        ("stored, in place", 0),
        ("cross_entropy", 0),
        ("F.linear_cross_entropy", 256),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_last_layer(dtype, name, chunk, benchmark) -> None:
    if name.startswith("F.") and not hasattr(torch.nn.functional, name[2:]):
        pytest.skip(f"torch {torch.__version__} has no {name}")

    def measure() -> float:
        command = [sys.executable, "-P", "-c", LAST_LAYER, dtype, name, str(chunk)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    grown = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["step"] = f"{name}, chunks of {chunk}" if chunk else name
    benchmark.extra_info["peak growth / size of the logits"] = round(grown, 3)
    if name == "linear" and dtype == "float32":
        # a chunk, and what the matrix products and the row kernels take: 5 % of the logits;
        # products in bfloat16 take more where the CPU has none and its library converts
        assert grown < chunk / 2048 + 0.05, grown
