"""The C++ row kernels behind raw addresses; callers own every check and every buffer."""

from collections.abc import Sequence

def row_stats(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    row_max: int,
    logsum: int,
    label_logit: int,
    entropy: int,
    threads: int,
    isa: str = "",
) -> None: ...
def row_grad(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    row_max: int,
    logsum: int,
    a: int,
    b: int,
    c: int,
    dlogits: int,
    dlogits_strides: Sequence[int],
    threads: int,
    isa: str = "",
) -> None: ...
def row_stats_grad(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    alpha: int,
    beta: int,
    entropy_weight: int,
    row_max: int,
    logsum: int,
    entropy: int,
    dlogits: int,
    dlogits_strides: Sequence[int],
    threads: int,
    isa: str = "",
) -> None: ...
def label_logit(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    label_logit: int,
) -> None: ...
def set_label(
    dlogits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    elements: int,
) -> None: ...
def scale(
    dlogits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    factor: float,
    threads: int,
    isa: str = "",
) -> None: ...
def use_openmp(parallel: int) -> None: ...
def isa() -> str: ...
def isas() -> tuple[str, ...]: ...
