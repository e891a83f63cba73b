"""``make profile-steps``: whose time is whose, and that the command fills its page."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import profile, record_function

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts, not a package

import profile_steps  # noqa: E402
import step_shares  # noqa: E402

from irl_ops.integrations.transformers import ranges  # noqa: E402

NAP = 0.05


class Sleepy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(NAP)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * NAP)
        return gradient.clone()


def test_a_backward_pass_belongs_to_the_range_of_its_forward():
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x])
    with profile() as profiler:
        with record_function("an update"):
            with torch.no_grad(), record_function(ranges.SAMPLING):
                Sleepy.apply(x)
            with record_function(ranges.POLICY):
                y = Sleepy.apply(x)
                with record_function(ranges.LOSS):
                    y = Sleepy.apply(y.exp())
            with record_function(ranges.CRITIC):
                z = Sleepy.apply(x)
            (y + z).sum().backward()
            optimizer.step()
    found = step_shares.times(profiler.events())
    naps = {part: x / 1e6 / NAP for part, x in found.items()}
    wanted = {
        "sampling": 1, "policy, forward": 1, "policy, backward": 2, "loss": 3, "value network": 3,
        "initial policy": 0, "discriminator": 0,
    }  # fmt: skip
    for part, count in wanted.items():
        # to sleep takes no less; on a busy machine it takes more, and one part has no other's
        assert naps[part] >= count and (naps[part] > 0) == (count > 0), naps
    assert naps["optimizer"] > 0 and naps["the rest"] > 0
    (update,) = [event for event in profiler.events() if event.name == "an update"]
    assert sum(found.values()) == pytest.approx(update.cpu_time_total, rel=1e-6)


HAS = {
    "MLE": set(),
    "offline IQLearn": set(),
    "online IQLearn": {"sampling"},
    "GAIL": {"sampling", "initial policy", "value network", "discriminator"},
}


def test_every_part_of_every_system_is_found(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "found.json", tmp_path / "page.md"
    marks = [f"{mark}\nold\n{profile_steps.END}\n" for mark in profile_steps.MARKS.values()]
    page.write_text("before\n" + "between\n".join(marks) + "after\n", encoding="utf-8")
    out.write_text('{"shapes": "of an earlier run"}', encoding="utf-8")
    arguments = ["--quick", "--device", "cpu", "--out", str(out), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["profile_steps.py", "--only", "shares", *arguments])
    profile_steps.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["shapes"] == "of an earlier run"
    common = {"policy, forward", "policy, backward", "loss", "optimizer", "the rest"}
    for system, parts in found["shares"]["shapes"]["base"]["milliseconds"].items():
        assert {part for part, x in parts.items() if x > 0} == common | HAS[system], system
        # parts of one time: none is counted twice, so that none is less than nothing
        assert all(x >= 0 for x in parts.values())
    text = page.read_text(encoding="utf-8")
    lines = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")][2:]
    columns = zip(*([x.strip(" |") for x in line] for line in lines), strict=True)
    for column in columns:  # nine numbers of one digit behind the point
        assert sum(float(x) for x in column if x) == pytest.approx(100, abs=0.5)
    assert text.startswith(f"before\n{marks[0]}between\n") and text.endswith("after\n")
    assert "% of an update" in capsys.readouterr().out
