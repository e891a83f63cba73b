"""Where the time of an update goes, with each system: a profile of torch.profiler, added up.

Every moment of an update belongs to the innermost range around it, by the names that the trainers
give their parts (irl_ops/integrations/transformers/ranges.py), and every node of the backward pass
to the range in which its forward ran.
"""

from collections.abc import Iterable
from typing import Any

import torch
from measure import silent_stderr
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import Trainer, TrainerCallback

from irl_ops.integrations.transformers import ranges

REST = "the rest"
OWNERS = {
    ranges.SAMPLING: "sampling",
    ranges.POLICY: "policy",
    ranges.INITIAL_POLICY: "initial policy",
    ranges.CRITIC: "value network",
    ranges.DISCRIMINATOR: "discriminator",
    ranges.LOSS: "loss",
    "aten::cross_entropy_loss": "loss",  # that of Transformers
}
PARTS = ("sampling", "policy, forward", "policy, backward", "initial policy", "value network",
         "discriminator", "loss", "optimizer", REST)  # fmt: skip
NODE = "autograd::engine::evaluate_function: "


class Steps(TrainerCallback):
    """Tells the profiler where an update ends."""

    def __init__(self, profiler: profile) -> None:
        self.profiler = profiler

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What follows belongs to the next one."""
        with silent_stderr():  # the profiler greets there
            self.profiler.step()


def measure(trainer: Trainer, updates: int) -> dict[str, float]:
    """Trains for one update more than ``updates``; milliseconds of one by part, as ``shares``.

    On a GPU they are those of its kernels, on a CPU those from the beginning to the end of each
    operation.
    """
    gpu = trainer.args.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    if type(trainer) is Trainer:  # whose model has no name
        named(trainer.model)
    with profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=updates, repeat=1)
    ) as profiler:
        trainer.add_callback(Steps(profiler))
        trainer.train()
    found = times(profiler.events(), gpu)
    return {part: x / updates / 1e3 for part, x in found.items()}


def named(model: torch.nn.Module) -> None:
    """Gives a model's forward the name that the trainers of this library give to it."""
    running: list[record_function] = []

    def before(*_: Any) -> None:
        running.append(record_function(ranges.POLICY))
        running[-1].__enter__()

    def after(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


def times(events: Iterable[Any], gpu: bool = False) -> dict[str, float]:
    """Microseconds of each part; their sum is the time of all updates.

    Args:
        events: ``torch.profiler.profile(...).events()``.
        gpu: count the time of kernels.
    """
    found = dict.fromkeys(PARTS, 0.0)
    owners: dict[tuple[int, int], str | None] = {}  # by the number of a node, and its thread
    last: str | None = None
    roots = [e for e in events if e.cpu_parent is None and e.device_type.name == "CPU"]
    # what is still to be seen, the next at the end; with the owner and the part it lies in
    ahead = [(e, None, REST) for e in sorted(roots, key=start, reverse=True)]
    while ahead:
        event, owner, part = ahead.pop()
        if event.name.startswith(NODE):
            # a node that adds to a parameter's gradient has no number, and follows another
            owner = last = owners.get((event.sequence_nr, event.fwd_thread), last)
            part = part_of(owner, backward=True)
        elif event.name in OWNERS:
            owner = OWNERS[event.name]
            part = part_of(owner, backward=False)
        elif event.name.startswith("Optimizer."):
            owner, part = None, "optimizer"
        if event.sequence_nr >= 0 and event.scope == 0:
            # the last to start with this number is what made the node
            owners[event.sequence_nr, event.thread] = owner
        inner = sorted(event.cpu_children, key=start, reverse=True)
        found[part] += spent(event, gpu) - sum(spent(child, gpu) for child in inner)
        ahead += [(child, owner, part) for child in inner]
    return found


def start(event: Any) -> float:
    """When it began."""
    return float(event.time_range.start)


def spent(event: Any, gpu: bool) -> float:
    """What it took, with all that it called."""
    return float(event.device_time_total if gpu else event.cpu_time_total)


def part_of(owner: str | None, backward: bool) -> str:
    """The policy's two directions are told apart; what has no name is the rest."""
    if owner == "policy":
        return f"policy, {'backward' if backward else 'forward'}"
    return owner or REST
