"""Memory of gradients that is used again: whose it is, how much is kept, and what torch sees."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import irl_ops.torch as irl
from irl_ops.torch import pool

MIB = 2**20
# 4 MiB in float32: two huge pages, so that each block is of exactly this size.
SHAPE = (4, 256, 1024)


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    before = pool.limit()
    pool.set_limit(64 * MIB)
    pool.release()
    yield
    pool.set_limit(before)
    pool.release()


def like(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def resident(address: int, bytes: int) -> int:
    """Bytes of the range that are in memory, by the system's own account; 0 where nothing is."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head:
                low, high = (int(x, 16) for x in head.split("-"))
                inside = low < address + bytes and address < high
            elif inside and head == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


def test_the_memory_of_a_tensor_that_is_gone_is_used_again() -> None:
    first = pool.empty_like(like())
    address = first.data_ptr()
    view = first[1:]
    del first
    assert pool.idle() == 0  # a view keeps it
    del view
    assert pool.idle() == 4 * MIB
    second = pool.empty_like(like())
    assert second.data_ptr() == address and pool.idle() == 0
    assert address % (2 * MIB) == 0  # where a huge page may begin


def test_a_chunk_and_the_gradient_of_weight_come_from_the_pool() -> None:
    hidden = torch.randn(2, 64, 64, requires_grad=True)
    weight = torch.randn(16384, 64, requires_grad=True)  # 4 MiB, as the logits of 64 rows
    labels = torch.zeros(2, 64, dtype=torch.int64)
    for _ in range(2):
        irl.linear_iqlearn_loss(hidden, weight, labels, chunk_size=64).backward()
        assert pool.idle() == 4 * MIB
        weight.grad = None
        assert pool.idle() == 8 * MIB
    pool.set_limit(0)
    irl.linear_iqlearn_loss(hidden, weight, labels, chunk_size=64).backward()
    weight.grad = None
    assert pool.idle() == 0


def test_live_tensors_share_nothing() -> None:
    tensors: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        tensor = pool.empty_like(like((1 + step % 3, 1024, 1024)))
        tensors.append(tensor.fill_(step))
        if step % 3 == 2:
            del tensors[int(torch.randint(len(tensors), (), generator=generator))]
        del tensor
    values = [t.unique().tolist() for t in tensors]
    assert all(len(v) == 1 for v in values)
    assert len({v[0] for v in values}) == len(tensors) == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "logits",
    [
        lambda d: torch.empty(4, 256, 2048, dtype=d),
        lambda d: torch.empty(256, 4, 2048, dtype=d).transpose(0, 1),
        lambda d: torch.empty(4, 256, 4096, dtype=d)[..., :2048],
        lambda d: torch.empty(1, 1, 2048, dtype=d).expand(4, 256, 2048),
        lambda d: torch.empty(4, 2048, 256, dtype=d).mT,
        lambda d: torch.empty(2**21, dtype=d),
        lambda d: torch.empty(4, 256, 2048, dtype=d, requires_grad=True),
    ],
    ids=["contiguous", "transposed", "gaps", "expanded", "last axis strided", "1-d", "leaf"],
)
def test_shape_strides_and_dtype_are_those_of_torch(logits, dtype) -> None:
    given = logits(dtype)
    ours, theirs = pool.empty_like(given), torch.empty_like(given)
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert ours.device == theirs.device and not ours.requires_grad and ours.is_leaf
    ours.fill_(3)
    assert (ours == 3).all()
    del ours
    assert pool.idle() >= 4 * MIB  # it was the pool's


@pytest.mark.parametrize(
    "logits",
    [
        torch.empty(1024),
        torch.empty(0, 1024),
        torch.empty(1024, 1024, dtype=torch.int64),
        torch.empty(1024, 1024, device="meta"),
    ],
    ids=["small", "empty", "integers", "meta"],
)
def test_other_tensors_are_torch_s_own(logits: Tensor) -> None:
    out = pool.empty_like(logits)
    assert out.untyped_storage().resizable()
    del out
    assert pool.idle() == 0


def test_the_limit_holds_and_the_longest_idle_go_first() -> None:
    pool.set_limit(8 * MIB)
    tensors = [pool.empty_like(like()) for _ in range(4)]  # 16 MiB in use: no limit on these
    addresses = [t.data_ptr() for t in tensors]
    while tensors:
        del tensors[0]
        assert pool.idle() <= 8 * MIB
    assert pool.idle() == 8 * MIB
    kept = [pool.empty_like(like()).data_ptr(), pool.empty_like(like()).data_ptr()]
    assert set(kept) <= set(addresses[2:])
    large = pool.empty_like(like((4, 1024, 1024)))  # above the limit by itself
    del large
    assert pool.idle() <= 8 * MIB


def test_a_block_of_twice_the_size_serves_and_no_larger_one() -> None:
    large = pool.empty_like(like((4, 1024, 1024)))  # 16 MiB
    address = large.data_ptr()
    del large
    quarter = pool.empty_like(like())
    assert quarter.data_ptr() != address
    half = pool.empty_like(like((2, 1024, 1024)))
    assert half.data_ptr() == address


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc/self/smaps")
def test_memory_goes_back_to_the_system() -> None:
    tensor = pool.empty_like(like((4, 1024, 1024))).fill_(1)
    address, bytes = tensor.data_ptr(), tensor.nbytes
    del tensor
    assert resident(address, bytes) >= bytes
    assert pool.release() == bytes and pool.idle() == 0
    assert resident(address, bytes) == 0
    assert pool.release() == 0


def test_the_switch() -> None:
    tensor = pool.empty_like(like()).fill_(7)
    idle = pool.empty_like(like())
    del idle
    pool.set_limit(0)
    assert pool.limit() == 0 and pool.idle() == 0
    assert pool.empty_like(like()).untyped_storage().resizable()  # allocated by torch
    assert (tensor == 7).all()  # outlives the pool
    del tensor
    assert pool.idle() == 0
    with pytest.raises(ValueError, match="bytes is -1, accepted are 0 to"):
        pool.set_limit(-1)
    with pytest.raises(TypeError, match=r"bytes is 1\.5, accepted is an int"):
        pool.set_limit(1.5)  # type: ignore[arg-type]


def test_resizing() -> None:
    """Within its size as ever; beyond it torch refuses, and the tensor stays what it was."""
    tensor = pool.empty_like(like()).fill_(5)
    address = tensor.data_ptr()
    tensor.resize_(100)
    assert tensor.data_ptr() == address and (tensor == 5).all()
    tensor.resize_(SHAPE)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(8, *SHAPE)
    tensor.resize_(SHAPE)
    assert (tensor == 5).all()
    del tensor
    assert pool.idle() == 4 * MIB


def test_shared_memory_takes_the_tensor_out() -> None:
    tensor = pool.empty_like(like()).fill_(5)
    tensor.share_memory_()
    assert pool.idle() == 4 * MIB
    other = pool.empty_like(like()).fill_(6)
    assert (tensor == 5).all() and (other == 6).all()


def test_threads() -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        kept: list[tuple[Tensor, int]] = []
        for step in range(40):
            mark = 1000 * number + step
            kept.append((pool.empty_like(like((1 + step % 2, 1024, 1024))).fill_(mark), mark))
            if len(kept) > 3:
                tensor, mark = kept.pop(step % 3)
                if not bool((tensor == mark).all()):
                    wrong.append((number, step))
                del tensor
            if step % 10 == 9:
                pool.release()
                pool.set_limit((8 + number) * MIB)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.idle() <= pool.limit()


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


FORK = """
import os, threading, torch
from irl_ops.torch import pool
like = torch.empty(4, 1024, 1024)
live, idle = pool.empty_like(like).fill_(1), pool.empty_like(like)
del idle
stop = threading.Event()
def churn():
    while not stop.is_set():
        pool.empty_like(like)
threads = [threading.Thread(target=churn) for _ in range(2)]
[t.start() for t in threads]
for _ in range(20):
    process = os.fork()
    if process == 0:
        fine = bool((live == 1).all())
        live.fill_(2)
        other = pool.empty_like(like).fill_(3)
        fine = fine and pool.idle() == 0 and bool((live == 2).all())
        os._exit(0 if fine else 1)
    assert os.waitpid(process, 0)[1] == 0
    assert bool((live == 1).all())
stop.set()
[t.join() for t in threads]
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_other_threads_allocate() -> None:
    done = child(FORK, OMP_NUM_THREADS="1")
    assert done.stdout.split() == ["done"], done.stderr


LIMITS = """
import os, torch  # which takes seconds: once for all
for text in ("", "0", "5000000", "much", "-1", "1.5"):
    if os.fork() == 0:
        os.environ["IRL_OPS_POOL_BYTES"] = text
        try:
            from irl_ops.torch import pool
            print(pool.limit(), flush=True)
        except Exception as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_environment() -> None:
    done = child(LIMITS)
    usual, none, some, *wrong = done.stdout.splitlines()
    assert [usual, none, some] == [str(2**30), "0", "5000000"], done.stderr
    for text, said in zip(("much", "-1", "1.5"), wrong, strict=True):
        assert f"IRL_OPS_POOL_BYTES is '{text}', accepted is" in said


def test_tensors_outlive_the_interpreter_s_end() -> None:
    """Modules are torn down in any order; what a tensor gives back must not need them."""
    code = "import torch; from irl_ops.torch import pool; torch.kept = pool.empty_like("
    done = child(code + "torch.empty(2**20)).fill_(1)")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_capsule_that_nobody_takes_gives_its_block_back() -> None:
    from irl_ops import _native

    capsule = _native.pool_empty((4, MIB), (MIB, 1), "float32")
    assert pool.idle() == 0
    del capsule
    assert pool.idle() == 16 * MIB
    with pytest.raises(ValueError, match="strides holds -1"):
        _native.pool_empty((4, 4), (4, -1), "float32")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        _native.pool_empty((4, 4), (4, 1), "int8")
