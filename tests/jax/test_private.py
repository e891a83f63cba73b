"""A JAX that has renamed what this package takes from inside it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = {"module_context", "axis_context", "emit_python_callback", "_functorch"}
PROGRAM = """
import sys
import types

import jax
from jax.interpreters import mlir
import jax._src.dispatch

{removal}

import numpy as np
import irl_ops.jax as irl
from irl_ops.jax import native, pallas, triton

if "{name}" == "emit_python_callback":  # a build of the extension that XLA cannot call
    native.called_by_xla = lambda: False
logits, labels = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32)
for backend in ("auto", "reference"):
    for run in (irl.iqlearn_loss, jax.jit(irl.iqlearn_loss, static_argnames="backend")):
        assert np.isfinite(run(logits, labels, backend=backend)), backend
gone = ("native",) if "{name}" == "emit_python_callback" else ("native", "pallas")
for backend in gone:
    assert backend not in irl.available_backends()
    try:
        irl.iqlearn_loss(jax.numpy.asarray(logits), labels, backend=backend)
    except ValueError as error:
        assert "{name}" in str(error) and jax.__version__ in str(error), error
    else:
        raise AssertionError(backend + " serves")
if gone != ("native",):
    try:  # traced, no device is known
        jax.jit(lambda q: irl.iqlearn_loss(q, labels, backend="pallas"))(logits)
    except NotImplementedError as error:
        assert "{name}" in str(error) and "accepted: backend='reference'" in str(error), error
    else:
        raise AssertionError("pallas serves")
print("done")
"""


@pytest.mark.parametrize(
    ("name", "removal"),
    [
        (
            "prim_requires_devices_during_lowering",
            "renamed = types.ModuleType('jax._src.dispatch')\n"  # JAX itself keeps its own
            "renamed.__dict__.update(vars(jax._src.dispatch))\n"
            "del renamed.prim_requires_devices_during_lowering\n"
            "sys.modules['jax._src.dispatch'] = renamed",
        ),
        ("module_context", "del mlir.LoweringRuleContext.__annotations__['module_context']"),
        ("axis_context", "del mlir.ModuleContext.__annotations__['axis_context']"),
        ("emit_python_callback", "del mlir.emit_python_callback"),
    ],
)
def test_without_a_private_name_the_reference_serves(name: str, removal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(name=name, removal=removal)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == ["done"], done.stderr


def test_private_names_have_one_place() -> None:
    """In each framework's folder the file private.py, and no other."""
    found = set()
    for path in sorted((ROOT / "irl_ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inside = (
                (isinstance(node, ast.Attribute) and node.attr in PRIVATE)
                or (isinstance(node, ast.Constant) and node.value in PRIVATE)
                or (isinstance(node, ast.Import) and any("._src" in n.name for n in node.names))
                or (isinstance(node, ast.ImportFrom) and "._src" in str(node.module))
            )
            if inside:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"irl_ops/jax/private.py", "irl_ops/torch/private.py"}
