"""The C++ sources compile with clang for machines other than this one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(
    [*(ROOT / "kernels/cpu").glob("*.cpp"), *(ROOT / "irl_ops/algebra/cpu").glob("*.cpp")]
)
BINDINGS = sorted((ROOT / "bindings").glob("*.cpp"))


def compile_with_zig(target: str, source: Path, out: Path, *includes: str) -> None:
    """A warning is an error."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ziglang (pip install ziglang), a clang with every target in it")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O0"]
    command += [
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-c",
        "-o",
        str(out / "object.o"),
    ]
    rooms = ("kernels/cpu", "irl_ops/algebra/cpu")
    command += [f"-I{ROOT / room}" for room in rooms]
    command += [f"-isystem{path}" for path in includes]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile(source: Path, target: str, tmp_path: Path) -> None:
    compile_with_zig(target, source, tmp_path)


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_binding_compiles(source: Path, target: str, tmp_path: Path) -> None:
    """Python's own headers describe this machine, yet the binding uses only what is common."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    compile_with_zig(target, source, tmp_path, *includes)


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
def test_targets_for_xla_compile(target: str, tmp_path: Path) -> None:
    """With the headers of any jaxlib; a build takes those of the oldest."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        pytest.skip("needs jaxlib, for XLA's headers")
    source = tmp_path / "xla.cpp"
    lines = [f'#include "{ROOT / "bindings" / name}"' for name in ("xla.cpp", "xla_measures.cpp")]
    source.write_text("\n".join(["#define IRL_OPS_XLA 1", *lines, ""]))
    headers = str(Path(jaxlib.origin).parent / "include")
    includes = (pybind11.get_include(), sysconfig.get_path("include"), headers)
    compile_with_zig(target, source, tmp_path, *includes)
