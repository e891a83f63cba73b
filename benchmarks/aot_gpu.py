"""Compiles the Triton kernels for GPUs that are not here, and holds them to what they have to meet.

Triton carries the compilers for NVIDIA's and AMD's GPUs, so registers, spills and the width of
every access are known without a GPU. Compiled is what ``irl_ops.kernels.triton.dispatch`` would
launch with that release of Triton. The command fails where

- a register spills,
- the middle of a row is accessed in less than 128 bits at a time,
- there are more exponentials than the kernels' first lines say, or
- registers keep a multiprocessor from holding as many blocks as ``dispatch`` asks for, or
- a block wants more shared memory than the target gives it.

Releases of Triton differ, and so each of VERSIONS compiles everything: those that are not installed
come by pip, into folders under ``build/``. None of this is a timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import machine_code
from rich.console import Console
from rich.table import Table

from irl_ops.kernels.triton import dispatch

VERSIONS = ("3.6.0", "3.7.1", "3.9.0")  # torch 2.11's, torch 2.13's, and the newest
TARGETS: dict[str, tuple[str, int | str, int]] = {  # Triton's backend, architecture, lanes
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx90a": ("hip", "gfx90a", 64),
}
SHARED = {  # bytes that one block may have, as the vendors' tables say
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "gfx90a": 64 << 10,
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
VOCABS = (50257, 128256, 151936, 256000)  # of real models, beside the limits in the tables
LONG = 16384  # columns from which on registers and shared memory become short
MEASURES = ("row_measures", "row_measures_grad")
# What is left out of them where it is not asked for: by the flag, or with extras alone.
OPTIONAL = {
    "entropy": "ENTROPY", "b": "B", "log_sum_sq": "SQUARES", "top1": "TOP", "mean_logit": "MEAN",
    "kept": "MEAN", "d": "D", "e": "E", "row_scale": "SCALED", "keep_mask": "MASK",
    "keep_above": "ABOVE",
}  # fmt: skip
SCALARS = 12  # more than the narrow accesses of any kernel: coefficients, statistics, edges
IDS = 32  # beyond these, of two loops over a row's ids, which compilers unroll
RESULTS = Path(__file__).parent / "results" / "aot-gpu.json"
BUILD = Path(__file__).resolve().parents[1] / "build"


class Job(NamedTuple):
    """One kernel for one target, as it would be launched for ``vocab`` columns."""

    kernel: str
    target: str
    dtype: str
    vocab: int
    entropy: bool = False
    edges: bool = False  # V or a stride is no multiple of 16 bytes
    matched: bool = True  # rows of the gradient lie relative to 16 bytes as those of the logits do
    softcap: bool = False
    extras: bool = False  # every measure, of rows seen through a scale, a mask and a threshold


class Promise(NamedTuple):
    """What the middle of a row takes, as instructions of the kernel's text."""

    loads: int
    stores: int
    exponentials: int
    an_element: float  # exponentials that are executed
    bytes: int = 0  # loads of a mask, whose rows are not aligned


@dataclass(frozen=True)
class Result:
    """What a compiler made of a job, and what is wrong with that."""

    job: Job
    kernel: str
    form: str
    code: machine_code.Code
    promise: Promise
    blocks: int  # that the registers of one multiprocessor hold
    problems: list[str]


def jobs(targets: Sequence[str], dtypes: Sequence[str]) -> Iterator[Job]:
    """Every entry of the tables in ``dispatch``, with and without edges, and every other kernel."""
    for target, dtype in itertools.product(targets, dtypes):
        yield Job("label_logit", target, dtype, VOCABS[0], edges=True)
        yield Job("set_label", target, dtype, VOCABS[0], edges=True)
        for edges in (False, True):
            yield Job("scale", target, dtype, VOCABS[0], edges=edges)
            yield Job("row_grad", target, dtype, VOCABS[0], edges=edges)
            for entropy in (False, True):
                for vocab in (dispatch.SHORT, VOCABS[0]):
                    yield Job("row_stats", target, dtype, vocab, entropy, edges)
                for vocab in vocabs(target, dtype, entropy):
                    yield Job("row_stats_grad", target, dtype, vocab, entropy, edges)
        yield Job("row_grad", target, dtype, VOCABS[0], edges=True, matched=False)
        for kernel in ("label_logit", "set_label", "row_stats", "row_grad"):
            yield Job(kernel, target, dtype, VOCABS[0], edges=True, softcap=True)
        yield from measures(target, dtype)
        for entropy, matched in itertools.product((False, True), repeat=2):
            for vocab in vocabs(target, dtype, entropy, matched, softcap=matched):
                if vocab >= LONG:
                    yield Job(
                        "row_stats_grad", target, dtype, vocab, entropy, True, matched, matched
                    )


def measures(target: str, dtype: str) -> Iterator[Job]:
    """The row measures with nothing asked for, with what PPO asks for, and with everything."""
    vocab = VOCABS[0]
    for kernel in MEASURES:
        yield Job(kernel, target, dtype, vocab)
        yield Job(kernel, target, dtype, vocab, entropy=True, edges=True)
        yield Job(kernel, target, dtype, vocab, entropy=True, extras=True)
        yield Job(kernel, target, dtype, vocab, entropy=True, edges=True, extras=True)
        yield Job(kernel, target, dtype, vocab, True, True, softcap=True, extras=True)
    yield Job(MEASURES[0], target, dtype, dispatch.SHORT, True, True, softcap=True, extras=True)
    yield Job(MEASURES[1], target, dtype, vocab, True, True, matched=False, extras=True)


def vocabs(
    target: str, dtype: str, entropy: bool, matched: bool = True, softcap: bool = False
) -> Iterator[int]:
    """The largest rows of every form of row_stats_grad."""
    limits = {fits.columns for fits in dispatch.resident(entropy, softcap)[family(target)]}
    forms = {
        dispatch.row_stats_grad(
            vocab, DTYPES[dtype], entropy, family(target), matched, softcap
        ): vocab
        for vocab in sorted(limits.union(VOCABS))
    }
    yield from forms.values()


def family(target: str) -> str:
    """The target's part of the tables, with the Triton that is installed."""
    import triton

    backend, arch, _ = TARGETS[target]
    return dispatch.family(backend, arch, triton.__version__)


def run(job: Job) -> Result:
    """Compiles and judges."""
    backend, _, lanes = TARGETS[job.target]
    name, form = launched(job)
    code = machine_code.of(backend, compiled(job, name, form))
    promise = promised(job, name, form, lanes * form.num_warps)
    blocks = machine_code.blocks(backend, code.registers, form.num_warps)
    problems = []
    if code.spilled_bytes:
        problems.append(f"{code.spilled_bytes} bytes spilled")
    scalars = SCALARS + (IDS if job.kernel in MEASURES else 0)
    if code.wide_loads < promise.loads or code.narrow_loads > scalars + promise.bytes:
        problems.append("narrow loads")
    if job.matched and (code.wide_stores < promise.stores or code.narrow_stores > scalars):
        problems.append("narrow stores")
    # edges take up to two more, twice; with entropy compilers repeat a few rather than keep them,
    # and where a store has to be rearranged some repeat them all
    spare = 2 if not job.matched else 1.125 if job.entropy else 1
    if code.exponentials > spare * promise.exponentials + (6 if job.softcap else 4):
        problems.append(f"{code.exponentials} exponentials for {promise.exponentials}")
    wanted = max(1, form.blocks * 2 // DTYPES[job.dtype])
    if blocks < wanted:
        problems.append(f"{blocks} blocks for {wanted}")
    if code.shared_bytes > SHARED[job.target]:
        problems.append(f"{code.shared_bytes} bytes of shared memory")
    return Result(job, name, as_text(form), code, promise, blocks, problems)


def launched(job: Job) -> tuple[str, Any]:
    """The kernel's file, and the form that ``dispatch`` chooses."""
    of = family(job.target)
    if job.kernel == "row_stats_grad":
        form = dispatch.row_stats_grad(
            job.vocab, DTYPES[job.dtype], job.entropy, of, job.matched, job.softcap
        )
        return ("resident" if isinstance(form, dispatch.Resident) else "two_pass"), form
    if job.kernel == "row_stats":
        return "row_stats", dispatch.row_stats(job.vocab, of)
    if job.kernel in MEASURES:
        if job.kernel == "row_measures_grad":
            return "measures", dispatch.row_measures_grad(of)
        return "measures", dispatch.row_measures(job.vocab, of, job.extras)
    if job.kernel in ("row_grad", "scale"):
        return job.kernel, dispatch.row_grad(of)
    return "labels", dispatch.LABELS


def promised(job: Job, name: str, form: Any, threads: int) -> Promise:
    """The text holds the code of a tile twice: in the loop, and for the rest of the row."""
    if name == "labels":
        return Promise(0, 0, 0, 0)
    if isinstance(form, dispatch.Resident):
        share = form.lanes * form.parts // (threads * form.num_ctas)
        exponentials = 1 + job.entropy + job.softcap
    else:
        columns = form.r * form.lanes if isinstance(form, dispatch.Tiles) else form.columns
        share, exponentials = columns // threads, int(name != "scale") + job.softcap
    groups, mask = share * DTYPES[job.dtype] // 16, share if job.extras else 0
    if not isinstance(form, dispatch.Tiles):
        return Promise(groups, groups, exponentials * share, exponentials, mask)
    lanes = share // form.r
    each = 1 + job.softcap
    if name == "measures":  # its loop alone
        return Promise(groups, 0, each * share + 2 * lanes, each + 1 / form.r, mask)
    scan = 2 * (each * share + lanes) + lanes
    if name == "row_stats":
        return Promise(2 * groups, 0, scan, each + 1 / form.r)
    return Promise(4 * groups, 2 * groups, scan + 2 * each * share, 2 * each + 1 / form.r)


def compiled(job: Job, name: str, form: Any) -> Any:
    """The kernel as ``irl_ops.torch.triton`` would launch it."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"irl_ops.kernels.triton.{name}"), job.kernel)
    given = form.launch | {"ENTROPY": job.entropy, "EDGES": job.edges, "MATCHED": job.matched}
    given |= {"SCALE": 1.0, "SOFTCAP": 30.0 if job.softcap else 0.0}
    if not job.softcap and job.kernel == "set_label":
        given["label_logit"] = None
    if job.kernel in MEASURES:
        asked = {
            flag: job.extras or (job.entropy and flag in ("ENTROPY", "B"))
            for flag in OPTIONAL.values()
        }
        given |= asked | {name: None for name, flag in OPTIONAL.items() if not asked[flag]}
    elif not job.entropy:
        given |= {"entropy": None, "entropy_weight": None}
    constants = {n: given[n] for n in kernel.arg_names if n in given}
    options = {n: x for n, x in form.launch.items() if n not in constants}
    types = {n: "constexpr" if n in constants else type_of(n, job) for n in kernel.arg_names}
    aligned = [
        n
        for n in kernel.arg_names
        if types[n].startswith("*")
        and n != "keep_mask"
        and not (job.edges and n in ("logits", "dlogits"))
    ]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget(*TARGETS[job.target])
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def type_of(name: str, job: Job) -> str:
    """The type of an argument in Triton's words."""
    if name in ("logits", "dlogits"):
        return f"*{job.dtype}"
    if name in ("rows", "n_cols", "inner", "ids_per_row") or name.endswith(("_outer", "_inner")):
        return "i32"
    if name == "keep_mask":
        return "*u8"
    return "*i64" if name in ("labels", "ids", "top1") else "*fp32"


def as_text(form: Any) -> str:
    """The columns that a program holds at once, its warps, and the blocks of a cluster."""
    if isinstance(form, dispatch.Resident):
        columns = f"{form.parts}x{form.lanes}" if form.parts > 1 else f"{form.lanes}"
        return f"{columns} w{form.num_warps}" + f" x{form.num_ctas}" * (form.num_ctas > 1)
    columns = f"{form.r}x{form.lanes}" if isinstance(form, dispatch.Tiles) else f"{form.columns}"
    return f"{columns} w{form.num_warps}"


def as_table(results: Sequence[Result], title: str) -> Table:
    """What the command prints."""
    table = Table(title=title)
    for heading in (
        "kernel", "target", "dtype", "V", "entropy", "extras", "softcap", "edges", "form",
        "registers", "spilled", "shared", "loads 128+", "stores 128+", "exp/element", "blocks", "",
    ):  # fmt: skip
        table.add_column(heading)
    for result in results:
        job, code = result.job, result.code
        name = job.kernel + (f", {result.kernel}" if job.kernel == "row_stats_grad" else "")
        table.add_row(
            name if job.matched else f"{name}, unmatched",
            job.target,
            job.dtype,
            str(job.vocab),
            "yes" if job.entropy else "",
            "yes" if job.extras else "",
            "yes" if job.softcap else "",
            "yes" if job.edges else "",
            result.form,
            str(code.registers),
            str(code.spilled_bytes),
            str(code.shared_bytes),
            f"{code.wide_loads}+{code.narrow_loads}",
            f"{code.wide_stores}+{code.narrow_stores}",
            f"{result.promise.an_element:.4g}",
            str(result.blocks),
            "[red]" + "; ".join(result.problems) if result.problems else "[green]ok",
        )
    return table


def save(results: Sequence[Result], version: str) -> None:
    """Beside the results of other versions of Triton and of other kernels, one line a kernel."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    columns = [*Job._fields, "form", *vars(results[0].code), "exp/element", "blocks", "problems"]
    here = {result.job[:3] for result in results}
    header, *before = kept.get(version, [columns])
    unsaid = dict(zip(Job._fields, Job("", "", "", 0), strict=True))  # before there was a column
    named = [unsaid | dict(zip(header, row, strict=True)) for row in before]
    lines = [
        [row[c] for c in columns] for row in named if tuple(row[c] for c in columns[:3]) not in here
    ]
    for r in results:
        code = vars(r.code).values()
        lines.append([*r.job, r.form, *code, r.promise.an_element, r.blocks, r.problems])
    kept[version] = [columns, *lines]
    versions = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in kept.items()
    )
    RESULTS.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def with_release(version: str) -> int:
    """The exit status of this command, in a process of its own with that release of Triton."""
    import triton

    environment, arguments = dict(os.environ), [*sys.argv, "--versions", version]
    if version != triton.__version__:
        folder = BUILD / f"triton-{version}"
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", folder, f"triton=={version}"], check=True)
        more = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [more])])
    return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode


def main() -> int:
    """The exit status: 1 where a kernel misses what it has to meet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--kernels", nargs="+", help="names; all others keep what was saved")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="releases of Triton")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    chosen = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # or there is nothing to compile
    import triton

    if list(chosen.versions) != [triton.__version__]:
        return max([with_release(version) for version in chosen.versions])
    with ProcessPoolExecutor(chosen.processes) as pool:
        wanted = jobs(chosen.targets, chosen.dtypes)
        if chosen.kernels:
            wanted = (job for job in wanted if job.kernel in chosen.kernels)
        results = list(pool.map(run, wanted))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(as_table(results, f"Compiled by Triton {triton.__version__}, not run"))
    if chosen.save:
        save(results, triton.__version__)
    missed = sum(bool(result.problems) for result in results)
    console.print(f"{len(results)} kernels, {missed} that miss what they have to meet")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
