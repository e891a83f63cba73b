"""The scalar algebra of a loss, around the row kernel: ``irl_ops.algebra`` in Triton.

Traffic: O(rows), in four launches without a host in between: ``rows`` and ``coefficients`` before
the row kernel, ``residuals`` and ``totals`` behind it. Operation by operation it would be eighty.

Arrays are flat, [n] = [B * T]; a neighbour of row i is i - 1 or i + 1 where T lets it be one.
Numbers such as lam come as floats, or as pointers (LOADED) to what lies on the device. Sums go
block by block and are added up in one order, so that the same call gives the same bits.
"""

import triton
import triton.language as tl

from irl_ops.kernels.triton.softmax import INF, exp

IGNORED, TERMINAL, BOOTSTRAP, NO_TD = (tl.constexpr(kind) for kind in range(4))
NO_LABEL, BAD_LABEL = tl.constexpr(-1), tl.constexpr(2**31 - 1)


# --- Before the row kernel ---


@triton.jit(do_not_specialize=["n", "length", "vocab", "ignore_index"])
def rows(
    given, where, segment_ids, position_ids, truncated, is_expert, token_weights,
    n, length, vocab, ignore_index,
    labels, kinds, weights, partial,
    SHIFT: tl.constexpr, EOS: tl.constexpr, BOUNDARY: tl.constexpr,  # "terminal", ...
    WHERE: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr, WEIGHTS: tl.constexpr,
    TRUNCATED: tl.constexpr, EXPERT: tl.constexpr,  # 0 absent, 1 one a sequence, 2 one a row
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Aligned labels, kinds, weights of the labelled rows; the weights' sums, block by block."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    label, labelled, has_next = _labelled(
        i, given, where, segment_ids, position_ids, n, length, ignore_index,
        SHIFT, WHERE, SEGMENTS, POSITIONS,
    )  # fmt: skip
    _, next_labelled, _ = _labelled(
        i + 1, given, where, segment_ids, position_ids, n, length, ignore_index,
        SHIFT, WHERE, SEGMENTS, POSITIONS,
    )  # fmt: skip

    onward = tl.where(has_next, BOOTSTRAP, NO_TD)
    kind = tl.full((BLOCK,), NO_TD, tl.int32)
    if len(EOS) > 0 or BOUNDARY == "bootstrap":
        kind = onward
    elif BOUNDARY == "terminal":
        kind = tl.full((BLOCK,), TERMINAL, tl.int32)
    if TRUNCATED:
        place = i // length if TRUNCATED == 1 else i
        kind = tl.where(tl.load(truncated + place, inside, 0) != 0, onward, kind)
    kind = tl.where(has_next & next_labelled, BOOTSTRAP, kind)
    for k in tl.static_range(len(EOS)):
        kind = tl.where(label == EOS[k], TERMINAL, kind)
    kind = tl.where(labelled, kind, IGNORED)
    in_range = (label >= 0) & (label < vocab)
    label = tl.where(labelled, tl.where(in_range, label, BAD_LABEL), NO_LABEL)
    tl.store(labels + i, label.to(tl.int64), inside)
    tl.store(kinds + i, kind.to(tl.int8), inside)

    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTS:
        weight = tl.load(token_weights + i, inside, 0.0).to(tl.float32)
    weight = tl.where(labelled & inside, weight, 0.0)
    tl.store(weights + i, weight, inside)
    place = partial + tl.program_id(0)
    if EXPERT:
        flag = i // length if EXPERT == 1 else i
        expert = tl.load(is_expert + flag, inside, 0) != 0
        tl.store(place, tl.sum(tl.where(expert, weight, 0.0), 0))
        tl.store(place + tl.num_programs(0), tl.sum(tl.where(expert, 0.0, weight), 0))
    else:
        tl.store(place, tl.sum(weight, 0))


@triton.jit
def _labelled(
    i, given, where, segment_ids, position_ids, n, length, ignore_index,
    SHIFT: tl.constexpr, WHERE: tl.constexpr, SEGMENTS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """``(label, labelled, has_next)`` of the rows i, of which some may lie outside."""
    inside = i < n
    has_next = inside & (i % length + 1 < length)
    if SEGMENTS:
        here = tl.load(segment_ids + i, has_next, 0)
        has_next = has_next & (tl.load(segment_ids + i + 1, has_next, 0) == here)
    if POSITIONS:
        here = tl.load(position_ids + i, has_next, 0)
        has_next = has_next & (tl.load(position_ids + i + 1, has_next, 0) == here + 1)
    if SHIFT:
        label = tl.load(given + i + 1, has_next, 0).to(tl.int64)
        labelled = has_next & (label != ignore_index)
    else:
        label = tl.load(given + i, inside, 0).to(tl.int64)
        labelled = inside & (label != ignore_index)
    if WHERE:
        labelled = labelled & (tl.load(where + i, inside, 0) != 0)
    return label, labelled, has_next


@triton.jit(do_not_specialize=["n", "length", "blocks"])
def coefficients(
    kinds, weights, is_expert, label_logit, values, next_values, partial,
    lam, gamma, alpha_mix, entropy_coef, expert_items, agent_items,
    n, length, blocks,
    mle, td, alpha, beta, entropy_weight,
    TD: tl.constexpr, EXPERT: tl.constexpr, MEAN: tl.constexpr, ITEMS: tl.constexpr,
    VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr, DETACH: tl.constexpr, ENTROPY: tl.constexpr,
    LOADED: tl.constexpr,  # bits: which of the six numbers are pointers
    BLOCK: tl.constexpr,
):  # fmt: skip
    """m and d of every row, and the affine coefficients of its gradient; UNREAD as alpha = -inf."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    lam, gamma = _number(lam, LOADED & 1), _number(gamma, LOADED & 2)
    alpha_mix, entropy_coef = _number(alpha_mix, LOADED & 4), _number(entropy_coef, LOADED & 8)
    expert_total, agent_total = 1.0, 1.0
    if MEAN:
        if ITEMS:
            expert_total = _number(expert_items, LOADED & 16)
            agent_total = _number(agent_items, LOADED & 32)
        else:
            expert_total = _sum(partial, blocks)
            if EXPERT:
                agent_total = _sum(partial + blocks, blocks)
    kind = tl.load(kinds + i, inside, 0)
    m, d = _weights_of(
        i, inside, kind, weights, is_expert, length, lam, alpha_mix, expert_total, agent_total,
        TD, EXPERT,
    )  # fmt: skip
    tl.store(mle + i, m, inside)
    if ENTROPY:
        tl.store(entropy_weight + i, entropy_coef * m, inside)
    before = inside & (i % length != 0)
    kind_before = tl.load(kinds + i - 1, before, 0)
    onto = before & (kind_before == BOOTSTRAP)  # row i - 1 bootstraps from row i
    a, b = m, tl.zeros((BLOCK,), tl.float32)
    if TD:
        tl.store(td + i, d, inside)
        if VALUES:
            q = tl.load(values + i, inside, 0.0).to(tl.float32)
            ahead = _next_value(i, inside, kind, values, next_values, n, NEXT_VALUES)
            q += tl.load(label_logit + i, inside, 0.0) - gamma * ahead
            a, b = m - 2 * d * tl.where(d != 0.0, q, 0.0), 2 * d
        elif not (NEXT_VALUES or DETACH):
            _, d_before = _weights_of(
                i - 1, onto, kind_before, weights, is_expert, length, lam, alpha_mix,
                expert_total, agent_total, TD, EXPERT,
            )  # fmt: skip
            d_before = tl.where(onto, d_before, 0.0)
            picked = tl.load(label_logit + i - 1, before, 0.0)
            picked = tl.where(d_before != 0.0, picked, 0.0)
            a, b = m - 2 * gamma * d_before * picked, 2 * gamma * gamma * d_before
    needed = (kind != IGNORED) | onto
    tl.store(alpha + i, tl.where(needed, a, -INF), inside)
    tl.store(beta + i, b, inside)


@triton.jit
def _weights_of(
    i, inside, kind, weights, is_expert, length, lam, alpha_mix, expert_total, agent_total,
    TD: tl.constexpr, EXPERT: tl.constexpr,
):  # fmt: skip
    """``(m, d)``: the objectives of the algebra, by what is there of them."""
    weight = tl.load(weights + i, inside, 0.0)
    m, d = _share(weight, expert_total), tl.zeros_like(weight)
    if TD and not EXPERT:
        d = lam * m
    if EXPERT:
        place = i // length if EXPERT == 1 else i
        expert = tl.load(is_expert + place, inside, 0) != 0
        m = tl.where(expert, m, 0.0)
        agent = tl.where(expert, 0.0, _share(weight, agent_total))
        rest = 1 - alpha_mix
        d = lam / rest * m + lam * alpha_mix / (rest * rest) * agent
    return m, tl.where((kind == TERMINAL) | (kind == BOOTSTRAP), d, 0.0)


@triton.jit
def _share(weight, total):
    return tl.where(total != 0.0, weight / tl.where(total != 0.0, total, 1.0), 0.0)


@triton.jit
def _next_value(i, inside, kind, values, next_values, n, NEXT_VALUES: tl.constexpr):
    """V' where it is given by the caller."""
    if NEXT_VALUES:
        ahead = tl.load(next_values + i, inside, 0.0).to(tl.float32)
    else:
        ahead = tl.load(values + i + 1, i + 1 < n, 0.0).to(tl.float32)
    return tl.where(kind == BOOTSTRAP, ahead, 0.0)


@triton.jit
def _number(x, LOADED: tl.constexpr):
    if LOADED:
        number = tl.load(x).to(tl.float32)
    else:
        number = x
    return number


@triton.jit
def _sum(partial, blocks):
    """Of a row of partial sums."""
    total = 0.0
    for start in tl.range(0, blocks, 1024):
        k = start + tl.arange(0, 1024)
        total += tl.sum(tl.load(partial + k, k < blocks, 0.0), 0)
    return total


# --- Behind the row kernel ---


@triton.jit(do_not_specialize=["n", "length"])
def residuals(
    labels, kinds, row_max, logsum, label_logit, entropy, mle, td, alpha, beta, entropy_weight,
    values, next_values, gamma, entropy_coef, n, length,
    elements, dvalues, dnext_values, partial,
    TD: tl.constexpr, VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr, DETACH: tl.constexpr,
    ENTROPY: tl.constexpr, LOADED: tl.constexpr,  # bits: gamma, entropy_coef
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The labels' gradient elements, the gradients of values, and sums of losses and metrics."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    gamma, entropy_coef = _number(gamma, LOADED & 1), _number(entropy_coef, LOADED & 2)
    kind = tl.load(kinds + i, inside, 0)
    labelled = kind != IGNORED
    m = tl.load(mle + i, inside, 0.0)
    value = tl.load(row_max + i, inside, 0.0) + tl.load(logsum + i, inside, 0.0)
    logprob = _logprob(i, inside, labels, row_max, logsum, label_logit)

    a, b, h = tl.load(alpha + i, inside, 0.0), 0.0, 0.0
    weight = tl.load(beta + i, inside, 0.0)
    a += weight * tl.where(weight != 0.0, value, 0.0)
    if ENTROPY:
        b, h = tl.load(entropy_weight + i, inside, 0.0), tl.load(entropy + i, inside, 0.0)
        a += b * tl.where(b != 0.0, h, 0.0)
    reward, u, d = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    if TD:
        reward, u, d = _residual(
            i, inside, labels, kinds, row_max, logsum, label_logit, td, values, next_values,
            gamma, n, VALUES, NEXT_VALUES,
        )  # fmt: skip
        back = tl.where(kind == BOOTSTRAP, -gamma * u, 0.0)
        if DETACH:
            back = tl.zeros_like(back)
        if NEXT_VALUES:
            tl.store(dnext_values + i, back, inside)
        if VALUES:
            slope = u
            if not (NEXT_VALUES or DETACH):
                before = inside & (i % length != 0)
                _, u_before, _ = _residual(
                    i - 1, before, labels, kinds, row_max, logsum, label_logit, td, values,
                    next_values, gamma, n, VALUES, NEXT_VALUES,
                )  # fmt: skip
                onto = before & (tl.load(kinds + i - 1, before, 0) == BOOTSTRAP)
                slope += tl.where(onto, -gamma * u_before, 0.0)
            tl.store(dvalues + i, slope, inside)
    tl.store(elements + i, _label_gradient(a, b, u - m, logprob, ENTROPY), inside)

    weighted = m != 0.0
    loss = -m * tl.where(weighted, logprob, 0.0)
    if ENTROPY:
        loss -= m * entropy_coef * tl.where(weighted, h, 0.0)
    delta = tl.where(d != 0.0, reward, 0.0)
    loss += d * delta * delta
    if VALUES:
        value = tl.load(values + i, inside, 0.0).to(tl.float32)
    has_td = (kind == TERMINAL) | (kind == BOOTSTRAP)
    place, step = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(place, tl.sum(tl.where(inside, loss, 0.0), 0))
    tl.store(place + step, tl.sum(tl.where(labelled, -logprob, 0.0), 0))
    tl.store(place + 2 * step, tl.sum(tl.where(labelled, value, 0.0), 0))
    tl.store(place + 3 * step, tl.sum(tl.where(labelled, h, 0.0), 0))
    tl.store(place + 4 * step, tl.sum(tl.where(has_td, reward * reward, 0.0), 0))
    tl.store(place + 5 * step, tl.sum(tl.where(has_td, reward, 0.0), 0))
    tl.store(place + 6 * step, tl.sum(labelled.to(tl.float32), 0))
    tl.store(place + 7 * step, tl.sum(has_td.to(tl.float32), 0))


@triton.jit
def _logprob(i, inside, labels, row_max, logsum, label_logit):
    logprob = tl.load(label_logit + i, inside, 0.0) - tl.load(row_max + i, inside, 0.0)
    logprob -= tl.load(logsum + i, inside, 0.0)
    return tl.where(tl.load(labels + i, inside, NO_LABEL) != NO_LABEL, logprob, 0.0)


@triton.jit
def _residual(
    i, inside, labels, kinds, row_max, logsum, label_logit, td, values, next_values, gamma, n,
    VALUES: tl.constexpr, NEXT_VALUES: tl.constexpr,
):  # fmt: skip
    """``(delta, u, d)`` of the rows i."""
    kind = tl.load(kinds + i, inside, 0)
    q = tl.load(label_logit + i, inside, 0.0)
    if VALUES:
        q = tl.load(values + i, inside, 0.0).to(tl.float32)
        q += _logprob(i, inside, labels, row_max, logsum, label_logit)
    if VALUES or NEXT_VALUES:
        ahead = _next_value(i, inside, kind, values, next_values, n, NEXT_VALUES)
    else:
        there = inside & (i + 1 < n)
        ahead = tl.load(row_max + i + 1, there, 0.0) + tl.load(logsum + i + 1, there, 0.0)
        ahead = tl.where(kind == BOOTSTRAP, ahead, 0.0)
    reward = tl.where((kind == TERMINAL) | (kind == BOOTSTRAP), q - gamma * ahead, 0.0)
    d = tl.load(td + i, inside, 0.0)
    return reward, 2 * d * tl.where(d != 0.0, reward, 0.0), d


@triton.jit
def _label_gradient(a, b, c, logprob, ENTROPY: tl.constexpr):
    """p (A + B log p) + C, with expm1 so that the A - A of a confident row cancels exactly."""
    live = a != 0.0
    if ENTROPY:
        live = live | (b != 0.0)
    x = tl.where(live, logprob, 0.0)
    element = a * _expm1(x) + (a + c)
    if ENTROPY:
        element += b * exp(x) * tl.where(x > -INF, x, 0.0)
    return tl.where(live, element, c)


@triton.jit
def _expm1(x):
    """For x up to 0, or a little above by rounding: the first eight terms of its series near 0."""
    series = 1 + x / 8
    for k in tl.static_range(6):
        series = 1 + series * x / (7 - k)
    return tl.where(x > -0.5, series * x, exp(x) - 1)


@triton.jit(do_not_specialize=["blocks"])
def totals(partial, blocks, out):
    """Loss, nll, value, entropy, td, reward, tokens: one program adds the partial sums up."""
    tl.store(out, _sum(partial, blocks))
    tokens, with_td = _sum(partial + 6 * blocks, blocks), _sum(partial + 7 * blocks, blocks)
    for k in tl.static_range(1, 6):
        count = tokens if k < 4 else with_td
        mean = _sum(partial + k * blocks, blocks) / tl.where(count > 0.0, count, 1.0)
        tl.store(out + k, mean)
    tl.store(out + 6, tokens)
