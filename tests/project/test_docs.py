"""What the pages say runs: the Python blocks of README.md and docs/, from top to bottom.

The blocks of a page share one namespace. A ``text`` block that follows a Python block with nothing
between them is what that block prints, to the letter. A block after ``<!-- no-run -->``, or
``<!-- no-run: why -->``, has to compile and no more.
"""

import ast
import builtins
import contextlib
import io
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if page.exists()]

BLOCK = re.compile(
    r"^(?P<skip><!-- no-run(?:: [^>]+)? -->\s*)?"
    r"^```python\n(?P<code>.*?)^```$"
    r"(?:\s*?^```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


class Block(NamedTuple):
    line: int
    code: str
    prints: str | None
    run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, found.start("code")),
            found["code"],
            found["prints"],
            found["skip"] is None,
        )
        for found in BLOCK.finditer(text)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)
    namespace = {"__name__": f"page_{page.stem}"}
    for block in blocks(page):
        # with as many empty lines before it, a traceback names the line of the page
        code = compile("\n" * block.line + block.code, str(page), "exec")
        if not block.run:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.prints is not None:
            assert printed.getvalue() == block.prints, f"{name(page)}:{block.line}"


@pytest.mark.parametrize("block", blocks(ROOT / "README.md"), ids=lambda b: f"line {b.line + 1}")
def test_each_block_of_the_readme_stands_alone(block, tmp_path, monkeypatch):
    """Whoever uses JAX copies the JAX block alone."""
    monkeypatch.chdir(tmp_path)
    if block.run:
        exec(block.code, {"__name__": "alone"})
    else:
        assert imports_the_loss(block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_first_block_brings_the_names_that_it_uses(page):
    found = blocks(page)
    if not found:
        return  # docs/tpu.md has no code
    tree = ast.parse(found[0].code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    assert used <= defined, f"{name(page)}: {sorted(used - defined)}"
    assert imports_the_loss(found[0])


def imports_the_loss(block: Block) -> bool:
    return re.search(r"^(from|import) irl_ops\b", block.code, re.MULTILINE) is not None


def test_every_python_block_is_found():
    """A fence that the pattern misses would never run, and nobody would know."""
    for page in PAGES:
        fences = re.findall(r"^ *```+ *(?:python|py)\b", page.read_text(encoding="utf-8"), re.M)
        assert len(blocks(page)) == len(fences), name(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), f"{name(page)}: {link[0]}"
        if link["anchor"]:
            headings = re.findall(r"^#+ +(.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert link["anchor"] in map(anchor, headings), f"{name(page)}: {link[0]}"


def anchor(heading: str) -> str:
    """As the forges make it: lower case, punctuation gone, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
