"""Ranks on gloo, for tests of trainers and layers: processes that run a test file's ``main``.

They are forked from a server that has imported torch and Transformers before: that takes longer
than most of what they run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "irl_ops.integrations.transformers", "transformers.trainer"]
)


def launch(program: str, folder: Path, ranks: int, timeout: float = 240) -> None:
    """Runs ``main(folder)`` of the test file ``program`` once per rank, and waits for all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # As in conftest.py: our kernels/ must not pass for the distribution that Transformers knows.
    with mock.patch.dict(os.environ, {**shared, "PYTHONSAFEPATH": "1"}):
        multiprocessing.forkserver.ensure_running()
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        CONTEXT.Process(
            # A function of Python's own, since a rank finds this file by its path alone.
            target=runpy.run_path,
            args=(__file__, {"GIVEN": (program, folder, shared | _rank(rank), log)}, "rank"),
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, f"{codes}\n" + "\n".join(log.read_text()[-4000:] for log in logs)


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _main(program: str, folder: Path, environment: dict[str, str], log: Path) -> None:
    """What a rank does."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    # The tests as a package: sys.path is that of pytest, without the repository's root.
    package: Any = types.ModuleType("tests")
    package.__path__ = [str(HERE)]
    sys.modules["tests"] = package
    name = ".".join(Path(program).resolve().relative_to(HERE.parent).with_suffix("").parts)
    importlib.import_module(name).main(folder)


if __name__ == "rank":
    _main(*GIVEN)  # type: ignore[name-defined]  # noqa: F821
