"""What crosses between processes: each collective carries one packed message, whatever is in it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence as ListOf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup
WORDS = 64  # of 8 bytes, that are compared once per configuration

_agreed: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


def gather(
    group: Group, head: ListOf[int], arrays: ListOf[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``head`` and arrays of all ranks, stacked: ``[r, len(head)]`` int64, and ``[r, *shape]``.

    The shapes and dtypes are the same on every rank. One collective; nothing waits for a device.
    """
    device = arrays[0].device
    words = [torch.full((1,), word, dtype=torch.int64, device=device) for word in head]
    packed = [torch.cat(words), *arrays]
    message = torch.cat([_bytes(x) for x in packed])
    ranks = dist.get_world_size(group)
    found = message.new_empty(ranks * message.shape[0])
    _all_gather(found, message, group)
    rows, out, start = found.view(ranks, -1), [], 0
    for x in packed:
        end = start + x.numel() * x.element_size()
        # a copy, since another dtype needs its own alignment
        part = rows[:, start:end].reshape(-1).clone(memory_format=torch.contiguous_format)
        out.append(part.view(x.dtype).view(ranks, *x.shape))
        start = end
    return out[0], tuple(out[1:])


def from_next(group: Group, mine: Tensor) -> Tensor:
    """What the next rank has given for ``mine``; for the last rank its own. One message each way.

    No collective: each process sends to its neighbour, and nothing waits for a device.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = mine.contiguous()
    theirs, messages = mine.clone(), []
    if rank > 0:
        to = dist.get_global_rank(group, rank - 1)
        messages.append(dist.P2POp(dist.isend, mine, to, group))
    if rank + 1 < ranks:
        source = dist.get_global_rank(group, rank + 1)
        messages.append(dist.P2POp(dist.irecv, theirs, source, group))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return theirs


def summed(group: Group, arrays: ListOf[Tensor]) -> list[Tensor]:
    """The sums over all ranks, in one collective; alike on every rank where two terms are not 0."""
    wide = torch.promote_types(arrays[0].dtype, torch.float32)
    for x in arrays:
        wide = torch.promote_types(wide, x.dtype)
    message = torch.cat([x.reshape(-1).to(wide) for x in arrays])
    dist.all_reduce(message, group=group)
    parts = torch.split(message, [x.numel() for x in arrays])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, arrays, strict=True)]


def agree(group: Group, name: str, caller: str, facts: dict[str, Any], device: Any) -> None:
    """Every rank calls the same function with the same options and shapes, or all raise.

    Compared once per group and configuration, for which the host waits; a configuration that was
    seen costs nothing. It guards the messages, which have to be of one size.
    """
    mine = tuple(word(fact) for fact in facts.items())
    seen = _agreed.setdefault(group, set())
    if mine in seen:
        return
    padded = torch.zeros(WORDS, dtype=torch.int64)
    padded[: len(mine)] = torch.tensor(mine)
    (theirs,) = gather(group, (0,), [padded.to(device)])[1]
    differ = (theirs != theirs[:1]).any(0).tolist()
    if any(differ):
        names = [fact for fact, other in zip(facts, differ, strict=False) if other]
        raise ValueError(
            f"{caller}: the ranks of {name} differ in {', '.join(names) or 'what they call'}; "
            "accepted: the same on every rank"
        )
    seen.add(mine)


def word(x: Any) -> int:
    """63 bits that stand for the ``repr`` of something, in every process alike."""
    digest = hashlib.blake2b(repr(x).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _bytes(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    if flat.stride(0) != 1:  # which a single element may have, and is contiguous still
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _all_gather(found: Tensor, message: Tensor, group: Group) -> None:
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(found, message, group=group)
    else:  # its name before torch 2.13
        dist.all_gather_into_tensor(found, message, group=group)
