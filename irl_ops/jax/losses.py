"""The losses, their arguments and what they promise."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import jax

from irl_ops import terms
from irl_ops.call import read_loss
from irl_ops.jax.arguments import Array, arguments
from irl_ops.jax.forward import Loss, loss_of
from irl_ops.jax.options import IQLearnOptions, MLEOptions, OnlineOptions
from irl_ops.options import signature


@overload
def iqlearn_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[IQLearnOptions[Array]],
) -> jax.Array: ...


@overload
def iqlearn_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[IQLearnOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def iqlearn_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: bool,
    **options: Unpack[IQLearnOptions[Array]],
) -> Loss: ...


@signature(IQLearnOptions)
def iqlearn_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[IQLearnOptions[Array]],
) -> Loss:
    r"""Offline IQLearn: maximum likelihood with a temporal-difference penalty (Eq. 14).

    The logits are read as Q-values, V_t = logsumexp(q_t), and

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t + \zeta V_t^2
              + \lambda\,(q_t[a_t] - \gamma V'_t)^2\right]

    with V' = V_{t+1} where row t bootstraps from the next row and 0 after a terminal token.
    ``lam=0`` is MLE. On CPUs and GPUs the gradient is computed in the forward pass, in one read
    and one write of the logits; on TPUs where the compiler moves fewest bytes.

    Works under ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``; logits that
    are sharded over batch or sequence stay where they are. Inside ``shard_map``, ``vocab_axis`` and
    ``sequence_axis`` say which parts of the logits other devices hold. Labels and arrays may be
    traced, and so may the numbers: only True and False, strings, ``ignore_index`` and
    ``eos_token_id`` are static.

    Args:
        logits: float32, bfloat16 or float16 ``[..., T, V]``. The gradient has the same dtype; all
            arithmetic is float32. float64, with JAX's 64-bit types, is served by the backend
            "reference" alone, in float64 throughout.
        labels: int32 or int64 ``[..., T]``; logits[t] scores labels[t].
        lam: weight of the TD term, 0 or more; a number or a 0-d array, which can be annealed
            without recompiling.
        gamma: discount in [0, 1]; a number or a 0-d array.
        entropy_coef: weight kappa of the entropy bonus; a number or a 0-d array.
        z_loss: weight zeta of V_t^2 on labelled rows (PaLM's z-loss), 0 by default; a number or a
            0-d array. It anchors the offset of the logits, which log pi does not see.
        logit_scale: factor s of the logits, above 0; a number or a 0-d array that is not traced:
            kernels are made for its value, and it has no gradient.
        softcap: bound c of the logits, above 0, or None; a number or a 0-d array, likewise. Then
            q = c tanh(s x / c), where x are the given logits, and the gradient is that of x; an x
            of -inf stays -inf. Not for logits that a model has capped already.
        temperature: number above 0 that divides q, after the soft cap: the inverse of
            ``logit_scale`` where there is none. A number or a 0-d array, likewise.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``; False says as well that the row carries no label. Applied after
            the shift.
        shift: Hugging Face's convention, logits[t] scores labels[t + 1], without slicing; the last
            row of each segment then carries no label.
        segment_ids: integers ``[..., T]``, packed sequences: a row's next row has the same id.
        position_ids: integers ``[..., T]``, packed sequences: a segment starts wherever the
            position does not increase by one.
        cu_seqlens: integers ``[S + 1]``, packed sequences, offsets from 0 to N, with logits
            ``[N, V]``.
        eos_token_id: token or tokens that end an episode: their rows have V' = 0, and all others
            bootstrap where a next row exists.
        boundary: what a labelled row without a labelled next row does when nothing else decides:
            "terminal" (V' = 0), "bootstrap" from the next row if one exists, or "drop" its TD term.
        truncated: bool ``[...]`` (one per sequence) or ``[..., T]``: cut off there, not ended.
        token_weights: float ``[..., T]``, w_t; 1 by default.
        num_items: N for reduction "mean", e.g. the number of labels in all accumulated batches; a
            number or a 0-d array. By default the sum of w over the labelled rows.
        reduction: "mean", "sum" (N = 1) or "none": the loss of every row, ``[..., T]``.
        detach_next: no gradient flows through V'.
        next_values: float ``[..., T]``, replaces V_{t+1} in rows that bootstrap (target network).
        values: float ``[..., T]``, a separate value head v (A.1.1): Q_t = v_t + log pi_t, V = v.
        return_metrics: also return a dict of 0-d float32 arrays without gradient: "nll", "value"
            and, where ``entropy_coef`` is not 0, "entropy" (means over labelled rows), "td" =
            delta^2 and "reward" = delta (means over rows with a TD term), "accuracy" (no logit is
            larger than the label's; mean over labelled rows), where ``z_loss`` is not 0 "z" = V^2,
            and "tokens" (the count of labelled rows).
        inplace: the gradient is computed in the forward pass on every backend and for every dtype,
            also where it would wait for the backward pass: on TPUs, and for float16, which then is
            rounded before a loss scale reaches it. The storage of logits that nobody reads later is
            taken in any case. With an axis, the gradient comes in the backward pass.
        vocab_axis: axis of the ``shard_map`` that the call is in (or a tuple of axes) along which
            devices hold the other columns of the logits. Labels and end tokens are numbers of the
            whole vocabulary; the loss is that of whole rows, the gradient that of the columns here.
        vocab_start: the first column here, an int or a 0-d array; by default all devices have as
            many columns, and they follow one another.
        vocab_size: columns of the whole vocabulary; what is behind them is padding, of
            probability 0.
        sequence_axis: axis along which devices hold the other rows of the sequences. All arrays
            ``[..., T]`` are then those of the rows here, ``cu_seqlens`` and the flags of a sequence
            those of the whole; loss, N and metrics are those of the whole sequences.
        sequence_order: integers ``[T]`` or ``[..., T]``, the index in the whole sequence of each
            row here; by default devices have one contiguous part each. Where all of them together
            leave out a row, the loss is NaN.
        backend: "pallas" (TPUs), "triton" (GPUs), "native" (CPUs), "reference", or "auto": the
            fastest that serves the platform that the program is lowered for.

    Returns:
        The loss, a 0-d float32 array (``[..., T]`` for reduction "none"), or
        ``(loss, metrics)``. N = 0 gives 0, with gradients of 0.

    Raises:
        TypeError: a wrong dtype or type, or an unknown option.
        ValueError: a shape or option value that is not accepted, or a derivative by ``lam``,
            ``gamma``, ``entropy_coef``, ``z_loss``, ``token_weights`` or ``num_items``. The values
            of 0-d arrays and of ``cu_seqlens`` are looked at where they lie in this machine's
            memory and are not traced.
        NotImplementedError: second derivatives. Forward-mode ones raise JAX's TypeError.

        A label outside [0, V) other than ``ignore_index`` raises nothing: the loss is NaN, as
        it is with traced ``cu_seqlens`` that are no offsets.

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 8, 100))
        >>> labels = jax.random.randint(jax.random.key(1), (2, 8), 0, 100)
        >>> loss, dlogits = jax.value_and_grad(iqlearn_loss)(logits, labels, lam=0.1)
    """
    given = dict(options)
    checks = arguments.over(given)
    call = read_loss(
        "iqlearn_loss",
        IQLearnOptions,
        checks,
        terms.iqlearn,
        logits,
        labels,
        given,
        return_metrics,
    )
    return loss_of(call, checks.parallel, logits, labels)


@overload
def mle_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[MLEOptions[Array]],
) -> jax.Array: ...


@overload
def mle_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[MLEOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def mle_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: bool,
    **options: Unpack[MLEOptions[Array]],
) -> Loss: ...


@signature(MLEOptions)
def mle_loss(
    logits: Array,
    labels: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[MLEOptions[Array]],
) -> Loss:
    r"""Maximum likelihood, with ``entropy_coef`` > 0 entropy-regularised (Eq. 18).

    .. math:: L = \sum_t \frac{w_t}{N} \left[-\log \pi_t - \kappa H_t + \zeta V_t^2\right]

    Arguments, result and errors are those of ``iqlearn_loss``, without the options of the TD
    term. Those that describe the sequences are all accepted, so that the two calls are
    interchangeable; here the segments matter with ``shift=True`` (a label never crosses them), and
    ``eos_token_id``, ``boundary`` and ``truncated`` change nothing.

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 8, 100))
        >>> labels = jax.random.randint(jax.random.key(1), (2, 8), 0, 100)
        >>> dlogits = jax.grad(mle_loss)(logits, labels, entropy_coef=0.01)
    """
    given = dict(options)
    checks = arguments.over(given)
    call = read_loss(
        "mle_loss", MLEOptions, checks, terms.mle, logits, labels, given, return_metrics
    )
    return loss_of(call, checks.parallel, logits, labels)


@overload
def online_iqlearn_loss(
    logits: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[OnlineOptions[Array]],
) -> jax.Array: ...


@overload
def online_iqlearn_loss(
    logits: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: Literal[True],
    **options: Unpack[OnlineOptions[Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]: ...


@overload
def online_iqlearn_loss(
    logits: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: bool,
    **options: Unpack[OnlineOptions[Array]],
) -> Loss: ...


@signature(OnlineOptions)
def online_iqlearn_loss(
    logits: Array,
    labels: Array,
    is_expert: Array,
    *,
    return_metrics: bool = False,
    **options: Unpack[OnlineOptions[Array]],
) -> Loss:
    r"""Online IQLearn: expert and agent samples in one batch (Eqs. 15-17).

    .. math:: L = \frac{1}{N_E} \sum_{t \in E} w_t \left[-\log \pi_t - \kappa H_t + \zeta V_t^2
              + \tfrac{\lambda}{1-\alpha}\,\delta_t^2\right]
              + \frac{1}{N_B} \sum_{t \in B} w_t \tfrac{\lambda\alpha}{(1-\alpha)^2}\,\delta_t^2

    Agent rows are regularised, never imitated. The other arguments, the result and the errors are
    those of ``iqlearn_loss``.

    Args:
        logits: ``[..., T, V]``.
        labels: ``[..., T]``.
        is_expert: bool ``[...]`` (one per sequence) or ``[..., T]``.
        alpha: strength of the mix-in in [0, 1); a number or a 0-d array.
        lam: weight of the TD term.
        gamma: discount.
        entropy_coef: weight of the entropy bonus, on expert rows.
        z_loss: weight of V_t^2, on expert rows.
        logit_scale: see ``iqlearn_loss``, as for all that follow.
        softcap: bound of the logits.
        temperature: number above 0 that divides q.
        ignore_index: label of rows that carry none.
        where: bool ``[..., T]``.
        shift: logits[t] scores labels[t + 1].
        segment_ids: ``[..., T]``.
        position_ids: ``[..., T]``.
        cu_seqlens: ``[S + 1]``.
        eos_token_id: tokens that end an episode.
        boundary: "terminal", "bootstrap" or "drop".
        truncated: bool ``[...]`` or ``[..., T]``.
        token_weights: ``[..., T]``.
        num_items: the pair (N_E, N_B). An empty group contributes 0.
        reduction: "mean", "sum" or "none".
        detach_next: no gradient flows through V'.
        next_values: ``[..., T]``.
        values: ``[..., T]``.
        return_metrics: also return the metrics, means over expert and agent rows together.
        inplace: the gradient is computed in the forward pass on every backend.
        vocab_axis: axis along which the columns are sharded.
        vocab_start: the first column here.
        vocab_size: columns without padding.
        sequence_axis: axis along which the rows are sharded.
        sequence_order: index in the whole of each row here.
        backend: a name of ``available_backends()``, or "auto".

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 8, 100))
        >>> labels = jax.random.randint(jax.random.key(1), (2, 8), 0, 100)
        >>> is_expert = jnp.array([True, False])
        >>> dlogits = jax.grad(online_iqlearn_loss)(logits, labels, is_expert)
    """
    given = dict(options)
    checks = arguments.over(given)
    call = read_loss(
        "online_iqlearn_loss",
        OnlineOptions,
        checks,
        terms.online_iqlearn,
        logits,
        labels,
        given,
        return_metrics,
        is_expert,
    )
    return loss_of(call, checks.parallel, logits, labels)
