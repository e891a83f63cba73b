"""The checks for GPUs, on the interpreter: that they run, and that they can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import on_gpu

CHECK = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.py"
without_gpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="needs a machine without a GPU"
)


@without_gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", on_gpu.DTYPES)
def test_rows_of_the_interpreter_are_right(dtype, inplace):
    on_gpu.check_rows(14, 300, dtype, inplace)


@without_gpu
def test_metrics_of_the_interpreter_are_right():
    on_gpu.check_metrics(300, 20)


@without_gpu
def test_a_wrong_gradient_is_found():
    logits, labels = on_gpu.batch(12, 300, torch.bfloat16)
    _, gradient = on_gpu.step(logits, labels)
    near = slice(3, 9)
    on_gpu.assert_right(logits[:, near], labels[:, near], gradient[:, near], 3, 11)
    gradient[0, 5, 7] *= 1.02
    with pytest.raises(AssertionError):
        on_gpu.assert_right(logits[:, near], labels[:, near], gradient[:, near], 3, 11)


@without_gpu
def test_same_bits_and_bad_labels():
    one, two = (on_gpu.step(*on_gpu.batch(4, 300, torch.bfloat16)) for _ in range(2))
    assert torch.equal(one[1], two[1])
    logits, labels = on_gpu.batch(4, 300, torch.float32)
    assert on_gpu.step(logits, labels, inplace=True)[1].isfinite().all()


@without_gpu
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu-check needs a GPU") and done.stderr.count("\n") == 1
