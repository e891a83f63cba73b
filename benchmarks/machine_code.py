"""What can be read off the machine code of a kernel, without the machine."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

# One multiprocessor of NVIDIA's (sm_80 to sm_100): registers are handed out to warps in portions.
REGISTERS, PORTION, THREADS = 65536, 256, 2048
# One compute unit of AMD's (CDNA 2 and 3): four units of vector registers, each for up to 8 waves.
UNITS, VECTOR_REGISTERS, WAVES = 4, 512, 8


@dataclass(frozen=True)
class Code:
    """Loads and stores are instructions of the kernel's text, counted once each."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int  # of 128 bits
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    exponentials: int


def of(backend: str, compiled: Any) -> Code:
    """Reads what ``triton.compile`` returned for the backend "cuda" or "hip"."""
    return _of_nvidia(compiled) if backend == "cuda" else _of_amd(compiled)


def blocks(backend: str, registers: int, num_warps: int) -> int:
    """How many blocks of threads the registers of one multiprocessor hold at once."""
    if backend == "cuda":
        for_a_warp = -(-32 * registers // PORTION) * PORTION
        return min(REGISTERS // (num_warps * for_a_warp), THREADS // (32 * num_warps))
    waves = min(WAVES, VECTOR_REGISTERS // (-(-registers // 8) * 8))
    return UNITS * waves // num_warps


def _of_nvidia(compiled: Any) -> Code:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, flag, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    number = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads, stores = re.findall(r"\bLDG\S*", text), re.findall(r"\bSTG\S*", text)
    return Code(
        number["REG"],
        number["STACK"] + number["LOCAL"],
        compiled.metadata.shared,
        *_by_width(loads, lambda access: ".128" in access),
        *_by_width(stores, lambda access: ".128" in access),
        len(re.findall(r"MUFU\.EX2", text)),
    )


def _of_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]
    number = {name: int(n) for name, n in re.findall(r"\.(vgpr\w+|private\w+):\s+(\d+)", text)}
    loads = re.findall(r"(?:global|buffer|flat)_load_\w+", text)
    stores = re.findall(r"(?:global|buffer|flat)_store_\w+", text)
    return Code(
        number["vgpr_count"],
        4 * number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        compiled.metadata.shared,
        *_by_width(loads, lambda access: access.endswith("x4")),
        *_by_width(stores, lambda access: access.endswith("x4")),
        len(re.findall(r"\bv_exp_f32", text)),
    )


def _by_width(accesses: list[str], wide: Any) -> tuple[int, int]:
    count = sum(map(wide, accesses))
    return count, len(accesses) - count
