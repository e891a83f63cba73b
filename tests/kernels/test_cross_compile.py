"""The C++ sources compile with clang for machines other than this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(
    [*(ROOT / "kernels/cpu").glob("*.cpp"), *(ROOT / "irl_ops/algebra/cpu").glob("*.cpp")]
)
BINDINGS = sorted((ROOT / "bindings").glob("*.cpp"))


# Of portable code, clang's verdict on types and templates is what can differ between machines, and
# making machine code takes twelve times as long. A precompiled header is the output that needs no
# more than the verdict. For Linux all is compiled to the end: what is said of unused functions, and
# of a machine's own instructions, comes after the verdict.
VERDICT = ("-Xclang", "-emit-pch", "-Xclang", "-fpch-instantiate-templates")


def compile_with_zig(target: str, source: Path, *includes: str) -> None:
    """A warning is an error."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ziglang (pip install ziglang), a clang with every target in it")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O0"]
    command += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command += () if "linux" in target else VERDICT
    rooms = ("kernels/cpu", "irl_ops/algebra/cpu")
    command += [f"-I{ROOT / room}" for room in rooms]
    command += [f"-isystem{path}" for path in includes]
    with tempfile.TemporaryDirectory() as out:  # megabytes for each, which pytest would keep
        command += ["-c", "-o", f"{out}/object.o", str(source)]
        cache = {**os.environ, "ZIG_LOCAL_CACHE_DIR": out}
        done = subprocess.run(command, capture_output=True, text=True, env=cache, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile(source: Path, target: str) -> None:
    compile_with_zig(target, source)


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_binding_compiles(source: Path) -> None:
    """Python's own headers describe this machine, yet the binding uses only what is common."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    includes = (pybind11.get_include(), sysconfig.get_path("include"))
    compile_with_zig("aarch64-macos", source, *includes)


def test_the_verdict_is_on_templates_too(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("template <class T> int f(T x) { return x.n; }\nint g() { return f(1); }\n")
    with pytest.raises(AssertionError, match="member reference"):
        compile_with_zig("aarch64-macos", source)


def test_targets_for_xla_compile(tmp_path: Path) -> None:
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
    compile_with_zig("aarch64-macos", source, *includes)
