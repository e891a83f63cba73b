"""Everything that a GPU has to show: the property tests on the device, then tests/on_gpu.py.

    python benchmarks/gpu_check.py

Writes what passed, failed and was left out, with what the tests recorded, to
benchmarks/results/gpu-check-DEVICE.json; the exit status is pytest's.
"""

from __future__ import annotations

import json
import os
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
    path = ROOT / "benchmarks" / "results" / f"gpu-check-{about['name']}.json"
    path.write_text(json.dumps({"machine": about, "tests": recorder.outcomes}, indent=2) + "\n")
    print(f"written: {path}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
