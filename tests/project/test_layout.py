"""The rules of the house that no other tool checks: who imports whom, and what files may hold."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "triton", "transformers", "accelerate", "trl"}
FOLDERS = ("irl_ops", "kernels", "bindings", "tests", "benchmarks", "examples", "docs")


def files(*suffixes: str) -> list[Path]:
    """The project's own files; irl_ops/kernels may be a link to kernels/ and is left out."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    link = ROOT / "irl_ops" / "kernels"
    return sorted(p for p in found if p.suffix in suffixes and link not in p.parents)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(path: Path, forbidden: set[str]) -> set[str]:
    return {
        name
        for name in imports(path)
        if any(name == head or name.startswith(f"{head}.") for head in forbidden)
    }


UPPER = {
    "irl_ops.torch",
    "irl_ops.jax",
    "irl_ops.integrations",
    "irl_ops.reference",
    "irl_ops.doctor",
    "irl_ops.debug",
    "irl_ops.score",
    "irl_ops.command",
}
JAX_TRAINERS = (
    "jax_batches",
    "flax",
    "equinox",
    "optax",
    "maxtext",
    "tunix",
    "easydel",
    "levanter",
)


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("irl_ops/__init__.py", FRAMEWORKS | {"numpy", "irl_ops"}),
        ("irl_ops/algebra/*.py", FRAMEWORKS | {"numpy", "irl_ops.kernels"} | UPPER),
        ("irl_ops/algebra/triton/*.py", (FRAMEWORKS - {"triton"}) | UPPER),
        ("irl_ops/options.py", FRAMEWORKS | {"numpy"} | UPPER),
        ("irl_ops/arguments.py", FRAMEWORKS | {"numpy"} | UPPER),
        ("irl_ops/terms.py", FRAMEWORKS | {"numpy"} | UPPER),
        ("irl_ops/call.py", FRAMEWORKS | {"numpy"} | UPPER),
        ("irl_ops/schedules.py", FRAMEWORKS | {"irl_ops"}),
        ("irl_ops/reference.py", FRAMEWORKS | (UPPER - {"irl_ops.reference"})),
        ("irl_ops/torch/**/*.py", (FRAMEWORKS - {"torch", "triton"}) | (UPPER - {"irl_ops.torch"})),
        (
            "irl_ops/jax/**/*.py",
            (FRAMEWORKS - {"jax", "triton"}) | (UPPER - {"irl_ops.jax"}),
        ),
        (
            "irl_ops/integrations/**/*.py",
            {f"irl_ops.{name}" for name in ("doctor", "reference", "debug", "score", "command")},
        ),
        *(
            (f"irl_ops/integrations/{n}.py", (FRAMEWORKS - {"jax"}) | {"irl_ops.torch"})
            for n in JAX_TRAINERS
        ),
        (
            "irl_ops/debug/**/*.py",
            {"irl_ops.doctor", "irl_ops.integrations", "irl_ops.torch", "irl_ops.jax"},
        ),
        ("irl_ops/score/**/*.py", {"jax", "jaxlib", "flax", "triton", "trl", "irl_ops.jax"}),
        ("irl_ops/command.py", FRAMEWORKS | {"numpy"}),
        ("kernels/**/*.py", UPPER | {"irl_ops.algebra", "irl_ops.schedules", "transformers"}),
        ("kernels/reference/**/*.py", FRAMEWORKS),
        ("kernels/triton/**/*.py", FRAMEWORKS - {"triton"}),
        ("kernels/triton/dispatch.py", FRAMEWORKS),
    ],
)
def test_imports_point_one_way(pattern, forbidden):
    paths = sorted(ROOT.glob(pattern))
    assert paths, f"{pattern} matches no file"
    found = {relative(path): breaches(path, forbidden) for path in paths}
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("irl_ops", FRAMEWORKS | {"numpy"}),
        ("irl_ops.algebra", FRAMEWORKS),
        ("irl_ops.reference", FRAMEWORKS),
        ("irl_ops.torch", FRAMEWORKS - {"torch", "triton"}),
        ("irl_ops.jax", FRAMEWORKS - {"jax", "jaxlib"}),
        ("irl_ops.debug", FRAMEWORKS),
        ("irl_ops.integrations.maxtext", FRAMEWORKS - {"jax", "jaxlib"}),
        ("irl_ops.integrations.rl", FRAMEWORKS - {"torch", "triton"}),
        ("irl_ops.integrations.rl_jax", FRAMEWORKS - {"jax", "jaxlib"}),
    ],
)
def test_import_loads_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.split())
    assert "irl_ops" in loaded
    assert not loaded & absent


def test_row_kernels_include_no_algebra():
    """What knows of losses may include kernels, never the other way round."""
    algebra = {path.name for path in (ROOT / "irl_ops/algebra/cpu").glob("*.h")}
    assert algebra
    for path in (ROOT / "kernels/cpu").iterdir():
        included = set(re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")))
        assert not included & algebra, path


def test_folder_kernels_does_not_hide_the_distribution_of_that_name():
    found = importlib.util.find_spec("kernels")
    assert found is None or ROOT / "kernels" not in Path(str(found.origin)).parents


def test_kernels_are_importable_under_irl_ops():
    found = importlib.util.find_spec("irl_ops.kernels")
    assert found is not None
    assert Path(str(found.origin)).resolve().parent.name == "kernels"


def test_files_stay_small():
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in files(".py", ".pyi", ".cpp", ".h")
    }
    assert lengths
    too_long = {name: lines for name, lines in lengths.items() if lines > 450}
    assert not too_long


def test_no_file_without_a_subject():
    vague = re.compile(r"(utils?|helpers?|managers?|common|misc)\.(py|cpp|h)")
    assert not [relative(path) for path in files(".py", ".cpp", ".h") if vague.fullmatch(path.name)]


# Written in two halves, so that this file does not hold them.
MACHINE_PATHS = ["/ho" + "me/", "/ro" + "ot/", "/Us" + "ers/", "/wo" + "rk/", "../sha" + "red"]
REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org"]
LEFT_OVERS = ["TO" + "DO", "FIX" + "ME", "breakpoint" + "()"]


@pytest.mark.parametrize("word", MACHINE_PATHS + REGISTRIES + LEFT_OVERS)
def test_no_file_names_a_machine_or_leaves_work_behind(word):
    texts = files(".py", ".pyi", ".cpp", ".h", ".md", ".toml", ".txt", ".in", ".yaml", ".cff", "")
    assert len(texts) > 10
    assert not [relative(p) for p in texts if word in p.read_text(encoding="utf-8")]
