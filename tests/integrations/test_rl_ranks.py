"""The functions under the names of RL trainers, over two processes that share the vocabulary."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from irl_ops.integrations.rl import nemo_rl, slime, verl
from irl_ops.torch import sft, token_stats

from ..launch import launch

V, RANKS = 60, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums over the columns in another order


def results(part: slice, group: Any) -> dict[str, Any]:
    """What each function returns, and the gradients by its inputs; of all columns, or a part."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 6, V)
    hidden, weight = torch.randn(12, 6), torch.randn(V, 6)
    tokens, states = torch.randint(V, (2, 6)), torch.randn(6, 2, 6)
    keep = torch.rand(6, V) < 0.5
    above = torch.randn(12)
    start, stop, _ = part.indices(V)
    shared = {"vocab_group": group} if group else {}

    likely = logits[:1, :5].argmax(-1).roll(1, -1)

    def run(function: Any, *leaves: torch.Tensor, **options: Any) -> Any:
        leaves = tuple(x.clone().requires_grad_() for x in leaves)
        outputs = [x for x in function(*leaves, **options) if x is not None]
        total = sum((x.reshape(-1) * above[: x.numel()]).sum() for x in outputs)
        return [x.detach() for x in outputs], torch.autograd.grad(total, leaves)

    whole = logits[..., part]
    return {
        "slime": run(
            lambda x: slime.calculate_log_probs_and_entropy(x, tokens[0], group, True), whole[0]
        ),
        "verl": run(
            lambda h, w: verl.linear_cross_entropy(h, w, tokens, 0.7, "none", group),
            hidden, weight[part],
        ),
        "nemo_rl": run(
            lambda x: [
                nemo_rl.from_parallel_logits_to_logprobs(x, tokens, start, stop, group)
            ],
            whole,
        ),
        **{
            f"nemo_rl, {top_k}, {top_p}": run(
                # rows that no number of ranks divides; the likeliest token can always be drawn
                lambda x, **drawn: [
                    nemo_rl.from_parallel_logits_to_logprobs(
                        x, likely, start, stop, group, sampling_params=SimpleNamespace(**drawn)
                    )
                ],
                whole[:1, :5], top_k=top_k, top_p=top_p,
            )
            for top_k, top_p in ((7, 1.0), (-1, 0.6), (7, 0.6))
        },
        "nemo_rl, hidden": run(
            lambda h, w: [
                nemo_rl.from_parallel_hidden_states_to_logprobs(
                    h, w, False, tokens, start, stop, group, chunk_size=4
                )
            ],
            states.tensor_split(RANKS)[start * RANKS // V] if group else states, weight[part],
        ),
        "dft": run(
            lambda x: [sft.dft_loss(token_stats(x, tokens, **shared), reduction="none")],
            whole,
        ),
        "slime, filtered": run(
            lambda x: slime.calculate_log_probs_and_entropy(
                x, tokens[0], group, True, -1, keep[:, part]
            ),
            whole[0],
        ),
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, width = dist.get_rank(), V // RANKS
    found = results(slice(rank * width, (rank + 1) * width), dist.group.WORLD)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_as_one_process_has_it(tmp_path: Path) -> None:
    launch(__file__, tmp_path, RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name, (outputs, gradients) in results(slice(None), None).items():
        for part in found:
            torch.testing.assert_close(part[name][0], outputs, **CLOSE)
        for i, gradient in enumerate(gradients):
            parts = [part[name][1][i] for part in found]
            sharded = parts[0].shape != gradient.shape  # verl's hidden states are whole everywhere
            axis = 0 if len(gradients) == 2 else -1  # of a weight, or of logits
            joined = torch.cat(parts, axis) if sharded else parts[0]
            torch.testing.assert_close(joined, gradient, **CLOSE)
