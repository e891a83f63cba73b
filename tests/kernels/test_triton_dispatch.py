"""Which form of the Triton kernels serves what, and which tensors the backend serves."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

import irl_ops.torch as irl
from irl_ops.kernels.triton import dispatch
from irl_ops.torch import backends, triton

FAMILIES = (dispatch.NVIDIA, dispatch.NVIDIA_CLUSTERS, dispatch.AMD, dispatch.OTHER)
VOCABS = [1, 2, 16, 17, 1000, 4096, 4097, 6000, 32000, 32768, 32769, 49152, 50257, 65536, 65537]
VOCABS += [100352, 128256, 131073, 151936, 163841, 200064, 256000, 262144, 262145, 1_000_000]


def test_rows_are_cut_into_parts_that_hold_them() -> None:
    for vocab in VOCABS:
        for most in (512, 4096, 32768):
            lanes, parts = dispatch.cut(vocab, most)
            assert lanes & (lanes - 1) == 0 and 128 <= lanes <= most
            assert lanes * (parts - 1) < vocab <= lanes * parts
            assert parts == 1 or lanes == most


def test_a_row_leaves_few_lanes_idle() -> None:
    assert dispatch.cut(151936, 32768) == (32768, 5)
    assert dispatch.cut(151936, 65536) == (65536, 3)
    assert dispatch.cut(49152, 4096) == (4096, 12)
    assert dispatch.cut(131072, 32768) == (32768, 4)
    assert dispatch.cut(300, 32768) == (512, 1)


@pytest.mark.parametrize("entropy", [False, True])
def test_rows_that_lie_apart_stay_within_the_local_memory_of_amd(entropy: bool) -> None:
    """Their stores are rearranged there; long rows of them spill as well, and take two passes."""
    apart = {v: dispatch.row_stats_grad(v, 2, entropy, dispatch.AMD, False) for v in VOCABS}
    for vocab, form in apart.items():
        assert isinstance(form, dispatch.Resident) == (vocab <= 32768)
    assert isinstance(dispatch.row_stats_grad(40000, 2, entropy, dispatch.AMD), dispatch.Resident)
    assert apart[32768] == dispatch.row_stats_grad(32768, 2, entropy, dispatch.AMD)


@pytest.mark.parametrize("of", FAMILIES)
def test_a_soft_cap_takes_the_room_of_an_entropy(of: str) -> None:
    for vocab in VOCABS:
        capped = dispatch.row_stats_grad(vocab, 2, False, of, softcap=True)
        assert capped == dispatch.row_stats_grad(vocab, 2, True, of)
        both = dispatch.row_stats_grad(vocab, 2, True, of, softcap=True)
        assert both == capped or of == dispatch.AMD


@pytest.mark.parametrize("of", FAMILIES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_row_has_a_form(itemsize: int, entropy: bool, of: str) -> None:
    for vocab in VOCABS:
        form = dispatch.row_stats_grad(vocab, itemsize, entropy, of)
        threads = form.num_warps * (64 if of == dispatch.AMD else 32)
        assert threads <= 1024
        if isinstance(form, dispatch.Resident):
            columns = form.lanes * form.parts
            assert vocab <= columns
            assert columns <= 64 * threads * form.num_ctas  # in registers, and one exp of each
            assert form.num_ctas == 1 or of == dispatch.NVIDIA_CLUSTERS
            assert form.lanes >= min(vocab, 8 * threads * form.num_ctas)  # a group for every thread
        else:
            assert form.lanes >= 8 * threads


@pytest.mark.parametrize("of", FAMILIES)
def test_tiles_give_every_thread_a_group(of: str) -> None:
    for vocab in VOCABS:
        tiles = dispatch.row_stats(vocab, of)
        assert tiles.lanes >= 8 * tiles.num_warps * (64 if of == dispatch.AMD else 32)
    block = dispatch.row_grad(of)
    assert block.columns >= 8 * block.num_warps * (64 if of == dispatch.AMD else 32)
    assert block.programs(1) == 1 and block.programs(block.columns + 1) == 2


@pytest.mark.parametrize("of", FAMILIES)
@pytest.mark.parametrize(
    "table", [dispatch.RESIDENT, dispatch.RESIDENT_ENTROPY, dispatch.RESIDENT_BOTH]
)
def test_tables_are_in_order(table: dict[str, tuple[dispatch.Fits, ...]], of: str) -> None:
    limits = [fits.columns for fits in table[of]]
    assert limits == sorted(set(limits))


@pytest.mark.parametrize(
    ("backend", "arch", "version", "of"),
    [
        ("cuda", 80, "3.9.0", dispatch.NVIDIA),
        ("cuda", 89, "3.9.0", dispatch.NVIDIA),
        ("cuda", 90, "3.7.1", dispatch.NVIDIA),
        ("cuda", 90, "3.8.0", dispatch.NVIDIA_CLUSTERS),
        ("cuda", 90, "3.10.0+git1234", dispatch.NVIDIA_CLUSTERS),
        ("cuda", 100, "4.0.0", dispatch.NVIDIA_CLUSTERS),
        ("cuda", 120, "3.9.0", dispatch.NVIDIA),
        ("hip", "gfx942", "3.9.0+rocm7", dispatch.AMD),
        ("xpu", 13, "3.9.0", dispatch.OTHER),
    ],
)
def test_families(backend: str, arch: int | str, version: str, of: str) -> None:
    assert dispatch.family(backend, arch, version) == of


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
)
def test_the_interpreter_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.empty(0, device="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("IRL_OPS_BACKEND", raising=False)
    assert irl.available_backends()[0] == "triton"
    assert backends.choose("auto", cpu) == "native"
    assert backends.choose("triton", cpu) == "triton"
    monkeypatch.setenv("IRL_OPS_BACKEND", "triton")
    assert backends.choose("auto", cpu) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "triton" not in irl.available_backends() or torch.accelerator.is_available()
    with pytest.raises(ValueError, match=r"'triton' cannot serve .* on cpu: .*INTERPRET=1"):
        backends.choose("triton", cpu)
    with pytest.raises(ValueError, match=r"'triton' cannot serve .* on meta: .* cuda and xpu"):
        backends.choose("triton", torch.empty(0, device="meta"))
    assert triton.unavailable(torch.device("xpu")) is None


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
)
def test_triton_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release may lie first on the path than the one whose metadata are found."""
    import triton as language

    from irl_ops import doctor

    monkeypatch.setattr(language, "__version__", "3.8.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    assert doctor.version("triton") == "3.8.0"
    if importlib.util.find_spec("jax") is not None:
        from irl_ops.jax import triton as in_jax

        assert in_jax._family.__wrapped__(90) == dispatch.NVIDIA_CLUSTERS


def test_without_triton_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device in ("cuda", "cpu"):
        assert "pip install 'triton>=3.6'" in str(triton.unavailable(torch.device(device)))


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, irl_ops.torch as t; t.available_backends(); print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
