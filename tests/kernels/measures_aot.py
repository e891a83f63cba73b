"""Compiles the Triton row measures for a GPU that is not here: ``python measures_aot.py sm_90``.

A process of its own, since in that of the tests kernels are interpreted.
"""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from irl_ops.kernels.triton import dispatch, measures

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
OPTIONAL = {
    "row_scale": "SCALED", "keep_mask": "MASK", "keep_above": "ABOVE", "b": "B", "d": "D", "e": "E",
    "entropy": "ENTROPY", "log_sum_sq": "SQUARES", "top1": "TOP", "mean_logit": "MEAN",
    "kept": "MEAN",
}  # fmt: skip
TYPES = {"logits": "*bf16", "dlogits": "*bf16", "ids": "*i64", "keep_mask": "*u8", "top1": "*i64"}


def type_of(name: str) -> str:
    if name in ("n_cols", "inner", "ids_per_row") or name.endswith(("_outer", "_inner")):
        return "i32"
    return TYPES.get(name, "*fp32")


def compiled(name: str, target: str, whole: bool, edges: bool) -> None:
    kernel, (backend, arch, lanes) = getattr(measures, name), TARGETS[target]
    of = dispatch.family(backend, arch, triton.__version__)
    form = dispatch.row_stats(151936, of) if name == "row_measures" else dispatch.row_grad(of)
    given = form.launch | {"EDGES": edges, "MATCHED": True, "SCALE": 1.0}
    given |= {flag: whole for flag in OPTIONAL.values()} | {"SOFTCAP": 30.0 if whole else 0.0}
    given |= {} if whole else {argument: None for argument in OPTIONAL}
    constants = {n: given[n] for n in kernel.arg_names if n in given}
    options = {n: x for n, x in form.launch.items() if n not in constants}
    types = {n: "constexpr" if n in constants else type_of(n) for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    triton.compile(
        source,
        target=GPUTarget(backend, arch, lanes),
        options=options | {"enable_fp_fusion": True},
    )


for kernel, all_asked in itertools.product(("row_measures", "row_measures_grad"), (False, True)):
    compiled(kernel, sys.argv[1], all_asked, edges=True)
print("compiled")
