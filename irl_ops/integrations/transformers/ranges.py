"""The names under which the parts of a trainer show in a profile of ``torch.profiler``.

Ranges of them may lie in one another: that of the policy's forward holds the loss of its logits.
Without a profiler one costs a few microseconds.
"""

from __future__ import annotations

SAMPLING = "irl_ops.sampling"  # the sampler, with all that it calls
POLICY = "irl_ops.policy"  # a forward of the policy, with the loss of its logits
INITIAL_POLICY = "irl_ops.initial_policy"
CRITIC = "irl_ops.critic"
DISCRIMINATOR = "irl_ops.discriminator"
LOSS = "irl_ops.loss"  # from logits, or hidden states, to a loss or the statistics of tokens
