"""How a number reaches a launch: by value, or as an address of what lies on the device already.

Nothing is compiled anew when a number changes, and the host waits for none.
"""

import triton
import triton.language as tl

ABSENT, VALUE, LOADED, PER_ROW = (tl.constexpr(how) for how in range(4))


@triton.jit
def number(x, i, inside, HOW: tl.constexpr):
    """The number of the rows i, in float32; 1 where it is absent."""
    if HOW == ABSENT:
        found = 1.0
    elif HOW == LOADED:
        found = tl.load(x).to(tl.float32)
    elif HOW == PER_ROW:
        found = tl.load(x + i, inside, 0.0).to(tl.float32)
    else:
        found = x
    return found


@triton.jit
def flag(flags, i, inside, length, HOW: tl.constexpr):
    """Whether the flag of the rows i is set: PER_ROW, or one per sequence."""
    place = i
    if HOW != PER_ROW:
        place = i // length
    return tl.load(flags + place, inside, 0) != 0


@triton.jit
def sum_of(partial, blocks):
    """Of a row of partial sums."""
    total = 0.0
    for start in tl.range(0, blocks, 1024):
        k = start + tl.arange(0, 1024)
        total += tl.sum(tl.load(partial + k, k < blocks, 0.0), 0)
    return total
