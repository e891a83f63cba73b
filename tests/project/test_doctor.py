"""``irl-ops doctor`` passes here, and fails where a kernel is wrong or missing."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest

import irl_ops.torch.native
from irl_ops import _native, doctor


def test_this_installation_passes(capsys):
    assert doctor.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].split() == ["verdict", "OK"]
    assert irl_ops.__version__ in text
    for isa in _native.isas():
        assert f"self-check {isa}" in text


def test_json_holds_the_whole_report(capsys):
    assert doctor.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["native"]["isa"] == _native.isa()
    assert tuple(found["native"]["errors"]) == _native.isas()
    assert found["packages"]["numpy"]
    assert found["torch_backends"]["reference"]["cpu"] == "available"
    assert found["torch_backends"]["native"]["cpu"] == "available"
    assert found["jax_backends"]["native"]["cpu"] == "available"
    assert "NVIDIA" in found["jax_backends"]["triton"]["cpu"]


def test_a_kernel_that_writes_nothing_fails(monkeypatch, capsys):
    monkeypatch.setattr(_native, "row_stats_grad", lambda *arguments: None)
    assert doctor.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].split() == ["verdict", "FAILED"]
    assert math.isnan(doctor.native_error(_native, _native.isa()))


def test_a_kernel_with_a_wrong_coefficient_fails(monkeypatch):
    right = _native.row_stats_grad

    def swapped(logits, dtype, sizes, strides, vocab, alpha, beta, *rest):
        right(logits, dtype, sizes, strides, vocab, beta, alpha, *rest)

    monkeypatch.setattr(_native, "row_stats_grad", swapped)
    found = doctor.report()
    assert not found["ok"]
    assert min(found["native"]["errors"].values()) > 0.001


def test_a_missing_extension_is_reported_with_the_way_to_build_it(monkeypatch, capsys):
    monkeypatch.delattr(irl_ops, "_native")
    monkeypatch.setitem(sys.modules, "irl_ops._native", None)
    assert doctor.native_kernels() == {"ok": False, "problem": doctor.HOW_TO_BUILD}


def test_without_a_framework_no_backend_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda distribution: None)
    assert doctor.torch_backends() is None and doctor.jax_backends() is None


def test_a_backend_that_cannot_serve_is_listed_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(irl_ops.torch.native, "unavailable", lambda device: "it is on holiday")
    assert doctor.torch_backends()["native"]["cpu"] == "it is on holiday"
    assert doctor.main(["doctor"]) == 0
    assert re.search("torch backend native +cpu: it is on holiday", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], ["cure"]])
def test_an_unknown_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(arguments)
    assert stop.value.code == 2
    assert "doctor" in capsys.readouterr().err


def doctor_of_its_own(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "irl_ops.doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("variable", "accepted"), [("IRL_OPS_BACKEND", "auto, pallas"), ("IRL_OPS_ISA", "baseline")]
)
def test_a_bad_variable_is_named(variable, accepted):
    done = doctor_of_its_own("doctor", **{variable: "nonsense"})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    (line,) = (x for x in lines if f"{variable} is 'nonsense'" in x)
    assert accepted in line
    assert lines[-1].split() == ["verdict", "FAILED"]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, whose complaint of a missing TPU this is",
)
def test_a_libtpu_without_a_tpu_is_quiet():
    """JAX is free to look for one; its plugins' words are in the JSON."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "irl_ops.doctor", "doctor", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "TPU" not in done.stderr and "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    if "tpu" not in found["jax_backends"]["pallas"]:
        assert any("TPU" in line for line in found["jax_messages"])


def test_what_was_kept_is_said_after_an_error(capfd):
    kept = []
    with pytest.raises(RuntimeError, match="it broke"), doctor.stderr_kept(kept):
        os.write(2, b"the reason\n")
        raise RuntimeError("it broke")
    assert "the reason" in capfd.readouterr().err and not kept
