"""From the options of a public function to records: checked, normalised, and none left over."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from irl_ops.algebra.options import Heads, Sequence, Terms, Weighting
from irl_ops.arguments import Arguments
from irl_ops.measures import Measures
from irl_ops.options import DEFAULTS, TokenLossOptions, names_in, refuse
from irl_ops.readout import PLAIN, Readout


class Call(NamedTuple):
    """One call of a loss."""

    terms: Terms
    sequence: Sequence
    weighting: Weighting
    heads: Heads
    metrics: bool  # whether they are wanted
    inplace: bool
    backend: str
    readout: Readout = PLAIN
    plain: bool = False  # whether no array is among the options, only numbers and names


class Parallel(NamedTuple):
    """Which part of a batch is on this device; a group is whatever a framework calls one."""

    vocab_group: Any = None
    vocab_start: int | None = None
    vocab_size: int | None = None
    sequence_group: Any = None
    sequence_order: Any = None


class StatsCall(NamedTuple):
    """One call of ``token_stats``."""

    gamma: Any
    sequence: Sequence
    heads: Heads
    entropy: bool
    backend: str
    readout: Readout = PLAIN
    measures: Measures = Measures(temperature=None)
    plain: bool = False  # as in Call


def read_loss(
    caller: str,
    group: type,
    arguments: Arguments,
    terms_of: Callable[..., Terms],
    logits: Any,
    labels: Any,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Any = None,
) -> Call:
    """The records of a loss's call.

    Args:
        caller: name of the public function, for messages.
        group: the TypedDict of its options.
        arguments: the framework's checks.
        terms_of: a function of ``irl_ops.terms``.
        logits: ``[..., T, V]``.
        labels: ``[..., T]``.
        options: what the user gave; may be emptied.
        return_metrics: another option, which decides the type of the result.
        is_expert: the third array of the online losses.
    """
    if "num_items_in_batch" in options:  # a Trainer calls, with outputs in the place of logits
        refuse(caller, ["num_items_in_batch"], group)
    arguments.check_logits(logits, labels)
    if is_expert is None and arguments.remembers() and _are_plain(options):
        columns = logits.shape[-1]
        return _plain_loss(caller, group, arguments, terms_of, columns, return_metrics, **options)
    return _loss(
        caller, group, arguments, terms_of, logits, labels, logits.shape[-1], options,
        return_metrics, is_expert,
    )  # fmt: skip


_REMEMBERED = 256  # of each function; an annealed number takes one at every value


@functools.lru_cache(_REMEMBERED, typed=True)  # 1, 1.0 and True are equal, and not all accepted
def _plain_loss(
    caller: str,
    group: type,
    arguments: Arguments,
    terms_of: Callable[..., Terms],
    vocab: int,
    return_metrics: bool,
    /,
    **options: Any,
) -> Call:
    """The same records for the same numbers and names, without reading them again."""
    call = _loss(
        caller, group, arguments, terms_of, None, None, vocab, options, return_metrics, None
    )
    return call._replace(plain=True)


def _are_plain(options: dict[str, Any]) -> bool:
    """Whether the options are numbers and names alone, of Python's own types."""
    for x in options.values():
        if type(x) not in _PLAIN and not (type(x) is tuple and all(type(i) is int for i in x)):
            return False
    return True


_PLAIN = frozenset({int, float, bool, str, type(None)})


def _loss(
    caller: str,
    group: type,
    arguments: Arguments,
    terms_of: Callable[..., Terms],
    logits: Any,
    labels: Any,
    vocab: int,
    options: dict[str, Any],
    return_metrics: bool,
    is_expert: Any,
) -> Call:
    """The records, from options that are emptied; arrays are looked at beside other arrays only."""
    pair = is_expert is not None
    if pair:
        arguments.check_flags("is_expert", is_expert, labels)
    number = functools.partial(_number, arguments, logits, options)
    terms = terms_of(number, is_expert) if pair else terms_of(number)
    terms = terms._replace(
        entropy_coef=_unless_zero(number("entropy_coef", -math.inf, math.inf)),
        z_loss=_unless_zero(number("z_loss", -math.inf, math.inf)),
    )
    take = functools.partial(_take, options)
    readout = arguments.readout(logits, take(Readout), options.pop("temperature", 1.0))
    weighting = arguments.weighting(labels, take(Weighting), pair)
    sequence = arguments.sequence(labels, vocab, take(Sequence))
    heads = arguments.heads(labels, take(Heads) if terms.td is not None else Heads())
    inplace, backend = options.pop("inplace", False), options.pop("backend", "auto")
    _refuse_rest(caller, group, options)
    arguments.check_switches(return_metrics=return_metrics, inplace=inplace)
    if inplace and weighting.reduction == "none":
        raise ValueError("inplace=True with reduction='none'; accepted: 'mean', 'sum'")
    return Call(terms, sequence, weighting, heads, return_metrics, inplace, backend, readout)


def _refuse_rest(caller: str, group: type, options: dict[str, Any]) -> None:
    """Raises for options that nothing took; those of parts are None where the logits are whole."""
    rest = [name for name, x in options.items() if x is not None or name not in Parallel._fields]
    if rest:
        refuse(caller, rest, group)


def read_parallel(options: dict[str, Any]) -> Parallel:
    """The options of ``Parallel``, taken out of the others; they are read before the arrays are."""
    parallel: Parallel = _take(options, Parallel)
    return parallel


def read_stats(
    caller: str,
    group: type,
    arguments: Arguments,
    logits: Any,
    labels: Any,
    options: dict[str, Any],
) -> StatsCall:
    """The records of a call of ``token_stats``; arguments as for ``read_loss``."""
    arguments.check_logits(logits, labels)
    if arguments.remembers() and _are_plain(options):
        return _plain_stats(caller, group, arguments, logits.shape[-1], **options)
    return _stats(caller, group, arguments, logits, labels, logits.shape[-1], options)


@functools.lru_cache(_REMEMBERED, typed=True)
def _plain_stats(
    caller: str, group: type, arguments: Arguments, vocab: int, /, **options: Any
) -> StatsCall:
    """As ``_plain_loss``."""
    return _stats(caller, group, arguments, None, None, vocab, options)._replace(plain=True)


def _stats(
    caller: str,
    group: type,
    arguments: Arguments,
    logits: Any,
    labels: Any,
    vocab: int,
    options: dict[str, Any],
) -> StatsCall:
    """The records, from options that are emptied."""
    gamma = _number(arguments, logits, options, "gamma", 0.0, 1.0)
    take = functools.partial(_take, options)
    temperature, measures = arguments.measures(logits, labels, take(Measures))
    readout = arguments.readout(logits, take(Readout), temperature)
    sequence = arguments.sequence(labels, vocab, take(Sequence))
    heads = arguments.heads(labels, take(Heads))
    entropy, backend = options.pop("entropy", True), options.pop("backend", "auto")
    _refuse_rest(caller, group, options)
    arguments.check_switches(entropy=entropy)
    return StatsCall(gamma, sequence, heads, entropy, backend, readout, measures)


def read_token_loss(
    caller: str,
    arguments: Arguments,
    token_stats: Callable[..., Any],
    made: type,
    logits: Any,
    labels: Any,
    options: dict[str, Any],
    entropy: bool = False,
) -> tuple[Any, Weighting]:
    """The statistics that a loss is a function of, and how its rows are averaged.

    Args:
        caller: name of the public function, for messages.
        arguments: the framework's checks.
        token_stats: the framework's function.
        made: what it returns, ``TokenStats``.
        logits: ``[..., T, V]``; or statistics, of which ``labels`` and the options that go with
            them are part.
        labels: ``[..., T]``.
        options: what the user gave; emptied.
        entropy: whether the loss needs it.
    """
    unknown = [name for name in options if name not in names_in(TokenLossOptions)]
    if unknown:
        refuse(caller, unknown, TokenLossOptions)
    weighting = _take(options, Weighting)
    if isinstance(logits, made):
        given = [*options, *(["labels"] if labels is not None else [])]
        if given:
            raise TypeError(
                f"{caller}: {', '.join(given)} beside statistics; accepted: those of how rows are "
                f"averaged ({', '.join(Weighting._fields)}), the others in the call that made them"
            )
        stats: Any = logits
    elif labels is None:
        raise TypeError(f"{caller}: labels are missing; accepted: logits and labels, or TokenStats")
    else:
        stats = token_stats(logits, labels, entropy=entropy, **options)
    if entropy and stats.entropy is None:
        raise ValueError(
            f"{caller}: the statistics have no entropy; accepted: those made with entropy=True"
        )
    return stats, arguments.weighting(stats.kind, weighting, False)


def read_vocab(caller: str, made: type, logits: Any, vocab_size: Any) -> int:
    """The number of tokens: that of the logits' columns, which statistics don't hold."""
    if vocab_size is None:
        if isinstance(logits, made):
            raise TypeError(
                f"{caller}: vocab_size is missing; accepted: an int beside statistics, which don't "
                "hold it"
            )
        return int(logits.shape[-1])
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size!r}; accepted: an int of 1 or more, or None")
    return vocab_size


def _number(
    arguments: Arguments,
    logits: Any,
    options: dict[str, Any],
    name: str,
    low: float,
    high: float,
    open_end: bool = False,
) -> Any:
    given = options.pop(name, DEFAULTS[name])
    return arguments.number(name, given, logits, low, high, open_end=open_end)


def _take(options: dict[str, Any], record: Any) -> Any:
    """The options that are fields of a record."""
    return record(**{name: options.pop(name) for name in record._fields if name in options})


def _unless_zero(x: Any) -> Any:
    """None for a term that the number 0 leaves out; the value of an array is not looked at."""
    return None if isinstance(x, int | float) and x == 0 else x
