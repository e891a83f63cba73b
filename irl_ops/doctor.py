"""``irl-ops doctor``: what this installation consists of, and whether its kernels compute rightly.

Made for bug reports. It imports torch and JAX only where they are installed, and NumPy always.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import irl_ops

BACKENDS = ("pallas", "triton", "native", "reference")  # of torch or of JAX
PACKAGES = ("numpy", "array-api-compat", "torch", "jax", "triton", "transformers")
# Rounding of the exponent moves p_j by a few times p_j |log p_j| 2^-24, and p |log p| is at most
# 1/e; the value and the coefficient round by a few times 2^-24 of themselves. Together below 1e-6.
TOLERANCE = 1e-6

HOW_TO_BUILD = (
    "irl_ops._native is not built. In a clone of irl_ops run `pip install .` (to work on it, "
    "`pip install -e .`), which needs a C++17 compiler; or install a wheel for this platform."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole command line, as ``irl-ops`` runs it; returns the exit status."""
    from irl_ops.command import main as irl_ops_command

    return irl_ops_command(arguments)


def run(*, as_json: bool = False) -> int:
    """Print the report; returns the exit status, 1 where a check failed."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 0 if found["ok"] else 1


def report() -> dict[str, Any]:
    """Everything the doctor found, as plain values; ``report()["ok"]`` is the verdict."""
    native = native_kernels()
    said: list[str] = []
    with stderr_kept(said):
        of_jax = jax_backends()
    problems = environment_problems()
    return {
        "irl_ops": irl_ops.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("IRL_OPS_")},
        "native": native,
        "torch_backends": torch_backends(),
        "jax_backends": of_jax,
        "jax_messages": said,  # of JAX's plugins, such as a libtpu without a TPU
        "problems": problems,
        "ok": native["ok"] and not problems,
    }


@contextmanager
def stderr_kept(lines: list[str]) -> Generator[None]:
    """Adds to ``lines`` what is written to standard error, by libraries in C too.

    After an exception it is written there after all.
    """
    sys.stderr.flush()
    standard = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(standard, 2)
            kept.seek(0)
            sys.stderr.write(kept.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(standard, 2)
            os.close(standard)
        kept.seek(0)
        lines += kept.read().decode(errors="replace").splitlines()


def environment_problems() -> list[str]:
    """Environment variables of this package whose values no call accepts."""
    name = os.environ.get("IRL_OPS_BACKEND", "")
    if name in ("", "auto", *BACKENDS):
        return []
    return [f"IRL_OPS_BACKEND is {name!r}; accepted: auto, {', '.join(BACKENDS)}"]


def version(distribution: str) -> str | None:
    """The installed version of a distribution, found without importing it; None if absent.

    Triton is asked itself: the one that is imported need not be the one that pip installed.
    """
    if distribution == "triton" and importlib.util.find_spec("triton"):
        return str(importlib.import_module("triton").__version__)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model, as its operating system calls it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def native_kernels() -> dict[str, Any]:
    """Which instruction sets the extension serves here, and the error of each in the self-check."""
    try:
        from irl_ops import _native
    except ImportError as error:
        built = importlib.util.find_spec("irl_ops._native") is not None
        return {"ok": False, "problem": f"irl_ops._native: {error}" if built else HOW_TO_BUILD}
    try:
        isa = _native.isa()
    except ValueError as error:  # names IRL_OPS_ISA, what it is and what is accepted
        return {"ok": False, "problem": str(error)}
    errors = {name: native_error(_native, name) for name in _native.isas()}
    return {
        "ok": all(error <= TOLERANCE for error in errors.values()),  # False for NaN as well
        "isa": isa,
        "errors": errors,
        "tolerance": TOLERANCE,
    }


def native_error(native: ModuleType, isa: str) -> float:
    """Largest error of ``row_stats_grad`` on a small random problem, against float64 NumPy.

    ``row_max + logsum`` is compared with logsumexp, and ``dlogits`` with
    ``p_j (alpha + beta logsumexp)`` relative to the row's coefficient.
    """
    rows, vocab = 7, 1003  # no multiple of any vector width
    random = np.random.default_rng(0)
    logits = (4 * random.standard_normal((rows, vocab))).astype(np.float32)
    alpha, beta = random.uniform(0.5, 1.5, (2, rows)).astype(np.float32)
    row_max, logsum = np.full((2, rows), np.nan, np.float32)
    dlogits = np.full_like(logits, np.nan)
    native.row_stats_grad(
        logits.ctypes.data,
        "float32",
        [1, rows],
        [rows * vocab, vocab],
        vocab,
        alpha.ctypes.data,
        beta.ctypes.data,
        0,
        row_max.ctypes.data,
        logsum.ctypes.data,
        0,
        dlogits.ctypes.data,
        [rows * vocab, vocab],
        1,
        isa,
    )
    exact = logits.astype(np.float64)
    top = exact.max(axis=1)
    value = top + np.log(np.exp(exact - top[:, None]).sum(axis=1))
    scale = alpha + beta * value
    gradient = np.exp(exact - value[:, None]) * scale[:, None]
    value_error = np.abs(row_max.astype(np.float64) + logsum - value) / np.abs(value)
    gradient_error = np.abs(dlogits - gradient) / scale[:, None]
    return float(np.maximum(value_error.max(), gradient_error.max()))


def torch_backends() -> dict[str, dict[str, str]] | None:
    """For each backend and device, "available" or why it is not; None where torch is absent."""
    if version("torch") is None:
        return None
    from irl_ops.torch.backends import BACKENDS, devices

    return {
        name: {d.type: backend.unavailable(d) or "available" for d in devices()}
        for name, backend in BACKENDS.items()
    }


def jax_backends() -> dict[str, dict[str, str]] | None:
    """For each backend and platform, "available" or why it is not; None where JAX is absent."""
    if version("jax") is None:
        return None
    import jax

    from irl_ops.jax.backends import BACKENDS

    here = dict.fromkeys(["cpu", jax.default_backend()])
    return {
        name: {platform: backend.unavailable(platform) or "available" for platform in here}
        for name, backend in BACKENDS.items()
    }


def as_text(found: dict[str, Any]) -> str:
    """The report as lines to read, aligned."""
    lines = [
        ("irl_ops", found["irl_ops"]),
        ("python", found["python"]),
        ("platform", found["platform"]),
        ("cpu", f"{found['cpu']}, {found['cores']} cores"),
    ]
    lines += [(name, number or "not installed") for name, number in found["packages"].items()]
    lines += list(found["environment"].items())
    lines += [
        (f"{framework} backend {name}", f"{device}: {answer}")
        for framework in ("torch", "jax")
        for name, answers in (found[f"{framework}_backends"] or {}).items()
        for device, answer in answers.items()
    ]
    native = found["native"]
    if "problem" in native:
        lines.append(("native kernels", native["problem"]))
    else:
        lines.append(("instruction set", f"{native['isa']} of {', '.join(native['errors'])}"))
        lines += [
            (
                f"self-check {isa}",
                f"relative error {error:.1e}, tolerance {native['tolerance']:.0e}",
            )
            for isa, error in native["errors"].items()
        ]
    lines += [("environment", problem) for problem in found["problems"]]
    lines.append(("verdict", "OK" if found["ok"] else "FAILED"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


if __name__ == "__main__":
    sys.exit(main())
