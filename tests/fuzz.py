"""All property tests on all backends, with fresh random examples until the time is up.

    python -P tests/fuzz.py --minutes 10

What fails is written to runs/fuzz/, one text file per test: the command that repeats it, then what
pytest showed. The tests run in rounds, each with a seed and in an order of its own, in a process of
its own: a crash ends one round and is written down too.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "fuzz"


class Properties:
    """A pytest plugin: property tests alone, shuffled, until the time is up."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.end = seed, time.monotonic() + seconds
        self.running = OUT / f"{seed}.running"

    def pytest_sessionstart(self) -> None:
        from hypothesis import settings

        # examples of earlier runs would come first, whatever the seed is
        settings.register_profile("fuzz", settings.get_profile("irl_ops"), database=None)
        settings.load_profile("fuzz")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept = [item for item in items if is_property(item)]
        config.hook.pytest_deselected(items=[item for item in items if not is_property(item)])
        random.Random(self.seed).shuffle(kept)
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(nodeid, encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            save(self.seed, report.nodeid, report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.unlink(missing_ok=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time is up"


def is_property(item: pytest.Item) -> bool:
    return bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False))


def save(seed: int, nodeid: str, shown: str) -> None:
    name = re.sub(r"[^\w.-]+", "_", nodeid.removeprefix("tests/"))
    command = f"python -P -m pytest '{nodeid}' --hypothesis-seed={seed}"
    (OUT / f"{seed}-{name}.txt").write_text(f"{command}\n\n{shown}\n", encoding="utf-8")


def one_round(seed: int, seconds: float, arguments: list[str]) -> int:
    """In this process."""
    options = ["-q", "--no-header", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
    return pytest.main([*options, *arguments], plugins=[Properties(seed, seconds)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop; default 10")
    parser.add_argument("--seed", type=int, help="one round with this seed, in this process")
    parser.add_argument(
        "arguments", nargs="*", help="for pytest, after --: files, or -k EXPRESSION"
    )
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if given.seed is not None:
        return one_round(given.seed, 60 * given.minutes, given.arguments)

    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    end, rounds, failed = time.monotonic() + 60 * given.minutes, 0, []
    while (left := end - time.monotonic()) > 0:
        seed = random.SystemRandom().randrange(2**32)
        command = [sys.executable, "-P", __file__, f"--seed={seed}", f"--minutes={left / 60}"]
        status = subprocess.run([*command, "--", *given.arguments], cwd=ROOT).returncode
        rounds += 1
        running = OUT / f"{seed}.running"
        if running.exists():
            save(seed, running.read_text(encoding="utf-8"), f"the process ended with {status}")
            running.unlink()
        elif status not in ended:  # such as an argument that pytest does not know
            return status
        failed += sorted(OUT.glob(f"{seed}-*.txt"))
    print(f"{rounds} rounds, {len(failed)} failures", *failed, sep="\n  ")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
