"""Log-probabilities and entropies for reinforcement learning, under the names of its trainers.

Each module serves the project that it names, with functions that have the arguments and results of
the project's own. They are put in the place of those by a few lines, which are printed by::

    python -m irl_ops.integrations.rl trl

They compute what ``token_stats`` and ``linear_token_stats`` do: one read of the logits, or none
stored, and gradients to match. These hold for all of them:

- Log-probabilities and entropies are float32 (of float64 logits, float64), where some of the
  originals round them to the dtype of the logits.
- A label of -100 is none: its log-probability is 0 and has no gradient. Any other one out of range
  raises IndexError on a CPU, and is NaN elsewhere.
- Nothing is written into the logits.

Tunix, which is of JAX, is served by ``irl_ops.integrations.rl_jax``.
"""

from irl_ops.integrations.rl.nemo_rl import (
    from_parallel_hidden_states_to_logprobs,
    from_parallel_logits_to_logprobs,
)
from irl_ops.integrations.rl.openrlhf import compute_entropy, log_probs_from_logits
from irl_ops.integrations.rl.slime import calculate_log_probs_and_entropy
from irl_ops.integrations.rl.trl import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from irl_ops.integrations.rl.verl import (
    FusedLinearForPPO,
    linear_cross_entropy,
    logprobs_from_logits,
)

__all__ = [
    "ChunkedLogProbFunction",
    "FusedLinearForPPO",
    "calculate_log_probs_and_entropy",
    "compute_entropy",
    "entropy_from_logits",
    "from_parallel_hidden_states_to_logprobs",
    "from_parallel_logits_to_logprobs",
    "linear_cross_entropy",
    "log_probs_from_logits",
    "logprobs_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
