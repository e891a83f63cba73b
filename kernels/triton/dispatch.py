"""Which form of a kernel serves a row: tables by V and architecture; nothing is tuned at run time.

The numbers come from compilers (``make aot-gpu``), not from timings: the largest row that a form
holds without spilling a register.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CLUSTERS_SINCE = (3, 8)  # the first Triton that reduces across the blocks of a cluster

NVIDIA, NVIDIA_CLUSTERS, AMD, OTHER = "nvidia", "nvidia with clusters", "amd", "other"


class Resident(NamedTuple):
    """The row on chip, in parts of so many lanes; see ``resident.py``."""

    lanes: int  # a power of two
    parts: int
    num_warps: int
    num_ctas: int = 1
    # That a multiprocessor holds at once, so that one loads while another waits; of float32, half
    # as many move as many bytes.
    blocks: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        """What a launch is given: constants of the kernel, and options of the compiler."""
        return {
            "LANES": self.lanes,
            "PARTS": self.parts,
            "num_warps": self.num_warps,
            "num_ctas": self.num_ctas,
        }


class Tiles(NamedTuple):
    """The row in tiles of [r, lanes]; see ``scan.py`` and ``two_pass.py``."""

    r: int
    lanes: int
    num_warps: int
    blocks: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        """As for Resident."""
        return {"R": self.r, "L": self.lanes, "num_warps": self.num_warps}


class Block(NamedTuple):
    """The row in independent blocks of columns; see ``row_grad.py`` and ``scale.py``."""

    columns: int
    num_warps: int
    blocks: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        """As for Resident."""
        return {"BLOCK": self.columns, "num_warps": self.num_warps}

    def programs(self, columns: int) -> int:
        """How many blocks cover that many."""
        return max(1, -(-columns // self.columns))


class Fits(NamedTuple):
    """The most columns that a resident form holds, and of which rows."""

    columns: int
    num_warps: int
    num_ctas: int = 1
    blocks: int = 1
    itemsize: int = 4  # the largest elements, in bytes
    matched: bool = False  # whether a row's gradient has to lie as the row does; see ``columns.py``


# 32 float32 numbers a thread leave room for the rest in 64 registers. With entropy the logits live
# on beside them, in up to 97 registers, which blocks of 32 warps do not have.
_SMALL = (Fits(1024, 4, 1, 8), Fits(2048, 4, 1, 4), Fits(8192, 8, 1, 3), Fits(16384, 16, 1, 2))
_SMALL_ENTROPY = (Fits(1024, 4, 1, 6), Fits(4096, 8, 1, 3), Fits(8192, 16, 1, 2), Fits(16384, 16))
_SMALL_AMD = (Fits(2048, 4, 1, 2), Fits(8192, 8))  # waves of 64 lanes
_OTHER = (Fits(2048, 4), Fits(8192, 16))
RESIDENT: dict[str, tuple[Fits, ...]] = {
    NVIDIA: (*_SMALL, Fits(32768, 32)),
    NVIDIA_CLUSTERS: (
        *_SMALL,
        Fits(32768, 32),
        Fits(65536, 16, 4, 2),
        Fits(131072, 16, 8, 2),
        Fits(163840, 16, 8),
        Fits(262144, 32, 8),  # 8 blocks are the largest cluster that every such device accepts
    ),
    AMD: (*_SMALL_AMD, Fits(32768, 16), Fits(65536, 16, itemsize=2, matched=True)),
    OTHER: _OTHER,
}
RESIDENT_ENTROPY: dict[str, tuple[Fits, ...]] = {
    NVIDIA: _SMALL_ENTROPY,
    NVIDIA_CLUSTERS: (
        *_SMALL_ENTROPY,
        Fits(32768, 16, 2),
        Fits(65536, 16, 4),
        Fits(163840, 16, 8),
    ),
    AMD: (*_SMALL_AMD, Fits(32768, 16), Fits(40960, 16, itemsize=2, matched=True)),
    OTHER: _OTHER,
}
RESIDENT_BOTH: dict[str, tuple[Fits, ...]] = {  # entropy and a soft cap
    **RESIDENT_ENTROPY,
    NVIDIA_CLUSTERS: (
        *RESIDENT_ENTROPY[NVIDIA_CLUSTERS][:-1],
        Fits(131072, 16, 8),
        Fits(163840, 16, 8, itemsize=2),
    ),
    AMD: (*_SMALL_AMD, Fits(24576, 16)),
}
# The rest of the row has to wait in the L2 cache, so that as few rows as possible should be under
# way at once: one block, of all the threads that a multiprocessor accepts in one.
TWO_PASS = {NVIDIA: Tiles(2, 8192, 32), AMD: Tiles(2, 8192, 16), OTHER: Tiles(2, 4096, 16)}
# Lanes are 8 elements for each thread, so that no thread waits for another inside the loop.
SHORT = 4096
STATS_SHORT = {NVIDIA: Tiles(2, 1024, 4, 4), AMD: Tiles(2, 1024, 2, 4), OTHER: Tiles(2, 1024, 4)}
STATS_LONG = {NVIDIA: Tiles(4, 2048, 8, 2), AMD: Tiles(4, 2048, 4, 2), OTHER: Tiles(2, 2048, 8)}
# With measures beyond the entropy each lane keeps twice as many numbers.
STATS_FULL = {NVIDIA: Tiles(2, 1024, 4, 3), AMD: Tiles(2, 1024, 2, 3), OTHER: Tiles(2, 1024, 4)}

ROW_GRAD = {NVIDIA: Block(4096, 8, 4), AMD: Block(4096, 4, 4), OTHER: Block(4096, 8)}
# Of a row that is seen through a mask all addresses are in registers, of 8 columns a thread.
MEASURES_GRAD = {NVIDIA: Block(2048, 8, 3), AMD: Block(2048, 4, 3), OTHER: Block(2048, 8)}
LABELS = Block(128, 4)  # here rows, one a thread
SCALE_PROGRAMS = 1024  # enough to fill a GPU, few enough to cost nothing where the factor is 1


def family(backend: str, arch: int | str, triton_version: str) -> str:
    """The rows of the tables for a device, as Triton's current target names it.

    Clusters are trusted on 9.x and 10.x, the data-centre chips of Hopper and Blackwell.
    """
    if backend == "hip":
        return AMD
    if backend != "cuda":
        return OTHER
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    clusters = int(arch) // 10 in (9, 10) and version >= CLUSTERS_SINCE
    return NVIDIA_CLUSTERS if clusters else NVIDIA


def row_stats_grad(
    vocab: int, itemsize: int, entropy: bool, of: str, matched: bool = True, softcap: bool = False
) -> Resident | Tiles:
    """The first resident form that holds the row, else two passes.

    With a soft cap the logits live on as they do with entropy, for the slope of the cap.
    """
    for fits in resident(entropy, softcap)[of]:
        serves = itemsize <= fits.itemsize and matched >= fits.matched
        if vocab <= fits.columns and serves:
            threads = fits.num_warps * fits.num_ctas * (64 if of == AMD else 32)
            return Resident(*cut(vocab, 8 * threads), fits.num_warps, fits.num_ctas, fits.blocks)
    return TWO_PASS[_plain(of)]


def resident(entropy: bool, softcap: bool = False) -> dict[str, tuple[Fits, ...]]:
    """The table of what is kept of a row."""
    return (RESIDENT, RESIDENT_ENTROPY, RESIDENT_BOTH)[entropy + softcap]


def row_stats(vocab: int, of: str) -> Tiles:
    """Tiles no larger than the row needs."""
    return (STATS_SHORT if vocab <= SHORT else STATS_LONG)[_plain(of)]


def row_measures(vocab: int, of: str, extras: bool) -> Tiles:
    """As ``row_stats``; ``extras`` are measures beyond the entropy."""
    return STATS_FULL[_plain(of)] if extras else row_stats(vocab, of)


def row_grad(of: str) -> Block:
    """One block size for all rows; ``scale`` takes it as well."""
    return ROW_GRAD[_plain(of)]


def row_measures_grad(of: str) -> Block:
    """One block size for all rows."""
    return MEASURES_GRAD[_plain(of)]


def cut(vocab: int, most: int) -> tuple[int, int]:
    """``(lanes, parts)`` that hold the row: as few parts of at most so many lanes as possible.

    ``most`` is what gives every thread 8 elements of a part. The fewest lanes, 128, are as many
    groups as there may be elements at the edges.
    """
    lanes = min(most, 1 << max(7, (vocab - 1).bit_length()))
    return lanes, -(-vocab // lanes)


def _plain(of: str) -> str:
    """The family in tables that have nothing to do with clusters."""
    return NVIDIA if of == NVIDIA_CLUSTERS else of
