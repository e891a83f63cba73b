"""What every test runs under."""

import atexit
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Imported before the next statement: a package that is imported finds its modules through its own
# __path__, so a checkout that is not installed but on PYTHONPATH keeps working.
import irl_ops  # noqa: F401

# With the repository's root on sys.path, `import kernels` would find our folder in the place of the
# distribution of that name, which transformers looks for.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# deadline=None: on a shared machine the time of one example says nothing.
# derandomize=False: in CI, too, every run draws examples of its own; a failure there prints what
# repeats it anywhere, the blob of the example and the seed of the run. So few examples a run add up
# over runs, and `make fuzz` draws more.
settings.register_profile(
    "irl_ops", deadline=None, max_examples=40, derandomize=False, print_blob=True
)
settings.load_profile("irl_ops")

# Two test processes have two OpenMP threads each, on two cores: one that waits actively for another
# takes the core that the other needs. It counts when torch is first imported, here and in children.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# JAX looks for accelerators when it is first used; with libtpu installed it would wait for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one test has compiled, here or in another process of this run, no other one compiles again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="irl-ops-jax-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Triton's kernels are interpreted. The variable counts when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton"):
    from . import interpreter

    interpreter.install()


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    return _repeat(config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(_repeat(config))


def _repeat(config: pytest.Config) -> str:
    return f"the same random examples again: --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several processes the long tests come first: none is left alone with one at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """An interpreter takes milliseconds for a row: of random batches it gets one in ten.

    "reference" gets half: it is the array code whose parts the tests of the algebra and of the row
    kernels compare with float64 as well.
    """
    test = getattr(item, "obj", None)
    usual = getattr(test, "_hypothesis_internal_use_settings", None)
    params = item.callspec.params if hasattr(item, "callspec") else {}
    share = {"triton": 10, "pallas": 10, "reference": 2}.get(params.get("backend"), 1)
    if usual is None or share == 1:
        return (yield)
    few = settings(usual, max_examples=max(1, usual.max_examples // share))
    test._hypothesis_internal_use_settings = few
    try:
        return (yield)
    finally:
        test._hypothesis_internal_use_settings = usual
