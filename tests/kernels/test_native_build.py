"""What was built: the instruction sets, where their instructions lie, and the sanitizers' word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from irl_ops import _native

ROOT = Path(__file__).resolve().parents[2]
ISAS = _native.isas()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, because the choice is made once per process."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": search, **environment}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_environment_forces_an_instruction_set() -> None:
    code = "from irl_ops import _native; print(_native.isa())"
    assert ISAS[-1] == "baseline"
    for isa in ISAS:
        assert python(code, IRL_OPS_ISA=isa).stdout.split() == [isa]
    failed = python(code, IRL_OPS_ISA="mmx")
    assert failed.returncode != 0 and "IRL_OPS_ISA is 'mmx', this CPU accepts" in failed.stderr
    assert python(code, IRL_OPS_ISA="").stdout.split() == [ISAS[0]]


def test_wide_instructions_stay_in_their_namespaces() -> None:
    """An AVX instruction anywhere else would stop the library on an older CPU."""
    if os.uname().machine != "x86_64":
        pytest.skip("needs an x86-64 CPU: other machines have the baseline loops only")
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (binutils)")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _native.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: dict[str, int] = {"avx2": 0, "avx512": 0}
    owner = ""
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            owner = heading[1]
        elif re.search(r"\t(v[a-z]|.*%[yz]mm)", line):
            space = re.search(r"irl::(avx2|avx512)::", owner)
            assert space, f"{line.strip()!r} in {owner}"
            assert space[1] == "avx512" or "%zmm" not in line, f"{line.strip()!r} in {owner}"
            counts[space[1]] += 1
    assert min(counts.values()) > 1000  # the loops are there, and vectorised


def test_under_sanitizers(tmp_path: Path) -> None:
    """tests/cpp with AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    flags = ["-std=c++17", "-O0", "-g1", "-pthread", f"-I{ROOT / 'kernels/cpu'}"]
    address, both = "-fsanitize=address", "-fsanitize=address,undefined"
    # What is left out doubles the time to compile, and AddressSanitizer finds it too.
    careful = [both, "-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"]
    sources = [*(ROOT / "kernels/cpu").glob("*.cpp"), *(ROOT / "tests/cpp").glob("*.cpp")]

    def build(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        # the loops are one text, which isa_baseline has; and undefined behaviour takes longest
        wide = source.stem in ("isa_avx2", "isa_avx512")
        command = [compiler, *flags, *([address] if wide else careful)]
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = str(tmp_path / "rows")
    subprocess.run([compiler, *flags, both, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for isa in ISAS:
        assert f"{isa}: exp within" in done.stdout
