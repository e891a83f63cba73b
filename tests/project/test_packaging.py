"""The source distribution and the wheel built from it hold what users need, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import irl_ops

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")


def sources(folder: str, *endings: str) -> set[str]:
    """Paths in the checkout; irl_ops/kernels may be a link to kernels/ and is left out."""
    paths = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
    return {p for p in paths if p.endswith(endings) and not p.startswith("irl_ops/kernels/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel built from it, of a copy of the sources.

    A copy, so that nothing is written into the checkout; without isolation, so that nothing is
    downloaded. The environment variable IRL_OPS_DIST names a folder where that was done already.
    """
    if os.environ.get("IRL_OPS_DIST"):
        return Path(os.environ["IRL_OPS_DIST"])
    work = tmp_path_factory.mktemp("packaging")
    shutil.copytree(
        ROOT, work / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES)
    )
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--skip-dependency-check"]
    command += ["--outdir", work / "dist", work / "source"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_wheel_holds_every_module_and_the_extension(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    extension = {n for n in names if re.fullmatch(r"irl_ops/_native\.[^/]+\.(so|pyd)", n)}
    assert len(extension) == 1
    modules = sources("irl_ops", ".py", ".pyi", "py.typed")
    modules |= {f"irl_ops/{name}" for name in sources("kernels", ".py")}
    assert {"irl_ops/_native.pyi", "irl_ops/py.typed", "irl_ops/kernels/__init__.py"} <= modules
    assert names - extension == modules


def test_wheel_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "irl-ops"
    assert metadata["Version"] == irl_ops.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    always = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {re.split(r"[<>=]", line)[0] for line in always} == {"numpy", "array-api-compat"}


def test_wheel_carries_the_licence_and_the_command(wheel):
    (licence,) = (n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    (commands,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "irl-ops = irl_ops.command:main" in wheel.read(commands).decode()


def test_source_distribution_can_build_and_test(sdist):
    wanted = {"LICENSE", "README.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    wanted |= sources("irl_ops", ".py", ".pyi", "py.typed") | sources(
        "kernels", ".py", ".cpp", ".h"
    )
    wanted |= sources("bindings", ".cpp", ".h") | sources("tests", ".py", ".cpp", ".h")
    for folder in ("benchmarks", "examples", "docs"):
        wanted |= sources(folder, ".py", ".md")
    assert {"irl_ops/torch/losses.py", "kernels/cpu/rows.cpp", "bindings/module.cpp"} <= wanted
    assert not wanted - sdist


def test_source_distribution_holds_nothing_that_was_built(sdist):
    assert not {name for name in sdist if name.endswith((".so", ".pyd", ".pyc", ".o"))}
    assert not {name for name in sdist if name.startswith("irl_ops/kernels")}


def test_every_requirement_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[\[<>=;]", line)[0].strip() for line in wanted} - {"irl-ops"}
    assert names <= pins().keys()


def test_constraints_are_exact_and_name_no_index():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pin = re.compile(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+")
    assert not [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)]


def test_no_page_and_no_message_installs_from_an_index_what_is_in_none():
    """The package is in no index: `pip install irl-ops` would fetch what others might put there."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    files += [
        p for folder in ("irl_ops", "kernels", "examples") for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    by_name = re.compile(r"pip install[^`\n]*irl[-_]ops")
    allowed = "pip install . in a clone of irl_ops"
    assert by_name.search("run pip install 'irl-ops[triton]'")
    assert len(files) > 40
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not by_name.search(line.replace(allowed, "")), f"{path}: {line}"


def test_the_oldest_versions_that_pages_and_messages_name_are_those_of_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    oldest = dict(
        found.groups() for line in lines if (found := re.match(r"([\w-]+)>=([\d.]+)", line))
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package, spelt in (
        ("torch", "PyTorch"),
        ("jax", "JAX"),
        ("transformers", "Transformers"),
        ("triton", "Triton"),
    ):
        assert f"{spelt} {oldest[package]} or newer" in readme
    message = (ROOT / "irl_ops" / "torch" / "triton.py").read_text(encoding="utf-8")
    assert f"pip install 'triton>={oldest['triton']}'" in message
    message = (ROOT / "irl_ops" / "jax" / "triton.py").read_text(encoding="utf-8")
    assert f"'triton>={oldest['triton']}'" in message
    (jax_triton,) = {line.partition(";")[0] for line in lines if line.startswith("jax-triton")}
    assert f"'{jax_triton}'" in message


def test_the_oldest_jax_is_what_the_extra_admits():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert project["project"]["optional-dependencies"]["jax"] == ["jax>=0.7"]
    assert pinned == {"jax": "0.7.0", "jaxlib": "0.7.0"}
    assert any(line.startswith("jaxlib==0.7.0;") for line in project["build-system"]["requires"])


def test_pre_commit_runs_the_pinned_tools():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = dict(re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", text))
    assert revisions["ruff-pre-commit"] == pins()["ruff"]
    assert revisions["mirrors-clang-format"] == pins()["clang-format"]


def planned(folder: Path, goals: str, stamp: str | None) -> str:
    """What make would do for goals in a virtual environment that holds the extras of a stamp."""
    venv = folder / "venv"
    venv.mkdir()
    if stamp:
        (venv / ".ready").write_text(stamp + "\n")
    command = ["make", "-n", *goals.split(), f"VENV={venv}"]
    clean = {k: v for k, v in os.environ.items() if k not in ("EXTRAS", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("goals", "stamp", "installed"),
    [
        ("demo", None, "demo"),
        ("test", None, "demo,dev"),
        ("demo test", None, "demo,dev"),
        ("demo", "demo", None),
        ("demo", "demo,dev", None),  # what is there suffices, and stays
        ("test", "demo", "demo,dev"),
        ("test", "cross,demo,dev", None),
        ("test EXTRAS=demo,dev,cross", "demo,dev", "cross,demo,dev"),
        ("demo EXTRAS=dev", "demo", "demo,dev"),
    ],
)
def test_make_installs_what_is_missing_and_takes_nothing_away(goals, stamp, installed, tmp_path):
    plan = planned(tmp_path, goals, stamp)
    found = re.findall(r"pip install .*-e '\.\[(.*)\]'", plan)
    assert found == ([installed] if installed else [])
    assert re.findall(r"echo '(\S*)' > ", plan) == found  # the stamp says what is there


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))
