"""Processes on gloo that compute what a test sends them; started once for many batches.

As a program, once per rank, this is what they run: ``python -P ranks.py address rank ranks port``.
"""

import itertools
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence as ListOf
from contextlib import nullcontext
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2))
"""Shards of the vocabulary, shards of the sequence; rank = column * shards of rows + ... below."""
WAIT = 200  # seconds for an answer; the groups' own timeout is shorter


def place(rank: int, layout: tuple[int, int]) -> tuple[int, int]:
    """Which shard of the vocabulary, and which of the sequence, a rank has."""
    return rank % layout[0], rank // layout[0]


class Ranks:
    """The processes, from the test's side."""

    def __init__(self, count: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        listener = Listener(("127.0.0.1", 0), authkey=b"ranks")
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared |= {"CUDA_VISIBLE_DEVICES": ""}
        arguments = [str(listener.address[1]), str(count)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", __file__, *arguments, str(rank)], env=os.environ | shared
            )
            for rank in range(count)
        ]
        self.connections: list[Connection] = [None] * count  # type: ignore[list-item]
        for _ in range(count):
            connection = listener.accept()
            self.connections[connection.recv()] = connection
        listener.close()

    def run(self, jobs: ListOf[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the first ``len(jobs)`` ranks answer, one job each; errors as "error"."""
        used = self.connections[: len(jobs)]
        for connection, job in zip(used, jobs, strict=True):
            connection.send_bytes(pickle.dumps(job))
        answers = []
        for rank, connection in enumerate(used):
            assert connection.poll(WAIT), f"rank {rank} does not answer"
            answers.append(pickle.loads(connection.recv_bytes()))
        return answers

    def close(self) -> None:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.wait(timeout=WAIT)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def main(address: int, count: int, rank: int) -> None:
    import datetime

    import torch.distributed as dist

    import irl_ops.torch  # noqa: F401  # before the others wait for it

    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=wait)
    groups: dict[tuple[int, ...], Any] = {}
    for size in range(1, count + 1):
        for ranks in itertools.combinations(range(count), size):
            groups[ranks] = dist.new_group(list(ranks), timeout=wait)
    connection = Client(("127.0.0.1", address), authkey=b"ranks")
    connection.send(rank)
    while (job := pickle.loads(connection.recv_bytes())) is not None:
        try:
            answer = compute(job, rank, groups)
        except Exception as error:
            answer = {
                "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()
            }  # fmt: skip
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def compute(job: dict[str, Any], rank: int, groups: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    """Results and gradients of one call, what it sent, and how much it multiplied."""
    from torch.utils.flop_counter import FlopCounterMode

    import irl_ops.torch as irl

    products = FlopCounterMode(display=False)

    if job["call"] == "exit":
        os._exit(1)
    if job["call"] == "dtensor":
        return dtensor(job, rank)
    if job["call"] == "linear dtensor":
        return linear_dtensor(job)
    options = dict(job["options"])
    v, s = job["layout"]
    mine = place(rank, (v, s))
    if job.get("vocab"):
        options["vocab_group"] = groups[tuple(mine[1] * v + i for i in range(v))]
    if job.get("sequence"):
        options["sequence_group"] = groups[tuple(i * v + mine[0] for i in range(s))]
    leaves: dict[str, Tensor] = {}
    arrays: list[Tensor] = []
    for name, (data, size, stride, offset) in job["arrays"].items():
        leaves[name] = data.requires_grad_(data.dtype.is_floating_point)
        x = leaves[name].as_strided(size, stride, offset)
        arrays.append(x.clone(memory_format=torch.preserve_format) if job.get("computed") else x)
    for name in ("values", "next_values", "bias"):
        if options.get(name) is not None:
            leaves[name] = options[name].requires_grad_()
    function = getattr(irl, job["call"])
    if "compile" in job:
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager", **job["compile"])
    with Counted() as sent, products if job.get("products") else nullcontext():
        found = function(*arrays, job["labels"], *job["more"], **options)
        forward = list(sent.messages)
        metrics = None
        if isinstance(found, tuple) and not hasattr(found, "_fields"):
            found, metrics = found
        outputs = list(found) if isinstance(found, tuple) else [found]
        terms = [
            (x * g).sum()
            for x, g in zip(outputs, job["upstream"], strict=True)
            if g is not None and x is not None and x.requires_grad
        ]
        if terms:
            sum(terms).backward()  # type: ignore[union-attr]
    return {
        "outputs": [None if x is None else x.detach() for x in outputs],
        "metrics": metrics,
        "spoilt": bool(arrays[0].isnan().all()),
        "gradients": {name: x.grad for name, x in leaves.items()},
        "forward": forward,
        "backward": sent.messages[len(forward) :],
        "products": products.get_total_flops(),
    }


def dtensor(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A loss of distributed logits, its gradient put together again, and what that was."""
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    import irl_ops.torch as irl

    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Replicate() if dim is None else Shard(dim) for dim in job["placements"]]
    logits = distribute_tensor(job["logits"], mesh, placements).requires_grad_()
    labels = job["labels"]
    if job["distributed"]:
        rows = [
            p if isinstance(p, Shard) and p.dim < labels.ndim else Replicate() for p in placements
        ]
        labels = distribute_tensor(labels, mesh, rows)
    if "measures" in job:
        return measures(job, logits, labels)
    loss = irl.iqlearn_loss(logits, labels, **job["options"])
    loss.sum().backward()
    return {
        "outputs": [loss.detach()],
        "gradient": logits.grad.full_tensor(),
        "kept": logits.grad.placements == logits.placements,
    }


def linear_dtensor(job: dict[str, Any]) -> dict[str, Any]:
    """The same of hidden states and a last layer, each distributed or not (None)."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    import irl_ops.torch as irl

    mesh = init_device_mesh("cpu", (2, 2))
    leaves: dict[str, Any] = {}
    for name, (x, dims) in job["arrays"].items():
        leaf = x.clone()
        if dims is not None:
            placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
            leaf = distribute_tensor(x, mesh, placements)
        leaves[name] = leaf.requires_grad_()
    options = dict(job["options"])
    if "bias" in leaves:
        options["bias"] = leaves["bias"]
    found = getattr(irl, job["function"])(
        leaves["hidden"], leaves["weight"], job["labels"], **options
    )
    loss = found if isinstance(found, Tensor) else found.reward
    loss.sum().backward()
    gradients = {
        name: x.grad if dims is None else x.grad.full_tensor()
        for (name, x), (_, dims) in zip(leaves.items(), job["arrays"].values(), strict=True)
    }
    kept = all(
        dims is None or leaves[name].grad.placements == leaves[name].placements
        for name, (_, dims) in job["arrays"].items()
    )
    return {"outputs": [loss.detach()], "gradients": gradients, "kept": kept}


def measures(job: dict[str, Any], logits: Any, labels: Any) -> dict[str, Any]:
    """Statistics of distributed logits, from arrays that are whole or distributed likewise."""
    import torch.distributed.tensor as tensor

    import irl_ops.torch as irl

    def spread(x: Tensor, whole: bool) -> Any:
        rows = [
            p if isinstance(p, tensor.Shard) and (whole or p.dim % 3 < 2) else tensor.Replicate()
            for p in logits.placements
        ]
        return tensor.distribute_tensor(x, logits.device_mesh, rows)

    options = dict(job["options"])
    if job["distributed"]:
        options["keep_mask"] = spread(options["keep_mask"], True)
        for name in ("temperature", "extra_ids"):
            options[name] = spread(options[name], False)
    stats = irl.token_stats(logits, labels, **options)
    rows = [x for x in (stats.logprob, stats.entropy, stats.log_sum_sq, stats.mean_logit)]
    sum(rows, stats.extra_logprob.sum(-1)).sum().backward()
    return {
        "outputs": [None if x is None else x.detach() for x in stats],
        "gradient": logits.grad.full_tensor(),
    }


class Counted:
    """Bytes that this rank hands to each collective."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, int]] = []

    def __enter__(self) -> "Counted":
        import torch.distributed as dist

        self.kept = {}
        for name in dir(dist):
            if name.startswith(
                ("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "batch_")
            ):
                function = getattr(dist, name)
                if callable(function):
                    self.kept[name] = function
                    setattr(dist, name, self.count(name, function))
        return self

    def count(self, name: str, function: Any) -> Any:
        import torch.distributed as dist

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sent = [x.tensor for x in args[0] if x.op is dist.isend]
            else:
                sent = [args[0] if name == "all_reduce" else args[1]]
            self.messages.append((name, sum(x.numel() * x.element_size() for x in sent)))
            return function(*args, **kwargs)

        return counted

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        for name, function in self.kept.items():
            setattr(dist, name, function)


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:]))
