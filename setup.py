"""Build script: metadata lives in pyproject.toml, only what TOML cannot say lives here.

* ``kernels/`` on disk is the import package ``irl_ops.kernels``. A top-level ``kernels`` would
  collide with the distribution of that name, which transformers looks for.
* ``irl_ops._native`` is built from ``kernels/cpu`` and ``bindings`` with a C++17 compiler. Neither
  torch nor jax is needed to build it; of the pinned jaxlib, a build requirement, it takes the
  headers of XLA's FFI. Without them JAX reaches the kernels through a callback.
* The environment variable ``IRL_OPS_XLA_INCLUDE`` names another folder with these headers, that
  holds ``xla/ffi/api/ffi.h``; ``none`` builds without.
* Flags in ``CXXFLAGS`` come after those of this file, so that they win: ``-O0`` builds sooner what
  need not be fast.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import tomllib
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def files(*patterns: str) -> list[str]:
    """Paths relative to the root that match the patterns, in a fixed order."""
    return sorted(p.relative_to(ROOT).as_posix() for glob in patterns for p in ROOT.glob(glob))


def packages() -> list[str]:
    """Every import package: those in irl_ops/, and those in kernels/ under irl_ops.kernels.

    The development symlink irl_ops/kernels would list the second group twice, hence the exclusion.
    """
    own = find_packages(
        include=["irl_ops", "irl_ops.*"], exclude=["irl_ops.kernels", "irl_ops.kernels.*"]
    )
    kernels = [f"irl_ops.kernels.{name}" for name in find_packages("kernels")]
    return [*own, "irl_ops.kernels", *kernels]


def xla_include() -> str | None:
    """The folder of XLA's headers, or None to build without.

    Newer headers than those of the pinned jaxlib would do harm: XLA refuses targets that are newer
    than itself, with an error that takes the whole CPU backend along.
    """
    named = os.environ.get("IRL_OPS_XLA_INCLUDE")
    if named == "none":
        return None
    folder = Path(named) if named else pinned_jaxlib()
    if folder is None:
        return None
    if not (folder / XLA_HEADER).is_file():
        raise FileNotFoundError(f"IRL_OPS_XLA_INCLUDE is {named!r}, without {XLA_HEADER} in it")
    return str(folder)


def pinned_jaxlib() -> Path | None:
    """The headers of the jaxlib that pyproject.toml asks for, where that very one is installed."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    (pinned,) = (line for line in build["requires"] if line.startswith("jaxlib=="))
    try:
        jaxlib = importlib.metadata.distribution("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return None
    if jaxlib.version != pinned.partition(";")[0].partition("==")[2].strip():
        return None
    return Path(str(jaxlib.locate_file("jaxlib/include")))


XLA_HEADER = "xla/ffi/api/ffi.h"
XLA_INCLUDE = xla_include()
print(f"irl_ops._native: XLA's headers are {XLA_INCLUDE or 'absent; JAX will use a callback'}")

# -ffast-math is absent on purpose: it would change the meaning of NaN and inf, and before gcc 13
# linking with it sets flush-to-zero for the whole process.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]

native = Pybind11Extension(
    "irl_ops._native",
    files("kernels/cpu/*.cpp", "irl_ops/algebra/cpu/*.cpp", "bindings/*.cpp"),
    include_dirs=["kernels/cpu", "irl_ops/algebra/cpu"],
    define_macros=[("IRL_OPS_XLA", "1")] if XLA_INCLUDE else [],
    # setup.py is a dependency because the flags live here: without it, a change of flags alone
    # would leave the old extension in place.
    depends=[*files("kernels/cpu/*.h", "irl_ops/algebra/cpu/*.h", "bindings/*.h"), "setup.py"],
    extra_compile_args=[
        *FLAGS,
        "-pthread",
        *(["-isystem", XLA_INCLUDE] if XLA_INCLUDE else []),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ],
    extra_link_args=["-pthread"],
    cxx_std=17,
)

ParallelCompile(default=os.cpu_count() or 1).install()
setup(
    packages=packages(),
    package_dir={"irl_ops.kernels": "kernels"},
    package_data={"irl_ops": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=[native],
    cmdclass={"build_ext": build_ext},
)
