"""The checks for GPUs, on the interpreter: that they run, and that they can fail."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .. import on_gpu

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "benchmarks" / "gpu_check.py"
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


RUN = """
import sys, torch
import gpu_check
from pathlib import Path
torch.accelerator.current_accelerator = lambda **_: torch.device("cpu")
gpu_check.os.environ["TRITON_INTERPRET"] = "1"
gpu_check.ON_DEVICE = sys.argv.pop(1).split(",")
gpu_check.RESULTS = Path(sys.argv.pop(1))
gpu_check.check_jax = lambda recorder: (0, "left out")
sys.exit(gpu_check.main())
"""


def checked(tests: str, results: Path, **environment: str) -> tuple[int, dict]:
    """The exit status of the command on a CPU that says it is the device, and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, tests, str(results)],
        cwd=CHECK.parent, env=os.environ | environment, check=False, timeout=500,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, json.loads((results / "gpu-check-cpu.json").read_text())


@without_gpu
def test_a_killed_run_loses_nothing(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import os, signal\n"
        "def test_one(record_property): record_property('bytes', 1.5)\n"
        "def test_two(): assert 1 == 2\n"
        "def test_three(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    status, found = checked(str(tests), tmp_path)
    assert status == -signal.SIGKILL and not found["finished"]
    one, two = found["tests"].values()
    assert one == {"outcome": "passed", "bytes": 1.5}
    assert two["outcome"] == "failed" and "1 == 2" in two["why"]


@without_gpu
def test_a_checkout_on_the_path_is_enough(tmp_path):
    """Without what is built or installed: no extension, and no metadata of irl_ops."""
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import importlib.abc, importlib.metadata as metadata, sys\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'irl_ops._native': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "found = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name.replace('_', '-') == 'irl-ops': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.distribution = distribution\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    step = tmp_path / "test_step.py"
    step.write_text(
        "import torch, irl_ops.torch as irl\n"
        "def test_step():\n"
        "    q = torch.randn(1, 4, 33, requires_grad=True)\n"
        "    irl.iqlearn_loss(q, torch.tensor([[1, 2, 3, 4]]), backend='triton').backward()\n"
        "    assert q.grad.isfinite().all() and q.grad.any()\n"
    )
    tests = f"tests/on_gpu.py::test_triton_is_what_serves,{step}"
    status, found = checked(tests, tmp_path, PYTHONPATH=path)
    assert status == 0 and found["finished"], found["tests"]
    assert [x["outcome"] for x in found["tests"].values()] == ["passed"] * 2
