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
    logit_scale: float = 1.0,
    softcap: float = 0.0,
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
    logit_scale: float = 1.0,
    softcap: float = 0.0,
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
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> None: ...
def label_logit(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    label_logit: int,
    isa: str = "",
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> None: ...
def set_label(
    dlogits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    labels: int,
    elements: int,
    label_logit: int = 0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
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

class Call:
    """The options of a call: numbers as they are, arrays by address, 0 for absent ones."""

    def __init__(self) -> None: ...

    ignore_index: int
    shift: bool
    eos_token_id: Sequence[int]
    boundary: str
    where: int
    segment_ids: int
    position_ids: int
    cu_seqlens: Sequence[int]
    token_weights: int
    mean: bool
    has_td: bool
    gamma: float
    values: int
    next_values: int
    detach_next: bool

    def set_truncated(self, at: int, by_row: bool) -> None: ...
    def set_is_expert(self, at: int, by_row: bool) -> None: ...
    def set_num_items(self, expert: float, agent: float) -> None: ...
    def set_mle(self, number: float, at: int) -> None: ...
    def set_td(self, number: float, at: int) -> None: ...
    def set_agent_td(self, number: float, at: int) -> None: ...
    def set_entropy_coef(self, x: float) -> None: ...
    def set_z_loss(self, x: float) -> None: ...

def loss(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    call: Call,
    labels: int,
    above: float,
    above_rows: int,
    kept: Sequence[int],
    dlogits: int,
    dlogits_strides: Sequence[int],
    row_losses: int,
    dvalues: int,
    dnext_values: int,
    threads: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    isa: str = "",
) -> tuple[float, float, float, float, float, float, float, float, float] | int:
    """Loss, nll, value, entropy, td, reward, accuracy, z, tokens; or a row with a bad label.

    Without ``dlogits``, row_max, logsum and entropy of all rows are left at ``kept``, where that is
    not 0.
    """

def loss_grad(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    call: Call,
    labels: int,
    above: float,
    above_rows: int,
    kept: Sequence[int],
    dlogits: int,
    dlogits_strides: Sequence[int],
    dvalues: int,
    dnext_values: int,
    threads: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    isa: str = "",
) -> None: ...
def row_measures(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    ids: int,
    count: int,
    out: Sequence[int],
    view: tuple[int, int, Sequence[int], int],
    threads: int,
    isa: str = "",
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Writes the eight arrays at ``out``, those of address 0 not."""

def row_measures_grad(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    ids: int,
    count: int,
    row_max: int,
    logsum: int,
    slopes: Sequence[int],
    dlogits: int,
    dlogits_strides: Sequence[int],
    view: tuple[int, int, Sequence[int], int],
    threads: int,
    isa: str = "",
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> None: ...
def token_stats(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    call: Call,
    labels: int,
    out: Sequence[int],
    threads: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    isa: str = "",
) -> int:
    """The first row whose label is bad, or -1; writes the ten arrays at ``out``."""

def token_stats_grad(
    logits: int,
    dtype: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    vocab: int,
    call: Call,
    kept: Sequence[int],
    above: Sequence[int],
    dlogits: int,
    dlogits_strides: Sequence[int],
    dvalues: int,
    dnext_values: int,
    threads: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    isa: str = "",
) -> None: ...
def stages(
    call: Call,
    labels: int,
    sizes: Sequence[int],
    above: float,
    above_rows: int,
    vocab: int,
    row_max: Sequence[float],
    logsum: Sequence[float],
    label_logit: Sequence[float],
    entropy: Sequence[float],
) -> dict[str, list[float]]:
    """What every stage returns, by name, for the test that holds all forms of the algebra equal."""

def pool_empty(shape: Sequence[int], strides: Sequence[int], dtype: str) -> object:
    """A DLPack capsule named "dltensor", on memory of the pool, with any values."""

def pool_set_limit(bytes: int) -> None: ...
def pool_limit() -> int: ...
def pool_idle() -> int: ...
def pool_release() -> int: ...
def use_openmp(parallel: int) -> None: ...
def xla_targets() -> dict[str, object]:
    """Capsules for ``jax.ffi.register_ffi_target``, by kernel; none in a build without XLA."""

xla_api: tuple[int, int] | None  # of the headers that the targets were built with

def isa() -> str: ...
def isas() -> tuple[str, ...]: ...
