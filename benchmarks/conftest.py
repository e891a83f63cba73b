"""The options, the machine, and the table at the end."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from irl_ops import _native
from irl_ops.doctor import cpu_name

HERE = Path(__file__).parent
TABLES = pytest.StashKey[dict[str, list]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Nothing is written unless asked."""
    group = parser.getgroup("irl_ops")
    group.addoption("--threads", type=int, default=2, help="torch threads (default 2)")
    group.addoption("--rounds", type=int, default=15, help="rounds of a contest (default 15)")
    group.addoption("--save-results", metavar="NAME", help="write benchmarks/results/NAME.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """``report(title, results)`` adds a table to the summary."""

    def add(title: str, results: list) -> None:
        request.config.stash[TABLES][title] = results

    return add


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    """The number of threads, set for the test."""
    before, wanted = torch.get_num_threads(), request.config.getoption("--threads")
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


def machine(config: pytest.Config) -> dict[str, object]:
    """What a figure must not be quoted without."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": config.getoption("--threads"),
        "isa": _native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def pytest_terminal_summary(config: pytest.Config) -> None:
    """One table a contest."""
    tables = config.stash[TABLES]
    if not tables:
        return
    about, console = machine(config), Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    for title, results in tables.items():
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for heading in ("median ms", "best ms", *(f"x {floor}" for floor in results[0].ratios)):
            table.add_column(heading, justify="right")
        for result in results:
            ratios = (f"{ratio:.2f}" for ratio in result.ratios.values())
            table.add_row(result.name, f"{result.median_ms:.2f}", f"{result.best_ms:.2f}", *ratios)
        console.print(table)
    if name := config.getoption("--save-results"):
        path = HERE / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        rows = {title: [asdict(r) for r in results] for title, results in tables.items()}
        path.write_text(json.dumps({"machine": about, "results": rows}, indent=2) + "\n")
        console.print(f"written: {path}")
