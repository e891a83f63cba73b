"""The benchmark for GPUs: that everything in it runs, on the interpreter; nothing is timed."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

import gpu_bench
from gpu_bench import Shape


def test_every_contestant_runs_and_the_rest_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "COMPILED_ROWS", 4)
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)  # takes long, and is not ours
    shapes = [gpu_bench.run(Shape("float32", rows, 33), torch.device("cpu"), 2) for rows in (4, 3)]
    ours = {gpu_bench.COPY, gpu_bench.KERNEL, gpu_bench.OURS, gpu_bench.MLE, gpu_bench.INPLACE}
    for shape in shapes:
        assert ours <= shape.ms.keys() == shape.ratio_to_copy.keys() == shape.peak_mb.keys()
        assert {"Liger", "QuACK"} <= shape.ms.keys() | shape.absent.keys()
        assert not shape.ms.keys() & shape.absent.keys()
        assert gpu_bench.table(shape).row_count == len(shape.ms)
    assert "cross_entropy, compiled" in shapes[0].ms
    assert "4 rows alone" in shapes[1].absent["cross_entropy, compiled"]
    about = gpu_bench.machine(torch.device("cpu"))
    gpu_bench.write(tmp_path / "bench.json", about, shapes)
    gpu_bench.draw(tmp_path / "bench.png", about, shapes)
    assert json.loads((tmp_path / "bench.json").read_text())["results"][0]["vocab"] == 33
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_a_peer_that_runs_out_of_memory_late_is_left_out(monkeypatch):
    timed, times = gpu_bench.milliseconds, []

    def milliseconds(contestant, *rest):
        times.append(contestant.name)
        if contestant.name == "IQLearn, naive" and times.count(contestant.name) == 2:
            raise torch.OutOfMemoryError
        return timed(contestant, *rest)

    monkeypatch.setattr(gpu_bench, "milliseconds", milliseconds)
    shape = gpu_bench.run(Shape("float32", 3, 33), torch.device("cpu"), 3)
    assert shape.absent["IQLearn, naive"] == "out of memory"
    assert "IQLearn, naive" not in shape.ms.keys() | shape.peak_mb.keys()
    assert gpu_bench.OURS in shape.ms


def test_a_missed_target_is_called_missed():
    shape = Shape("bfloat16", 4096, 128256)
    shape.ms = {gpu_bench.COPY: 1.0, gpu_bench.OURS: 1.2, gpu_bench.MLE: 1.2}
    cells = [list(column.cells) for column in gpu_bench.verdicts([shape]).columns]
    verdict = dict(zip(cells[0], cells[-1], strict=True))
    assert verdict["IQLearn / copy, bfloat16, V < 160k"] == "MISSED"
    assert verdict["IQLearn / MLE"] == "met"
    assert verdict["Liger / MLE"] == "open"


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_bench"])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert gpu_bench.main() == 1
    assert capsys.readouterr().err.count("\n") == 1
