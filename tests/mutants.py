"""Breaks the code on purpose, one break at a time, and runs the test that has to notice it.

    python -P tests/mutants.py              # all of tests/mutant_table
    python -P tests/mutants.py -k triton    # those whose description holds one of these words
    python -P tests/mutants.py --list

The breaks are made in a copy of the checkout; of the C++ code, which is not optimized there, only
the objects that the broken file is a part of are built again. Fails if a break survives, if its
text is no longer found once, or if what it makes does not compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "mutants"  # of the C++ code as it is, kept from run to run


def load_table() -> Any:
    """By its path: tests is a package of the copy, and imported there."""
    table = ROOT / "tests/mutant_table/__init__.py"
    spec = importlib.util.spec_from_file_location("mutant_table", table)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutant_table"] = module
    spec.loader.exec_module(module)
    return module


# --- The copy, and the C++ extension in it ---


def copy_checkout(to: Path) -> None:
    """What git tracks or would, without what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / "irl_ops" / "kernels").symlink_to("../kernels")


class Extension:
    """irl_ops._native of a copy, built object by object with the options of setup.py."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # setup() in that folder, stopped before it does anything: only its options are wanted
        script = (
            "import sys, distutils.core as d; s = d.run_setup('setup.py', stop_after='init');"
            "e = s.ext_modules[0]; print('\\n'.join(e.sources)); print('--');"
            "print('\\n'.join(['-I' + p for p in e.include_dirs]"
            " + [f'-D{k}={v}' for k, v in e.define_macros] + e.extra_compile_args))"
        )
        command = [sys.executable, "-c", "import setuptools; " + script]
        shown = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        sources, flags = shown.stdout.split("\n--\n")
        self.sources = [line for line in sources.split("\n") if line.endswith(".cpp")]
        include = sysconfig.get_paths()["include"]
        given = ["-O0" if flag == "-O3" else flag for flag in flags.split("\n")]
        self.flags = ["-fPIC", "-std=c++17", f"-I{include}", *filter(None, given)]
        self.compiler = shlex.split(os.environ.get("CXX", "c++"))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.target = root / "irl_ops" / f"_native{suffix}"

    def build(self) -> None:
        """The code as it is: objects that are older than their sources."""
        OBJECTS.mkdir(parents=True, exist_ok=True)
        for source in self.sources:
            made = self.object(source)
            if not made.exists() or any(
                not path.exists() or path.stat().st_mtime > made.stat().st_mtime
                for path in (self.root / name for name in self.parts(source))
            ):
                self.compile(source, made)
        self.link([self.object(source) for source in self.sources])

    def take_built(self) -> bool:
        """The extension of the checkout, where no break is in C++: whether there is one."""
        built = ROOT / "irl_ops" / self.target.name
        if built.exists():
            shutil.copy2(built, self.target)
        return built.exists()

    def rebuild(self, changed: str) -> None:
        """With ``changed`` broken: the objects that it is a part of."""
        objects = []
        for source in self.sources:
            made = self.object(source)
            if changed in self.parts(source):
                made = self.root / made.name
                self.compile(source, made, note=False)
            objects.append(made)
        self.link(objects)

    def object(self, source: str) -> Path:
        return OBJECTS / (source.replace("/", "_") + ".o")

    def parts(self, source: str) -> list[str]:
        """The file and what it includes, as the compiler noted it."""
        noted = self.object(source).with_suffix(".d")
        if not noted.exists():
            return [source]
        words = noted.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
        return [os.path.normpath(word) for word in words if not word.startswith("/")]

    def compile(self, source: str, made: Path, note: bool = True) -> None:
        noting = ["-MMD", "-MF", str(made.with_suffix(".d"))] if note else []
        self._run([*self.compiler, *self.flags, *noting, "-c", source, "-o", str(made)])

    def link(self, objects: list[Path]) -> None:
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        self.target.unlink(missing_ok=True)
        command = [*self.compiler, "-shared", "-pthread", *undefined, "-o", str(self.target)]
        self._run([*command, *map(str, objects)])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)


# --- Tests in a process of their own, with the frameworks imported already ---


def warm_up() -> None:
    """Imports what does not belong to the copy, so that forked processes need not."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tests"]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("pytest", "hypothesis", "torch", "triton", "array_api_compat.torch"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    assert not any(name.startswith("irl_ops") for name in sys.modules)


class WithoutShrinking:
    """That a test fails is all that is asked; to make its example small can take minutes."""

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        ours = settings.get_profile("irl_ops")  # of the copy's conftest.py, which is loaded by now
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", ours, phases=phases)
        settings.load_profile("mutants")


def run_tests(root: Path, tests: list[str], log: Path) -> int:
    """pytest's exit status in the copy; below 0, the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with log.open("w", encoding="utf-8") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                os.chdir(root)
                sys.path.insert(0, str(root))
                os.environ["PYTHONPATH"] = str(root)  # of processes that tests start
                sys.dont_write_bytecode = True
                import pytest

                options = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
                status = int(pytest.main([*options, *tests], plugins=[WithoutShrinking()]))
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended)


# --- One break ---


def place(root: Path, room: tuple[str, ...], text: str) -> Path:
    """The one file of a room that holds ``text``, once."""
    found = [
        path
        for pattern in room
        for path in sorted(root.glob(pattern))
        for _ in range(path.read_text(encoding="utf-8").count(text))
    ]
    if len(found) != 1:
        where = ", ".join(path.relative_to(root).as_posix() for path in found) or "nowhere"
        raise LookupError(f"the text has to be there once, it is found {where}: {text!r}")
    return found[0]


def outcome_of(root: Path, extension: Extension, mutant: Any, log: Path) -> str:
    """ "caught", or what is wrong."""
    try:
        path = place(root, mutant.room, mutant.text)
    except LookupError as error:
        return str(error)
    whole, seen = path.read_text(encoding="utf-8"), path.stat()
    compiled = path.suffix in (".cpp", ".h")
    try:
        path.write_text(whole.replace(mutant.text, mutant.replacement), encoding="utf-8")
        if compiled:
            extension.rebuild(path.relative_to(root).as_posix())
        status = run_tests(root, [mutant.test], log)
    except RuntimeError as error:
        return f"does not compile: {error}"
    finally:
        path.write_text(whole, encoding="utf-8")
        # as old as before, so that only what is linked is made again
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        if compiled:
            extension.build()
    if status == 0:
        return "SURVIVED"
    # 1: a test failed; below 0: it crashed. Anything else, and no test ran.
    return "caught" if status == 1 or status < 0 else f"pytest ended with {status}, see {log}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", nargs="+", help="only breaks whose description holds one of these")
    parser.add_argument("--list", action="store_true", help="show the breaks and their tests")
    given = parser.parse_args()
    words = [word.lower() for word in given.k or [""]]
    mutants = [m for m in load_table().MUTANTS if any(word in m.what.lower() for word in words)]
    if given.list:
        print(*(f"{m.what}\n    {m.test}" for m in mutants), sep="\n")
        return 0
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        # conftest.py's own would stay, since forked processes end without their farewells
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/jax")
        root = Path(folder, "checkout")
        root.mkdir()
        copy_checkout(root)
        extension = Extension(root)
        compiled = any(pattern.endswith((".cpp", ".h")) for m in mutants for pattern in m.room)
        if compiled or not extension.take_built():
            extension.build()
        log = Path(folder, "log")
        if run_tests(root, sorted({m.test for m in mutants}), log) != 0:
            print(log.read_text(encoding="utf-8"))
            print("The tests have to pass on the code as it is.")
            return 1
        failed = 0
        for mutant in mutants:
            start = time.monotonic()
            outcome = outcome_of(root, extension, mutant, log)
            failed += outcome != "caught"
            seconds = time.monotonic() - start
            print(f"{outcome:8} {seconds:5.1f} s  {mutant.what}", flush=True)
            if outcome not in ("caught", "SURVIVED") and log.exists():
                print(log.read_text(encoding="utf-8")[-2000:])
    print(f"{len(mutants)} breaks, {len(mutants) - failed} caught")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
