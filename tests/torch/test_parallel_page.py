"""The examples of docs/parallel.md under torchrun, with two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallel.md"


@pytest.mark.slow
def test_examples_print_the_same_on_two_ranks(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("\n## JAX")[0]
    blocks = re.findall(r"^```python\n(.*?)^```(?:\s*?^```text\n(.*?)^```)?", text, re.M | re.S)
    (tmp_path / "page.py").write_text("\n".join(code for code, _ in blocks), encoding="utf-8")
    expected = [line for _, printed in blocks for line in printed.splitlines()]
    done = subprocess.run(
        [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node=2", "--redirects=3", f"--log-dir={tmp_path}", "page.py",
        ],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    logs = sorted(tmp_path.rglob("stdout.log"))
    errors = "".join(log.read_text() for log in tmp_path.rglob("stderr.log"))
    assert done.returncode == 0, done.stderr[-2000:] + errors[-4000:]
    assert len(logs) == 2
    for log in logs:
        assert log.read_text().splitlines() == expected
