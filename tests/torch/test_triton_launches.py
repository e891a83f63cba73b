"""Every launch on its way to a GPU that is not there: arguments bound, kernels compiled, not run.

The interpreter takes any argument; what a launch passes meets Triton's own signatures here.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import irl_ops.torch as irl
from irl_ops.torch import triton

target = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}[sys.argv[1]]


class Absent:
    get_current_target = lambda self: target
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0


compiled, run = [], JITFunction.run


def compile_only(self, *args, warmup=False, **options):
    compiled.append((self.fn.__name__, run(self, *args, warmup=True, **options).hash))


JITFunction.run = compile_only
driver.set_active(Absent())
triton.current = lambda device: contextlib.nullcontext()
triton.unavailable = lambda device: None

y = torch.zeros(2, 7, dtype=torch.int32)
full = dict(
    shift=True, eos_token_id=[2, 7], boundary="bootstrap", entropy_coef=0.1, return_metrics=True,
    truncated=torch.tensor([True, False]), token_weights=torch.ones(2, 7).double(), num_items=3,
    z_loss=0.2, where=torch.ones(2, 7) > 0, position_ids=torch.arange(14).view(2, 7).int(),
    values=torch.zeros(2, 7), next_values=torch.zeros(2, 7).bfloat16(),
)
# what the dtype changes is the same on every GPU
for dtype in (torch.bfloat16, torch.float32)[: 2 if sys.argv[1] == "sm_90" else 1]:
    for options in ({}, full, dict(inplace=True, segment_ids=y, detach_next=True)):
        q = torch.zeros(2, 7, 33, dtype=dtype, requires_grad=True)
        loss = irl.iqlearn_loss(q * 1, y, backend="triton", **options)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    irl.online_iqlearn_loss(q, y, torch.tensor([True, False]), backend="triton").backward()
    irl.mle_loss(q, y, reduction="none", entropy_coef=0.1, backend="triton").sum().backward()
    irl.mle_loss(q.detach(), y, backend="triton")
    irl.token_stats(q, y, backend="triton").value.sum().backward()
    packed = dict(cu_seqlens=torch.tensor([0, 3, 7]), backend="triton")
    irl.iqlearn_loss(q[0], y[0], **packed).backward()
    tilted = torch.zeros(3, 2, 4, 2, 7, dtype=dtype)[:, :, :3].movedim(3, 1).requires_grad_()
    irl.iqlearn_loss(tilted, y.new_zeros(3, 2, 2, 3), backend="triton").backward()
before = len(set(compiled))
for lam in (0.0, 0.2, 1.0, 3):  # annealing compiles nothing anew
    irl.iqlearn_loss(q, y, lam=lam, gamma=lam / 3, backend="triton").backward()
    irl.mle_loss(q, y, num_items=lam, backend="triton").backward()
    after = len(set(compiled))
    print(lam, after - before)
    before = after
print(*sorted({name for name, _ in compiled}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, so Linux")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_launch_fits_its_kernel(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, target],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others, names = done.stdout.splitlines()
    assert first.startswith("0.0 ")  # num_items alone is another kernel
    assert [line.split()[1] for line in others] == ["0"] * 3
    assert names.split() == [
        "align", "coefficients", "finish", "label_logit", "row_grad", "row_stats",
        "row_stats_grad", "scale", "set_label", "total",
    ]  # fmt: skip
