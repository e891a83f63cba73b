"""The Triton kernels, compiled for GPUs that are not here: a part of ``make aot-gpu``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton: it has releases for Linux alone",
)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own: in this one, kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["COLUMNS"] = "200"
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=BENCHMARKS,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_meet_what_they_promise(target: str) -> None:
    """No spill, 128 bits at a time, no exponential too many, and enough blocks."""
    version = python("-c", "import triton; print(triton.__version__)").stdout.strip()
    chosen = ("--targets", target, "--dtypes", "bf16", "--versions", version)
    done = python(BENCHMARKS / "aot_gpu.py", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kernels, 0 that miss " in done.stdout
    for name in ("two_pass", "resident", "row_measures", "row_measures_grad"):
        assert name in done.stdout


ENTRY = "aot_gpu.dispatch.RESIDENT['nvidia'] = (aot_gpu.dispatch.Fits({}),)"
OTHER = "compiled = aot_gpu.compiled\naot_gpu.compiled = lambda j, *a: compiled(j._replace({}), *a)"


@pytest.mark.parametrize(
    ("change", "vocab", "problem"),
    [
        (ENTRY.format("131072, 32"), 131072, "bytes spilled"),
        (ENTRY.format("32768, 32, blocks=2"), 32768, "1 blocks for 2"),
        (OTHER.format("matched=False"), 16384, "narrow stores"),
        (OTHER.format("entropy=True"), 16384, "exponentials for"),
        ("aot_gpu.SHARED['sm_80'] = 8", 16384, "bytes of shared memory"),
    ],
    ids=["spills", "blocks", "narrow", "exponentials", "shared"],
)
def test_what_is_missed_is_found_out(change: str, vocab: int, problem: str) -> None:
    job = f"aot_gpu.Job('row_stats_grad', 'sm_80', 'bf16', {vocab}, edges=True)"
    done = python("-c", f"import aot_gpu\n{change}\nprint(aot_gpu.run({job}).problems)")
    assert done.returncode == 0, done.stderr
    assert problem in done.stdout
