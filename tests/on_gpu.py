"""What only a GPU can show. `make gpu-check` runs it; elsewhere nothing collects this file."""

import csv
import io
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.kernels.triton import dispatch
from irl_ops.torch import triton
from irl_ops.torch.backends import BACKENDS

from . import naive

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
VOCABS = (50257, 128256, 151936, 262144)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Eight float32 roundings of terms of the loss's own size; half a unit of the gradient's dtype.
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA or ROCm device")


def batch(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.empty(1, rows, vocab, dtype=dtype, device=DEVICE)
    logits.normal_(0, 3, generator=generator)
    labels = torch.randint(vocab, (1, rows), generator=generator, device=DEVICE)
    labels[0, rows // 2] = -100
    return logits, labels


def step(logits: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss and the gradient; with ``inplace``, from the storage of a product."""
    leaf = logits.detach().requires_grad_()
    q = leaf * 1 if options.get("inplace", False) else leaf
    storage = q.detach()  # an alias: the tensor itself reads as NaN afterwards
    loss = irl.iqlearn_loss(q, labels, gamma=0.9, backend="triton", **options)
    loss.backward()
    return loss.detach(), leaf.grad if q is leaf else storage


def assert_right(logits: Tensor, labels: Tensor, gradient: Tensor, start: int, items: int) -> None:
    """Four rows of the gradient against float64 autograd of the naive loss.

    Given are ``[1, 6, V]`` rows from ``start`` on. The outer two, whose neighbours are missing, are
    what the inner four depend on, and are not compared unless they end the sequence.
    """
    q = logits.double().cpu().requires_grad_()
    loss, _ = naive.loss("iqlearn_loss", q, labels.cpu(), gamma=0.9, num_items=items)
    loss.backward()
    inner = slice(0 if start == 0 else 1, 5)
    expected, actual = q.grad[:, inner], gradient[:, inner].double().cpu()
    size = expected.abs().amax(-1, keepdim=True)
    bound = ROUNDING[logits.dtype] * expected.abs() + 2.0**-20 * size
    assert ((actual - expected).abs() <= bound).all(), (actual - expected).abs().max() / size.max()


def check_rows(rows: int, vocab: int, dtype: torch.dtype, inplace: bool) -> None:
    """The first rows, those around the ignored one in the middle, and the last."""
    logits, labels = batch(rows, vocab, dtype)
    items = int((labels != -100).sum())
    windows = {s: logits[:, s : s + 6].clone() for s in (0, rows // 2 - 3, rows - 6)}
    loss, gradient = step(logits, labels, inplace=inplace)
    assert loss.isfinite()
    for start, window in windows.items():
        near = slice(start, start + 6)
        assert_right(window, labels[:, near], gradient[:, near], start, items)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_every_form_finishes_and_is_right(vocab, dtype, inplace, record_property):
    """Clusters launch and finish under load; in place, no row sees what another has overwritten."""
    form = dispatch.row_stats_grad(vocab, dtype.itemsize, False, triton._family(DEVICE))
    record_property("form", repr(form))
    check_rows(2048, vocab, dtype, inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_beyond_2_to_the_31_elements(inplace):
    vocab = 262144
    rows = 2**31 // vocab + 64
    if torch.get_device_module(DEVICE).mem_get_info()[0] < 4.2 * rows * vocab * 2:
        pytest.skip("needs a GPU with 18 GB of free memory")
    check_rows(rows, vocab, torch.bfloat16, inplace)


def check_metrics(rows: int, vocab: int) -> None:
    """The sums over rows, which lie in several blocks, against float64."""
    logits, labels = batch(rows, vocab, torch.float32)
    options = dict(gamma=0.9, entropy_coef=0.1)
    loss, actual = irl.iqlearn_loss(
        logits.requires_grad_(), labels, return_metrics=True, backend="triton", **options
    )
    expected, found = naive.loss(
        "iqlearn_loss", logits.detach().double().cpu(), labels.cpu(), **options
    )
    # a handful of float32 roundings a row, and one for each level of a sum of thousands
    near = dict(rel=32 * 2.0**-24, abs=32 * 2.0**-24)
    assert loss.item() == pytest.approx(expected.item(), **near)
    expected = naive.metrics(found, "iqlearn_loss", True)
    size = abs(expected["value"])  # of the terms of which a mean reward is the difference
    near["abs"] *= max(1.0, size)
    assert {k: x.item() for k, x in actual.items()} == pytest.approx(expected, **near)


def test_metrics_are_right():
    check_metrics(1500, 3000)


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_same_bits_twice(vocab):
    logits, labels = batch(1024, vocab, torch.bfloat16)
    one, two = (step(logits, labels) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_in_place_gives_the_same_bits():
    logits, labels = batch(1024, 128256, torch.bfloat16)
    expected = step(logits.clone(), labels)
    actual = step(logits, labels, inplace=True)
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])


@cuda_only
@pytest.mark.parametrize("metrics", [False, True])
def test_nothing_waits_for_the_device(metrics):
    logits, labels = batch(256, 32000, torch.bfloat16)
    lam = torch.tensor(0.1, device=DEVICE)
    step(logits, labels, lam=lam)  # compiles
    leaf = logits.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = irl.iqlearn_loss(leaf, labels, lam=lam, return_metrics=metrics, num_items=lam * 1000)
        (out[0] if metrics else out).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
@pytest.mark.parametrize("inplace", [False, True])
def test_a_step_is_captured_in_a_graph(inplace):
    logits, labels = batch(512, 50257, torch.bfloat16)
    lam, given = torch.tensor(0.1, device=DEVICE), logits.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(logits, labels, lam=lam, inplace=inplace)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step(logits, labels, lam=lam, inplace=inplace)
    other, _ = batch(512, 50257, torch.bfloat16, seed=1)
    for q, value in ((given, 0.1), (other, 0.4)):
        logits.copy_(q)
        lam.fill_(value)
        graph.replay()
        expected = step(q.clone(), labels, lam=lam)
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@cuda_only
def test_the_current_stream_is_the_one():
    logits, labels = batch(512, 50257, torch.bfloat16)
    expected = step(logits, labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which may still be writing the logits
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # so that a launch elsewhere would read too early
        late = torch.empty_like(logits)
        late.copy_(logits)
        actual = step(late, labels)
    side.synchronize()
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two GPUs")
def test_logits_on_another_device_than_the_current_one():
    logits, labels = batch(64, 50257, torch.bfloat16)
    expected = step(logits, labels)
    elsewhere = torch.device(DEVICE.type, 1)
    actual = step(logits.to(elsewhere), labels.to(elsewhere))
    assert torch.equal(expected[1].cpu(), actual[1].cpu())


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_as_eager(inplace):
    logits, labels = batch(64, 32000, torch.bfloat16)
    eager = step(logits.clone(), labels, inplace=inplace)

    @torch.compile(fullgraph=True)
    def loss_of(hidden: Tensor) -> Tensor:
        return irl.iqlearn_loss(hidden * 1, labels, gamma=0.9, backend="triton", inplace=inplace)

    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    # the compiler fuses the scalar algebra, and sums in an order of its own
    torch.testing.assert_close(loss.detach(), eager[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad, eager[1], rtol=2.0**-7, atol=1e-9)


def test_a_bad_label_gives_nan_and_touches_nothing():
    for bad in (-1, 32000, 2**31, 2**40, -(2**40)):
        logits, labels = batch(64, 32000, torch.bfloat16)
        labels[0, 7] = bad
        loss, gradient = step(logits, labels)
        assert loss.isnan()
        others = [t for t in range(64) if t not in (7, 8)]
        assert gradient[0, others].isfinite().all()


SHORT_RUN = """
import torch, irl_ops.torch as irl
for vocab in (2000, 50257, 151936):
    for dtype in (torch.bfloat16, torch.float32):
        for inplace in (False, True):
            q = torch.randn(1, 24, vocab, device={device!r}, dtype=dtype, requires_grad=True)
            y = torch.randint(vocab, (1, 24), device={device!r})
            x = q * 1 if inplace else q
            irl.iqlearn_loss(x, y, entropy_coef=0.1, inplace=inplace, backend="triton").backward()
            irl.token_stats(q, y, backend="triton").reward.sum().backward()
torch.accelerator.synchronize()
"""


@cuda_only
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_the_sanitizer(tool):
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-P"]
    done = subprocess.run(
        [*command, "-c", SHORT_RUN.format(device=str(DEVICE))],
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


ONE_KERNEL = """
import torch
from irl_ops.torch import triton
q = torch.randn(1, {rows}, {vocab}, device={device!r}, dtype=torch.bfloat16)
a, b = torch.ones(1, {rows}, device=q.device), torch.zeros(1, {rows}, device=q.device)
d = q if {inplace} else torch.empty_like(q)
for _ in range(2):
    triton.row_stats_grad(q, a, b, None, d)
torch.accelerator.synchronize()
"""


@cuda_only
@pytest.mark.skipif(shutil.which("ncu") is None, reason="needs ncu")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
def test_bytes_of_dram(vocab, inplace, record_property):
    """Recorded, not judged: whether a second read comes from the cache is what they tell."""
    rows = 2048
    program = ONE_KERNEL.format(rows=rows, vocab=vocab, device=str(DEVICE), inplace=inplace)
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum"
    command = ["ncu", "--csv", "--print-units=base", "--kernel-name=regex:row_stats_grad"]
    done = subprocess.run(
        [*command, f"--metrics={metrics}", sys.executable, "-P", "-c", program],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        pytest.skip("needs permission to read the GPU's performance counters")
    table = done.stdout[done.stdout.index('"ID"') :]
    last = {}
    for line in csv.DictReader(io.StringIO(table)):
        last[line["Metric Name"]] = float(line["Metric Value"].replace(",", ""))
    size = rows * vocab * 2
    for name, value in last.items():
        record_property(name, round(value / size, 3))
    assert last["dram__bytes_write.sum"] > 0.5 * size


def test_triton_is_what_serves():
    assert BACKENDS["triton"].unavailable(DEVICE) is None
    assert irl.available_backends()[0] == "triton"
