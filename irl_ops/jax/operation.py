"""Operations on rows that become a program only when lowered, for the devices at hand.

An operation's arrays have the same leading axes, the rows; logits and gradients have one more, the
vocabulary, and some arrays have one more that is not it. So every operation is batched by one more
leading axis, and partitioned over devices by its rows: logits sharded over batch or sequence stay
where they are, and so do those whose vocabulary is sharded in equal parts, where ``over_columns``
says what becomes of the operation.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from irl_ops.jax import private
from irl_ops.jax.shards import Columns

Function = Callable[..., Any]


OverColumns = Callable[[Any], Callable[[Columns], Function]]


def operation(
    plain: Function,
    over_columns: OverColumns | None = None,
    beside: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    **chosen: Callable[[Any], Function],
) -> Function:
    """A function that takes and returns what ``plain`` does; flags are static.

    Args:
        plain: gives the types. Its first argument has the rows' axes and the vocabulary. Where it
            is chosen, XLA partitions it as it sees fit.
        over_columns: gives, for jax's context of the lowering, the function to lower on a device
            that has some columns of its rows; without it they are gathered.
        beside: the places, among the arrays and among the results, of those whose last axis is
            neither of the rows nor the vocabulary.
        **chosen: by platform, the function to lower, given jax's context of the lowering. It takes
            the same arrays, those that are not None.

    Raises:
        NotImplementedError: when it is called, where JAX lacks what operations are made with.
    """
    if private.missing() is not None:
        return functools.wraps(plain)(_refused)
    made: Any = Primitive("irl_" + plain.__name__.strip("_"))
    made.multiple_results = True

    def types(*given: Any, **static: Any) -> list[Any]:
        out: list[Any] = jax.make_jaxpr(functools.partial(plain, **static))(*given).out_avals
        return [_varying(x, given) for x in out]

    def eager(*given: Any, **static: Any) -> list[jax.Array]:
        with jax.disable_jit(False):  # it is a program, also where others are not wanted to be
            out: list[jax.Array] = jax.jit(functools.partial(made.bind, **static))(*given)
        return out

    def batched(given: Any, axes: Any, **static: Any) -> tuple[list[jax.Array], list[int]]:
        pairs = list(zip(given, axes, strict=True))
        size = next(x.shape[i] for x, i in pairs if i is not None)
        rows = [
            jnp.broadcast_to(x, (size, *x.shape)) if i is None else jnp.moveaxis(x, i, 0)
            for x, i in pairs
        ]
        out: list[jax.Array] = made.bind(*rows, **static)
        return out, [0] * len(out)

    def lower(choose: Callable[[Any], Function], ctx: Any, *given: Any, **static: Any) -> Any:
        kernel = choose(ctx)
        run: Function = functools.partial(_listed, kernel, **static)
        if private.partitions(ctx) > 1 and kernel is not plain:
            given_ndims, out_ndims = ([x.ndim for x in y] for y in (ctx.avals_in, ctx.avals_out))
            parted = over_columns and functools.partial(_on_columns, over_columns(ctx), **static)
            run = _by_rows(run, parted, given_ndims, out_ndims, beside)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *given)

    def refuse(ctx: Any, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{made.name} has kernels for {', '.join(chosen)}, and the program is lowered for "
            f"{', '.join(private.platforms(ctx))}; accepted: backend='auto' or 'reference'"
        )

    made.def_abstract_eval(types)
    made.def_impl(eager)
    batching.primitive_batchers[made] = batched
    private.lower_with_devices(made)
    mlir.register_lowering(made, refuse)
    for platform, choose in chosen.items():
        mlir.register_lowering(made, functools.partial(lower, choose), platform=platform)
    names = list(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def bound(*given: Any, **static: Any) -> Any:
        static |= {n: x for n, x in zip(names, given, strict=False) if isinstance(x, bool)}
        arrays = [x for x in given if x is not None and not isinstance(x, bool)]
        results = jax.eval_shape(functools.partial(plain, **static), *arrays)  # None among them
        return jax.tree.unflatten(jax.tree.structure(results), made.bind(*arrays, **static))

    return bound


def device(ctx: Any, platform: str) -> Any:
    """The first device that is lowered for, None where a program is exported without devices.

    Of a topology that is compiled for ahead of time, its first.
    """
    client = private.client(ctx)
    if client is None or client.platform != platform:
        return None
    return client.devices()[0]


def _refused(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(f"{private.missing()}; accepted: backend='reference'")


def _by_rows(
    run: Function,
    parted: Callable[[Columns], Function] | None,
    given: list[int],
    out: list[int],
    beside: tuple[tuple[int, ...], tuple[int, ...]],
) -> Function:
    """``run`` on each device's rows; the numbers of axes of what it takes and returns."""
    lead = given[0] - 1
    names = [f"r{i}" for i in range(lead)]

    def rule(ndims: list[int], of: str, apart: tuple[int, ...]) -> str:
        own = range(len(ndims)) if parted is None else apart
        vocab = [f"{of}{i}" if i in own else "v" for i in range(len(ndims))]
        return ", ".join(
            " ".join([*names, *([v] if n > lead else [])])
            for n, v in zip(ndims, vocab, strict=True)
        )

    def axis_of(mesh: Any, logits: Any) -> Any:
        """The mesh axes over which the vocabulary stays sharded."""
        spec = tuple(logits.sharding.spec)
        axis = spec[lead] if len(spec) > lead else None
        if axis is None or parted is None:
            return None
        names = axis if isinstance(axis, tuple) else (axis,)
        return None if logits.shape[lead] % math.prod(mesh.shape[x] for x in names) else axis

    def spread(
        mesh: Any, logits: Any, ndims: list[int], apart: tuple[int, ...]
    ) -> tuple[NamedSharding, ...]:
        spec = tuple(logits.sharding.spec)[:lead]
        spec += (None,) * (lead - len(spec))
        vocab = axis_of(mesh, logits)
        return tuple(
            NamedSharding(mesh, PartitionSpec(*spec, *[None if i in apart else vocab] * (n - lead)))  # type: ignore[no-untyped-call]
            for i, n in enumerate(ndims)
        )

    def partition(mesh: Any, shapes: Any, results: Any) -> Any:
        axis = axis_of(mesh, shapes[0])
        here = run if axis is None or parted is None else parted(Columns(axis))
        results_are = list(spread(mesh, shapes[0], out, beside[1]))
        return mesh, here, results_are, spread(mesh, shapes[0], given, beside[0])

    def infer(mesh: Any, shapes: Any, results: Any) -> Any:
        return list(spread(mesh, shapes[0], out, beside[1]))

    spread_over_devices = custom_partitioning(run)  # type: ignore[no-untyped-call]
    spread_over_devices.def_partition(  # type: ignore[no-untyped-call]
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{rule(given, 'v', beside[0])} -> {rule(out, 'w', beside[1])}",
    )
    made: Function = spread_over_devices
    return made


def _varying(result: Any, given: Any) -> Any:
    """The result's type, varying over the axes of a ``shard_map`` that an argument varies over."""
    over = frozenset().union(*(getattr(x, "vma", frozenset()) for x in given))
    return result.update(vma=over) if over else result


def vector_like(logits: jax.Array) -> Any:
    """The type of one float32 number per row."""
    return jax.ShapeDtypeStruct(logits.shape[:-1], jnp.float32)  # type: ignore[no-untyped-call]


def array_like(logits: jax.Array) -> Any:
    """The type of the logits' gradient."""
    return jax.ShapeDtypeStruct(logits.shape, logits.dtype)  # type: ignore[no-untyped-call]


def _on_columns(
    over_columns: Callable[[Columns], Function], columns: Columns, **static: Any
) -> Function:
    return functools.partial(_listed, over_columns(columns), **static)


def _listed(run: Function, *given: Any, **static: Any) -> list[Any]:
    out = run(*given, **static)
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
