"""One break: a text, what it becomes, and the test that notices."""

from typing import NamedTuple

ALGEBRA = ("irl_ops/algebra/*.py",)
TERMS = ("irl_ops/terms.py",)
CPU = ("irl_ops/algebra/cpu/*.cpp", "irl_ops/algebra/cpu/*.h")
TRITON = ("irl_ops/algebra/triton/*.py",)
BINDINGS = ("bindings/*.cpp", "bindings/*.h", "irl_ops/torch/native*.py")
LAUNCHES = ("irl_ops/torch/triton*.py",)
CHUNKS = ("irl_ops/torch/chunks.py", "irl_ops/torch/linear_loss.py", "irl_ops/torch/needed.py")
REFERENCE = ("kernels/reference/*.py",)
KERNELS = ("kernels/cpu/*.cpp", "kernels/cpu/*.h")
TRITON_KERNELS = ("kernels/triton/*.py",)
MEASURES = ("irl_ops/torch/measures.py", "irl_ops/torch/linear_measures.py")
TORCH_SHARDS = ("irl_ops/torch/sharded*.py", "irl_ops/torch/rows.py", "irl_ops/torch/shards.py")
JAX_SHARDS = ("irl_ops/jax/shards.py", "irl_ops/jax/linear_sharded.py")


class Mutant(NamedTuple):
    what: str
    room: tuple[str, ...]
    text: str
    replacement: str
    test: str


CASES = "tests/test_named_cases.py::"


def on(backend: str, case: str, reduction: str = "") -> str:
    return f"{CASES}test_torch[{backend}-{reduction}-{case}]"


def algebra(what: str, text: str, replacement: str, *case: str) -> Mutant:
    return Mutant(f"algebra: {what}", ALGEBRA, text, replacement, on("reference", *case))


def cpu(what: str, text: str, replacement: str, *case: str) -> Mutant:
    return Mutant(f"C++: {what}", CPU, text, replacement, on("native", *case))


def triton(what: str, text: str, replacement: str, *case: str) -> Mutant:
    return Mutant(f"Triton: {what}", TRITON, text, replacement, on("triton", *case))


def binding(what: str, text: str, replacement: str, *case: str) -> Mutant:
    return Mutant(f"bindings: {what}", BINDINGS, text, replacement, on("native", *case))


STAGES_IN_CPP = "tests/algebra/test_contract.py::test_every_stage_in_cpp"
STAGES_IN_TRITON = "tests/torch/test_triton_stages.py::test_every_stage_is_that_of_the_algebra"
TRANSPOSED = "test_row_kernels_take_transposed_vectors"
