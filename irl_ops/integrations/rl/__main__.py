"""``python -m irl_ops.integrations.rl PROJECT``: the lines that put these functions in place."""

from __future__ import annotations

import sys
import textwrap

LINES = {
    "trl": """
        # before any other part of TRL is imported
        import trl.trainer.utils as trl_utils

        from irl_ops.integrations.rl import trl as irl_trl

        # GRPO, RLOO, DPO, KTO, SFT: what their fused heads call
        trl_utils._ChunkedLogProbFunction = irl_trl.ChunkedLogProbFunction
        # trainers of trl.experimental
        trl_utils.selective_log_softmax = irl_trl.selective_log_softmax
        trl_utils.selective_log_softmax_and_entropy = irl_trl.selective_log_softmax_and_entropy
        trl_utils.entropy_from_logits = irl_trl.entropy_from_logits
        """,
    "verl": """
        # in a module whose name VERL_USE_EXTERNAL_MODULES holds: each worker imports it with verl
        import verl.utils.experimental.torch_functional as verl_fused
        import verl.utils.kernel.linear_cross_entropy as verl_kernel
        import verl.utils.torch_functional as verl_functional

        from irl_ops.integrations.rl import verl as irl_verl

        verl_functional.logprobs_from_logits = irl_verl.logprobs_from_logits
        verl_fused.FusedLinearForPPO = irl_verl.FusedLinearForPPO
        verl_kernel.linear_cross_entropy = irl_verl.linear_cross_entropy
        """,
    "slime": """
        # before slime.backends.megatron_utils.loss is imported
        import slime.utils.ppo_utils as slime_utils

        from irl_ops.integrations.rl import slime as irl_slime

        slime_utils.calculate_log_probs_and_entropy = irl_slime.calculate_log_probs_and_entropy
        """,
    "nemo-rl": """
        # before the loss functions and policies of nemo_rl are imported
        import nemo_rl.distributed.model_utils as nemo_utils

        from irl_ops.integrations.rl import nemo_rl as irl_nemo

        nemo_utils.from_parallel_logits_to_logprobs = irl_nemo.from_parallel_logits_to_logprobs
        nemo_utils.from_parallel_hidden_states_to_logprobs = (
            irl_nemo.from_parallel_hidden_states_to_logprobs
        )
        """,
    "openrlhf": """
        # before openrlhf.models.actor is imported
        import openrlhf.models.utils as openrlhf_utils

        from irl_ops.integrations.rl import openrlhf as irl_openrlhf

        openrlhf_utils.log_probs_from_logits = irl_openrlhf.log_probs_from_logits
        openrlhf_utils.compute_entropy = irl_openrlhf.compute_entropy
        """,
    "tunix": """
        import tunix.rl.common as tunix_common

        from irl_ops.integrations import rl_jax as irl_tunix

        tunix_common.selective_log_softmax = irl_tunix.selective_log_softmax
        """,
}


def main(arguments: list[str]) -> int:
    """Prints the lines for one project; without one, says which there are."""
    if len(arguments) != 1 or arguments[0] not in LINES:
        given = f"{' '.join(arguments)!r} given; " if arguments else ""
        print(f"{given}accepted: one of {', '.join(LINES)}", file=sys.stderr)
        return 2
    print(textwrap.dedent(LINES[arguments[0]]).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
