"""What each generation of TPUs gets: one table.

Of the sizes that were compiled (``make aot-tpu``), these take the fewest instructions an element
and overflow no memory; nothing was tuned by timing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

MIB = 2**20
DTYPES = ("bfloat16", "float32")
MOST_IDS = 128  # of a row; row_measures keeps a tile in VMEM for each


class Generation(NamedTuple):
    """A generation, and what follows from its memory and its compiler."""

    name: str
    kinds: tuple[str, ...]  # the names its devices give themselves
    vmem: int  # bytes of VMEM a core
    hbm: float  # GB/s a core
    gradient_in_xla: tuple[str, ...]  # dtypes whose gradient XLA computes inside its readers
    registers: int = 32  # float32 registers of logits in flight, of the 64 that there are
    rows: int = 128  # of a block of row_stats and row_grad
    columns: int = 4096

    @property
    def vmem_limit(self) -> int:
        """What a kernel may take: the rest is the compiler's own."""
        return self.vmem * 7 // 8


GENERATIONS = (
    Generation("v4", ("TPU v4",), 16 * MIB, 615, DTYPES, registers=16),
    Generation("v5e", ("TPU v5 lite", "TPU v5e"), 128 * MIB, 820, DTYPES),
    Generation("v5p", ("TPU v5", "TPU v5p"), 64 * MIB, 1230, DTYPES),
    Generation("v6e", ("TPU v6 lite", "TPU v6e"), 128 * MIB, 1640, DTYPES),
    Generation("v7x", ("TPU7x", "TPU7"), 64 * MIB, 3700, ("float32",)),
)
SMALLEST = GENERATIONS[0]  # what fits in it fits in all


def generation(device_kind: str) -> Generation:
    """The generation of a device, as ``device_kind`` names it; an unknown one gets the smallest."""
    return next((g for g in GENERATIONS if device_kind in g.kinds), SMALLEST)


def resident_rows(dtype: Any, vocab: int, of: Generation) -> int:
    """How many whole rows a block of the single pass holds; 0 where not even one group fits.

    Logits and gradients each have two buffers, so that one moves while the other is computed on.
    About 1 MiB a block is enough to hide what starting a block costs.
    """
    group: int = 32 // dtype.itemsize
    padded = -(-vocab // 128) * 128
    group_bytes = group * padded * dtype.itemsize
    if 4 * group_bytes > of.vmem_limit - MIB:
        return 0
    groups: int = max(1, min(MIB // group_bytes, 128 // group))
    return group * groups


def in_whole_tiles(shape: tuple[int, ...]) -> bool:
    """Whether logits of this shape suit ``labels.py``: tiles are full, labels fit in SMEM."""
    *_, rows, vocab = (1, *shape)
    return rows % 16 == 0 and vocab % 128 == 0 and 0 < math.prod(shape[:-1]) <= 2**16
