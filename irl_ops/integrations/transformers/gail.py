"""GAIL (A.1.3): a policy that is paid for what a discriminator takes for a demonstration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from irl_ops import algebra
from irl_ops.integrations.transformers.adversary import Adversaries, train_all_adapters
from irl_ops.integrations.transformers.episodes import IGNORED_LABEL, batch_of, plain, scored
from irl_ops.integrations.transformers.gail_arguments import GAILArguments
from irl_ops.integrations.transformers.model import transformers_model
from irl_ops.integrations.transformers.ranges import (
    CRITIC,
    DISCRIMINATOR,
    LOSS,
    POLICY,
)
from irl_ops.integrations.transformers.sampled import SampledTrainer
from irl_ops.integrations.transformers.sampling import Sampler
from irl_ops.schedules import warmup_ramp

Batch = dict[str, Tensor]
WEIGHTS = "adversaries.safetensors"


class GAILTrainer(SampledTrainer):
    """Trains a language model by GAIL; start from one that was trained by maximum likelihood.

    Before an update the policy answers prompts of demonstrations. A sampled token is paid
    ``softplus(D)``, D being the discriminator's logit behind it; the critic's values make
    generalised advantages of that. One step then updates three networks: the policy by A2C or PPO,
    with the KL to the initial policy; the critic by squared error; the discriminator by
    cross-entropy. No parameter of one has a gradient from another's loss, and the samples are those
    of the policy before the step: it is what updating the discriminator after the policy would do.

    The KL is ``(log pi - log pi_0)^2 / 2`` of sampled tokens: for samples of the policy, its
    gradient is that of KL(pi || pi_0) on average. Means are over the sampled tokens, or the
    demonstrated ones, of the whole update over all processes. Evaluation computes the NLL.

    Args:
        model: a Transformers model that generates, or a PEFT model around one, whose trunk critic
            and discriminator then share, with adapters of their own.
        args: ``GAILArguments``.
        sampler: what generates answers; None: ``GenerateSampler``.
        **kwargs: as for the Trainer; ``train_dataset`` as for ``OnlineIQLearnTrainer``.

    Raises:
        ValueError: arguments of another loss, a model without an end token, a batch that holds
            more than tokens, their mask and labels; gradient checkpointing with PEFT.
        NotImplementedError: as ``Reader``.
    """

    args: GAILArguments

    def __init__(
        self, model: Any, args: GAILArguments, *, sampler: Sampler | None = None, **kwargs: Any
    ) -> None:
        reference = max(args.kl_initial, args.kl_final) > 0
        networks = Adversaries(model, args.fused_linear, reference)
        super().__init__(networks, args, sampler=sampler, **kwargs)
        self.rollout: list[Batch] = []

    def networks(self) -> Adversaries:
        """Without what wraps them."""
        networks: Adversaries = self.accelerator.unwrap_model(self.model)
        return networks

    def policy(self) -> torch.nn.Module:
        """See ``SampledTrainer``."""
        policy: torch.nn.Module = self.networks().policy
        return policy

    def policy_model(self) -> Any:
        """See ``SampledTrainer``."""
        return transformers_model(self.policy())

    @contextmanager
    def _with_policy(self) -> Iterator[None]:
        """While it lasts, the Trainer takes the policy for its model."""
        networks, self.model = self.model, self.policy()
        try:
            yield
        finally:
            self.model = networks

    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        # inside the forward of all networks, in which FSDP has gathered what is in no layer
        found: list[list[int]] = cast(Any, self.model)(
            lambda networks: self.sampler.sample(networks.policy, prompts)
        )
        return found

    def _set_signature_columns_if_needed(self) -> None:
        with self._with_policy():
            super()._set_signature_columns_if_needed()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """That of the policy."""
        with self._with_policy():
            super().create_model_card(*args, **kwargs)

    def kl_weight(self) -> float:
        """That of the update that comes."""
        args = self.args
        value: float = warmup_ramp(
            self.state.global_step,
            lam=args.kl_initial,
            warmup_steps=0,
            anneal_start=0,
            anneal_steps=args.kl_anneal_steps,
            final=args.kl_final,
        )
        return value

    # ---------------------------------------------------------------------------------------------
    # Before an update: samples, what they are paid, and their advantages
    # ---------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of an update, and the counts of their demonstrated, sampled tokens."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [plain(batch) for batch in batches]
        if not batches:
            return batches, None
        sizes = [self.args.agent_batch_size or len(batch["labels"]) for batch in batches]
        fresh = self.state.global_step % self.args.updates_per_rollout == 0
        if fresh or len(self.rollout) < len(batches):
            self.rollout = self._roll_out(sizes, device)
        joined = [
            {**expert, "agent": agent} for expert, agent in zip(batches, self.rollout, strict=False)
        ]
        shift = not self.encoder_decoder
        counts = torch.stack(
            [
                torch.stack([scored(x["labels"], shift).to(device) for x in (b, b["agent"])])
                for b in joined
            ]
        ).sum(0)
        return joined, self.over_ranks(counts)

    def _roll_out(self, sizes: list[int], device: Any) -> list[Batch]:
        args = self.args
        count = int(self.over_ranks(torch.tensor(sum(sizes))))
        own = iter(self.sample(count)[args.process_index :: args.world_size])
        rollout = []
        for size in sizes:
            chosen = [episode for _, episode in zip(range(size), own, strict=False)]
            batch = batch_of(chosen, self.pad, self.ends, self.encoder_decoder)
            rollout.append({k: x.to(device) for k, x in batch.items()})
        networks = self.networks()
        training = networks.training
        networks.eval()
        whole = cast(Any, self.model)  # as FSDP wraps it
        with torch.no_grad(), self.accelerator.autocast():
            for batch in rollout:
                batch |= whole(lambda networks, batch=batch: self._judged(networks, batch))
        networks.train(training)
        with record_function(LOSS):
            self._rescale(rollout)
        return rollout

    def _judged(self, networks: Adversaries, batch: Batch) -> Batch:
        """log pi, log pi_0, advantages and returns of sampled rows, and what they were paid."""
        inputs = self._inputs(batch)
        stats = self._stats(networks.policy, inputs, batch["labels"])
        value = self._values(networks, inputs, stats.kind.shape[-1])
        reward = F.softplus(self._discriminate(networks, batch))
        with record_function(LOSS):
            used = algebra.has_td(stats.kind)
            boots = stats.kind == algebra.BOOTSTRAP
            ahead = torch.where(boots, algebra.following(xp, value, 0.0), 0.0)
            follows = boots & algebra.following(xp, used, False)
            value, reward = torch.where(used, value, 0.0), torch.where(used, reward, 0.0)
            gained = algebra.advantages(
                xp, reward, value, ahead, follows, self.args.gamma, self.args.gae_lambda
            )
        judged = {"old_logprob": stats.logprob, "advantage": gained, "returns": gained + value}
        if self.kl_weight() > 0:
            judged["initial_logprob"] = networks.initial(inputs, self._logprob(batch["labels"]))
        return judged | {"used": used, "reward": reward}

    def _rescale(self, rollout: list[Batch]) -> None:
        """Divides the advantages by their root mean square over all samples of the update."""
        if self.args.advantages == "raw":
            return
        count = self.over_ranks(torch.stack([b["used"].sum() for b in rollout]).sum())
        if self.args.advantages == "whitened":
            mean = (
                self.over_ranks(torch.stack([b["advantage"].sum() for b in rollout]).sum()) / count
            )
            for b in rollout:
                b["advantage"] = torch.where(b["used"], b["advantage"] - mean, 0.0)
        squares = torch.stack([b["advantage"].square().sum() for b in rollout]).sum()
        # where all are equal, as before the discriminator knows anything, no noise is blown up
        scale = (self.over_ranks(squares) / count).sqrt() + 1e-5
        for b in rollout:
            b["advantage"] = b["advantage"] / scale

    # ---------------------------------------------------------------------------------------------
    # The update
    # ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of all networks on a micro-batch; without samples, the policy's NLL."""
        if "agent" not in inputs:
            return self._evaluated(model, inputs, return_outputs)
        agent, items = inputs["agent"], num_items_in_batch.float()
        expert = {k: x for k, x in inputs.items() if k != "agent"}
        with self.accelerator.autocast():
            loss, metrics = model(lambda networks: self._losses(networks, expert, agent, items))
        self.running[True]._record(metrics)
        return loss * self.accelerator.num_processes  # DDP and FSDP take means of gradients

    def _losses(
        self, networks: Adversaries, expert: Batch, agent: Batch, items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args, used, tokens = self.args, agent["used"], agent["used"].sum()

        def mean(x: Tensor, rows: Tensor, count: Tensor) -> Tensor:
            return torch.where(rows, x, 0.0).sum() / count

        inputs = self._inputs(agent)
        stats = self._stats(networks.policy, inputs, agent["labels"], args.entropy_coef != 0)
        value = self._values(networks, inputs, used.shape[-1])
        d_agent = self._discriminate(networks, agent)
        d_expert = self._discriminate(networks, expert)
        nll = self._nll(networks.policy, expert) if args.mle_weight else None
        with record_function(LOSS):
            terms = algebra.policy_rows(
                xp,
                stats.logprob,
                agent["old_logprob"],
                agent["advantage"],
                args.clip if args.algorithm == "ppo" else None,
            )
            metrics = {"policy_loss": terms}
            if args.entropy_coef:
                terms = terms - args.entropy_coef * stats.entropy
                metrics["entropy"] = stats.entropy
            if "initial_logprob" in agent:
                apart = stats.logprob - agent["initial_logprob"]
                terms = terms + self.kl_weight() * apart**2 / 2
                metrics["kl"] = apart
            wrong = (value - agent["returns"]) ** 2 / 2
            demonstrated = self._aligned(expert["labels"]) != IGNORED_LABEL
            metrics |= {
                "value_loss": wrong,
                "reward": agent["reward"],
                "caught": (d_agent < 0).float(),
            }
            found = {k: mean(x.detach(), used, tokens.clamp(min=1)) for k, x in metrics.items()}
            loss = mean(terms + wrong + F.softplus(d_agent), used, items[1])
            loss = loss + mean(F.softplus(-d_expert), demonstrated, items[0])
            if nll is not None:
                loss = loss + args.mle_weight * mean(nll, demonstrated, items[0])
        return loss, found | {"tokens": tokens.float()}

    def _evaluated(self, model: Any, inputs: Batch, return_outputs: bool) -> Any:
        labels = inputs["labels"]
        shift = not self.encoder_decoder

        def read(readout: Any) -> Any:
            loss, metrics = readout("mle_loss", labels, shift=shift, return_metrics=True)
            stored = return_outputs and isinstance(readout.logits, Tensor)
            return loss, metrics, readout.logits if stored else None

        rest = self._inputs(plain(inputs))
        with self.accelerator.autocast(), record_function(POLICY):
            loss, metrics, logits = model(lambda networks: networks.policy(**rest, read=read))
        self.running[False]._record(metrics)
        return (loss, {"logits": logits}) if return_outputs else loss

    # ---------------------------------------------------------------------------------------------
    # Rows: row t scores the aligned label t
    # ---------------------------------------------------------------------------------------------

    def _aligned(self, labels: Tensor) -> Tensor:
        if self.encoder_decoder:
            return labels
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)

    def _inputs(self, batch: Batch) -> Batch:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.encoder_decoder:
            make = self.policy_model().prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = make(labels=batch["labels"])
        return inputs

    def _stats(self, policy: Any, inputs: Batch, labels: Tensor, entropy: bool = False) -> Any:
        options = {
            "shift": not self.encoder_decoder,
            "eos_token_id": self.ends,
            "entropy": entropy,
            "temperature": self.args.temperature,
        }
        with record_function(POLICY):
            return policy(**inputs, read=lambda readout: readout("token_stats", labels, **options))

    def _nll(self, policy: Any, batch: Batch) -> Tensor:
        read = self._logprob(batch["labels"], temperature=1.0)
        with record_function(POLICY):
            logprob: Tensor = policy(**self._inputs(batch), read=read)
        return -logprob

    def _logprob(self, labels: Tensor, temperature: float | None = None) -> Any:
        options = {
            "shift": not self.encoder_decoder,
            "entropy": False,
            "temperature": temperature or self.args.temperature,
        }
        return lambda readout: readout("token_stats", labels, **options).logprob

    def _values(self, networks: Adversaries, inputs: Batch, width: int) -> Tensor:
        with record_function(CRITIC):
            value: Tensor = networks.critic(**inputs)[..., :width]
        return value

    def _discriminate(self, networks: Adversaries, batch: Batch) -> Tensor:
        """D(s_t, a_t): the logit behind the token that row t scores."""
        inputs = self._inputs(batch)
        if self.encoder_decoder:  # one more row, behind the last token
            inputs["decoder_input_ids"] = F.pad(inputs["decoder_input_ids"], (0, 1), value=self.pad)
            last = batch["labels"][:, -1]
            ids = inputs["decoder_input_ids"].clone()
            ids[:, -1] = torch.where(last == IGNORED_LABEL, self.pad, last)
            inputs["decoder_input_ids"] = ids
        with record_function(DISCRIMINATOR):
            scores: Tensor = networks.discriminator(**inputs)[:, 1:]
        return scores if self.encoder_decoder else F.pad(scores, (0, 1))

    # ---------------------------------------------------------------------------------------------
    # Checkpoints: the policy as it saves itself, the others beside it
    # ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """``state_dict`` holds all networks, gathered, where an engine has parted their weights."""
        from safetensors.torch import save_file, save_model

        networks, folder = self.networks(), Path(output_dir or cast(str, self.args.output_dir))
        path = str(folder / WEIGHTS)
        if state_dict is None:
            with self._with_policy():
                super()._save(str(folder))
            if self.args.should_save:
                save_model(networks.beside_policy(), path)
            return
        with self._with_policy():
            super()._save(str(folder), under("policy.", state_dict))
        if self.args.should_save:
            names = networks.beside_policy()
            beside = {
                f"{name}.{key}": x.clone()  # tied weights would share their memory
                for name in names
                for key, x in under(f"{name}.", state_dict).items()
            }
            save_file(beside, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_model

        networks = self.networks()
        if self.is_fsdp_enabled:  # what FSDP saves holds all networks
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, networks.policy)
        if networks.shared:  # PEFT loads adapters that are not in use as frozen ones
            train_all_adapters(networks.policy)
        load_model(networks.beside_policy(), str(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.rollout, Path(output_dir) / f"rollout_{self.args.process_index}.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / f"rollout_{self.args.process_index}.pt"
            if path.is_file():
                self.rollout = torch.load(path, map_location=self.args.device, weights_only=True)


def under(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies in a part of a module."""
    return {
        name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)
    }
