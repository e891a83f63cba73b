"""Build script: metadata lives in pyproject.toml, only what TOML cannot say lives here.

* ``kernels/`` on disk is the import package ``irl_ops.kernels``. A top-level ``kernels`` would
  collide with the distribution of that name, which transformers looks for.
* ``irl_ops._native`` is built from ``kernels/cpu`` and ``bindings`` with a C++17 compiler. Neither
  torch nor jax is needed to build it.
"""

from __future__ import annotations

import os
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


# -ffast-math is absent on purpose: it would change the meaning of NaN and inf, and before gcc 13
# linking with it sets flush-to-zero for the whole process.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]

native = Pybind11Extension(
    "irl_ops._native",
    files("kernels/cpu/*.cpp", "bindings/*.cpp"),
    include_dirs=["kernels/cpu"],
    # setup.py is a dependency because the flags live here: without it, a change of flags alone
    # would leave the old extension in place.
    depends=[*files("kernels/cpu/*.h", "bindings/*.h"), "setup.py"],
    extra_compile_args=[*FLAGS, "-pthread"],
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
