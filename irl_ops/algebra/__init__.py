"""The mathematics of the losses: scalar algebra on ``[..., T]`` arrays.

Row t of a sequence has logits ``q_t`` in R^V, read as Q-values, and a label ``a_t``::

    V_t      = logsumexp(q_t)                      value
    log pi_t = q_t[a_t] - V_t                      logprob
    H_t      = -sum_j p_j log p_j                  entropy, p = softmax(q_t)
    delta_t  = q_t[a_t] - gamma V'_t               TD residual = extracted reward
    L        = sum_t m_t (-log pi_t - kappa H_t + zeta V_t^2) + d_t delta_t^2

Every loss is a choice of the weights m (``mle``), d (``td``), kappa (``entropy_coef``) and zeta
(``z_loss``); V' follows from the kind of the row. The gradient is p_j (A_t + B_t log p_j) +
C_t 1{j = a_t} with::

    u_t = 2 d_t delta_t
    A_t = m_t (1 + kappa H_t + 2 zeta V_t) - gamma u_{t-1} [row t-1 bootstraps]
        = alpha_t + beta_t V_t + kappa m_t H_t
    B_t = kappa m_t
    C_t = -m_t + u_t

so that a row kernel needs of its neighbour only the scalars alpha and beta, known beforehand.

A call reads *before -> pass -> after*, in stages that have the same names wherever they stand: here
for NumPy, torch and JAX arrays alike (``xp`` being their array_api_compat namespace), in ``cpu/``
in C++ and in ``triton/`` for GPUs::

    before   align         labels, options      -> aligned labels, kinds
             weigh         kinds, terms         -> m, d, kappa, zeta
             coefficients  kinds, m, d, q[a]    -> alpha, beta, kappa m
    pass     row kernels on the logits          -> row statistics, the gradient without its labels
    after    finish        kinds, m, d, statistics -> elements at the labels, residuals, slopes
             total         what was finished    -> loss, metrics

A pass knows kernels and no loss; the stages know no kernel.
"""

from irl_ops.algebra.actor_critic import advantages, policy_rows
from irl_ops.algebra.coefficients import UNREAD, Coefficients, coefficients, given_ahead
from irl_ops.algebra.drive import Finish, Outcome, loss_and_grad
from irl_ops.algebra.finish import (
    Finished,
    Statistics,
    Transition,
    finish,
    head_gradients,
    label_gradient,
    slope_of_value,
    statistics,
    transition,
)
from irl_ops.algebra.measures import aligned_ids, measure_slopes, measured
from irl_ops.algebra.neighbours import NO_EDGE, Edge, following, preceding
from irl_ops.algebra.options import Heads, Sequence, Terms, Weighting
from irl_ops.algebra.rows import (
    BAD_LABEL,
    BOOTSTRAP,
    IGNORED,
    NO_LABEL,
    NO_TD,
    TERMINAL,
    Rows,
    align,
    has_td,
)
from irl_ops.algebra.shards import (
    NO_COLUMN,
    RowStatistics,
    in_order,
    labels_here,
    merge,
    merge_measures,
    no_columns,
    rows_at,
)
from irl_ops.algebra.total import metrics, row_losses, total
from irl_ops.algebra.value_objective import value_objective
from irl_ops.algebra.weights import Objective, weigh

__all__ = [
    "BAD_LABEL",
    "BOOTSTRAP",
    "IGNORED",
    "NO_COLUMN",
    "NO_EDGE",
    "NO_LABEL",
    "NO_TD",
    "TERMINAL",
    "UNREAD",
    "Coefficients",
    "Edge",
    "Finish",
    "Finished",
    "Heads",
    "Objective",
    "Outcome",
    "RowStatistics",
    "Rows",
    "Sequence",
    "Statistics",
    "Terms",
    "Transition",
    "Weighting",
    "advantages",
    "align",
    "aligned_ids",
    "coefficients",
    "finish",
    "following",
    "given_ahead",
    "has_td",
    "head_gradients",
    "in_order",
    "label_gradient",
    "labels_here",
    "loss_and_grad",
    "measure_slopes",
    "measured",
    "merge",
    "merge_measures",
    "metrics",
    "no_columns",
    "policy_rows",
    "preceding",
    "row_losses",
    "rows_at",
    "slope_of_value",
    "statistics",
    "total",
    "transition",
    "value_objective",
    "weigh",
]
