"""What mypy --strict says of a program that uses the library."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import torch
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.integrations.transformers import apply_iqlearn
from irl_ops.torch import sft

logits, labels = torch.randn(2, 8, 100, requires_grad=True), torch.randint(100, (2, 8))
offline: Tensor = irl.iqlearn_loss(logits, labels, shift=True, lam=0.1)
value: Tensor
metrics: dict[str, Tensor]
value, metrics = irl.mle_loss(logits, labels, return_metrics=True)
linear: Tensor = irl.linear_mle_loss(logits, torch.randn(9, 100), labels, chunk_size=4)
module = irl.IQLearnLoss(lam=0.1, gamma=torch.tensor(0.9), boundary="drop")
reward: Tensor = irl.token_stats(logits, labels, gamma=0.9).reward
weighted: Tensor = sft.eaft_loss(logits, labels, shift=True, alpha=0.5)
weighted = sft.dft_loss(irl.linear_token_stats(logits, torch.randn(9, 100), labels), num_items=3)
"""

WRONG = """
import torch

import irl_ops.torch as irl

logits, labels = torch.randn(2, 8, 100), torch.randint(100, (2, 8))
irl.iqlearn_loss(logits, labels, lamb=0.1)
irl.mle_loss(logits, labels, boundary="end")
irl.IQLearnLoss(z_coef=1.0)
"""


def test_users_are_understood_and_wrong_options_noticed(tmp_path: Path) -> None:
    block = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert block is not None
    for name, text in (("readme", block[1]), ("right", PROGRAM), ("wrong", WRONG)):
        # Tensor.backward has no types
        text = "# mypy: allow-untyped-calls\n" + text
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    # an editable install is a finder, which no static tool looks through
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [
        sys.executable, "-P", "-m", "mypy",
        # as `make lint` has it: with other options, nothing in its cache would hold
        f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}",
        *(str(tmp_path / f"{name}.py") for name in ("readme", "right", "wrong")),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600
    )
    said = done.stdout + done.stderr
    assert "Found 4 errors in 1 file" in said, said  # two for the first
    for name in ("lamb", "mle_loss", "z_coef"):
        assert f'"{name}"' in said, said
