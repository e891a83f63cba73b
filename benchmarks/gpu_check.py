"""Everything that a GPU has to show: the property tests on the device, then tests/on_gpu.py.

Where JAX has CUDA and jax-triton is installed, the tests of irl_ops.jax follow, on the device too.

    python benchmarks/gpu_check.py

Writes what passed, failed and was left out, with what the tests recorded, to
benchmarks/results/gpu-check-DEVICE.json; the exit status is pytest's.
"""

from __future__ import annotations

import importlib.util
import json
import os
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
    "tests/test_torch_losses.py::test_loss_and_gradients",
    "tests/test_torch_inplace.py::test_loss_and_gradients",
    "tests/on_gpu.py",
)
IN_JAX = ("tests/test_jax_losses.py", "tests/test_jax_transforms.py")


class Recorder:
    """Keeps the outcome of every test, and what it recorded."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called three times a test; a later phase speaks only if it has bad news."""
        if report.when == "call" or report.outcome != "passed":
            entry = {"outcome": report.outcome, **dict(report.user_properties)}
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                entry["why"] = report.longrepr[2]
            elif report.outcome == "failed":
                entry["why"] = str(report.longrepr)[-2000:]
            self.outcomes[report.nodeid] = entry


def main() -> int:
    """Run the checks; returns the exit status."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("gpu-check needs a GPU that torch can use, and there is none here", file=sys.stderr)
        return 1
    os.environ["IRL_OPS_TEST_DEVICE"] = str(device)
    recorder, about = Recorder(), machine(device)
    status = pytest.main(
        ["--rootdir", str(ROOT), "-q", *(str(ROOT / test) for test in ON_DEVICE), *sys.argv[1:]],
        plugins=[recorder],
    )
    jax_status, jax_summary = check_jax()
    found = {"machine": about, "tests": recorder.outcomes, "jax": jax_summary}
    path = ROOT / "benchmarks" / "results" / f"gpu-check-{about['name']}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {path}")
    return int(status) or jax_status


def check_jax() -> tuple[int, str]:
    """The exit status of JAX's tests, in a process of their own, and their last line."""
    if importlib.util.find_spec("jax") is None:
        return 0, "jax is not installed"
    from irl_ops.jax import triton

    if reason := triton.unavailable("cuda"):
        return 0, reason
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", *IN_JAX],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout)
    return done.returncode, done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
