"""Everything that a GPU has to show: the property tests on the device, then tests/on_gpu.py.

Where JAX has CUDA and jax-triton is installed, the tests of irl_ops.jax follow, on the device too.

    python benchmarks/gpu_check.py

Writes what passed, failed and was left out, with what the tests recorded, to
benchmarks/results/gpu-check-DEVICE.json, after every test: a run that is killed leaves what it
found, and says "finished": false. The exit status is pytest's. A checkout on PYTHONPATH, with
irl_ops/kernels linked to kernels/, is enough: nothing has to be installed or built.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
from gpu_bench import machine

ROOT = Path(__file__).resolve().parents[1]
ON_DEVICE = (
    "tests/torch/test_losses.py::test_loss_and_gradients",
    "tests/torch/test_inplace.py::test_loss_and_gradients",
    "tests/on_gpu.py",
)
RESULTS = ROOT / "benchmarks" / "results"
IN_JAX = ("tests/jax/test_losses.py", "tests/jax/test_transforms.py")


class Recorder:
    """Keeps the outcome of every test, and what it recorded, in a file."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.path = RESULTS / f"gpu-check-{about['name']}.json"
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.in_jax: dict[str, str] = {}
        self.found: dict[str, Any] = {
            "machine": about,
            "finished": False,
            "tests": self.outcomes,
            "jax": "did not start",
            "jax_tests": self.in_jax,
        }

    def write(self) -> None:
        """All of it, in one step: whoever reads, or is left with it, has a whole file."""
        RESULTS.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=2) + "\n")
        partial.replace(self.path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called three times a test; a later phase speaks only if it has bad news."""
        if report.when == "call" or report.outcome != "passed":
            entry = {"outcome": report.outcome, **dict(report.user_properties)}
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                entry["why"] = report.longrepr[2]
            elif report.outcome == "failed":
                entry["why"] = str(report.longrepr)[-2000:]
            self.outcomes[report.nodeid] = entry
            self.write()


def main() -> int:
    """Run the checks; returns the exit status."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("gpu-check needs a GPU that torch can use, and there is none here", file=sys.stderr)
        return 1
    os.environ["IRL_OPS_TEST_DEVICE"] = str(device)
    recorder = Recorder(machine(device))
    status = pytest.main(
        [
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
            "-q",
            *(str(ROOT / test) for test in ON_DEVICE),
            *sys.argv[1:],
        ],
        plugins=[recorder],
    )
    jax_status, recorder.found["jax"] = check_jax(recorder)
    recorder.found["finished"] = True
    recorder.write()
    print(f"written: {recorder.path}")
    return int(status) or jax_status


def check_jax(recorder: Recorder) -> tuple[int, str]:
    """The exit status of JAX's tests, in a process of their own, and their last line."""
    if importlib.util.find_spec("jax") is None:
        return 0, "jax is not installed"
    from irl_ops.jax import triton

    if reason := triton.unavailable("cuda"):
        return 0, reason
    last = ""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "pytest", "-v", *IN_JAX],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="")
            last = line.strip() or last
            if test := re.match(r"(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)", line):
                recorder.in_jax[test[1]] = test[2].lower()
                recorder.write()
    return running.returncode, last


if __name__ == "__main__":
    sys.exit(main())
