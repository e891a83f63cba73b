"""GAILTrainer against float64 autograd, in what it learns, and when it is resumed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers", reason="needs transformers")

from transformers import TrainerCallback

from irl_ops.integrations.transformers import GAILArguments, GAILTrainer

from .tiny_systems import EOS, Canned, answers_of, arguments, collate, whole
from .tiny_transformers import assert_one_step, examples, llama, parameters, t5

GAMMA, DECAY, KL, MLE, CLIP = 0.9, 0.8, 0.3, 0.5, 0.05
ADAPTERS = ("default", "critic", "discriminator")
TERMS = {"gamma": GAMMA, "gae_lambda": DECAY, "kl_initial": KL, "mle_weight": MLE}


def gail(model, data, tmp_path, *, sampler=None, cls=GAILTrainer, **changed):
    args = arguments(GAILArguments, tmp_path, **changed)
    return cls(model, args, sampler=sampler, train_dataset=data, data_collator=collate)


def spread(networks):
    """Networks that differ: heads that say something, and a policy that has left its start."""
    torch.manual_seed(1)
    for scorer in (networks.critic, networks.discriminator):
        head = scorer.head if networks.shared else scorer.model.get_output_embeddings()
        nn.init.normal_(head.weight)
    for name, parameter in networks.policy.named_parameters():
        if parameter.requires_grad and "critic" not in name and "discriminator" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def scores(networks, name, prompt, answer):
    """The numbers of a scorer's rows: that before each token, and that behind the last."""
    scorer = getattr(networks, name)
    if not networks.shared:
        return whole(scorer.model, prompt, answer)[:, 0]
    networks.policy.set_adapter(name)
    ids = torch.tensor([prompt + answer])
    hidden = networks.policy.get_base_model().model(ids).last_hidden_state
    networks.policy.set_adapter("default")
    return scorer.head(hidden)[0, len(prompt) - 1 :, 0]


def initial(networks, prompt, answer):
    if not networks.shared:
        return whole(networks.reference, prompt, answer)
    with networks.policy.disable_adapter():
        return whole(networks.policy, prompt, answer)


def paid(networks, prompt, answer):
    """log pi, advantages and returns of an answer's tokens, as those networks see them."""
    q = whole(networks.policy, prompt, answer)[:-1]
    logp = q.log_softmax(-1)[range(len(answer)), answer]
    value = scores(networks, "critic", prompt, answer)
    reward = F.softplus(scores(networks, "discriminator", prompt, answer)[1:])
    gained, behind = [], 0.0
    for t in reversed(range(len(answer))):
        ahead = 0.0 if answer[t] == EOS else value[t + 1].item()
        delta = reward[t].item() + GAMMA * ahead - value[t].item()
        behind = delta + GAMMA * DECAY * behind
        gained.insert(0, behind)
    gained = torch.tensor(gained).double()
    return logp.detach(), gained, gained + value[:-1].detach()


def reference(networks, demonstrations, episodes, scale, algorithm="a2c", old=None):
    """A.1.3, token by token; ``old`` are the networks when the episodes were sampled."""
    judged = [paid(old or networks, *episode) for episode in episodes]
    logp_old, gained, returns = (torch.cat(x) for x in zip(*judged, strict=True))
    if scale != "raw":
        moved = gained - gained.mean() if scale == "whitened" else gained
        gained = moved / (moved.square().mean().sqrt() + 1e-5)
    played = []
    for prompt, answer in episodes:
        q, q0 = whole(networks.policy, prompt, answer), initial(networks, prompt, answer)
        picked = range(len(answer)), answer
        logp, logp0 = q[:-1].log_softmax(-1)[picked], q0[:-1].log_softmax(-1)[picked]
        value = scores(networks, "critic", prompt, answer)[:-1]
        played.append((logp, logp0, value, scores(networks, "discriminator", prompt, answer)[1:]))
    logp, logp0, value, d = (torch.cat(x) for x in zip(*played, strict=True))
    policy = -gained * logp
    if algorithm == "ppo":
        ratio = (logp - logp_old).exp()
        policy = -torch.minimum(ratio * gained, ratio.clamp(1 - CLIP, 1 + CLIP) * gained)
    loss = (policy + KL * (logp - logp0.detach()) ** 2 / 2).mean()
    loss = loss + ((value - returns) ** 2 / 2).mean() + F.softplus(d).mean()
    d_expert, nll = [], []
    for prompt, answer in demonstrations:
        d_expert.append(scores(networks, "discriminator", prompt, answer)[1:])
        logits = whole(networks.policy, prompt, answer)[:-1]
        nll.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return loss + F.softplus(-torch.cat(d_expert)).mean() + MLE * torch.cat(nll).mean()


def adapted():
    """One trunk for all; adapters that are nowhere 0."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {}),
        (adapted, {}),
        (adapted, {"fused_linear": True}),
        (llama, {"fused_linear": True, "advantages": "whitened", "algorithm": "ppo"}),
        (t5, {"advantages": "raw", "gradient_checkpointing": True}),
    ],
)
def test_an_update_is_that_of_float64_autograd(build, options, tmp_path):
    model = build()
    data, sampler = examples(model), Canned()
    trainer = gail(model, data, tmp_path, sampler=sampler, **TERMS, **options)
    spread(trainer.model)
    exact, before = copy.deepcopy(trainer.model).double(), parameters(trainer.model)
    exact.eval()
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    chosen = options.get("advantages", "scaled"), options.get("algorithm", "a2c")
    loss = reference(exact, answers_of(data, model), sampler.episodes, *chosen)
    for name, parameter in exact.named_parameters():
        parameter.requires_grad_(name in trainable)
    loss.backward()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)  # rounded for the log
    gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in gradients} == {"policy", "critic", "discriminator"}
    if trainer.model.shared:
        assert {name.split(".")[-2] for name in gradients} == {*ADAPTERS, "head"}
        assert all(".lora_" in name or ".head." in name for name in trainable)
    assert_one_step(trainer.model, before, gradients)
    assert {"policy_loss", "value_loss", "kl", "reward", "caught", "answer_length"} <= set(logged)
    assert trainer.model.shared or trainer.model.reference.training is False


class Keep(TrainerCallback):
    """Copies of the networks as they were before each update."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.kept = [*getattr(self, "kept", []), copy.deepcopy(model).double().eval()]


def test_ppo_goes_on_with_the_same_samples(tmp_path):
    """The second update: ratios that have left 1, some as far as the clip lets them."""
    model = llama()
    data, sampler, keep = examples(model), Canned(), Keep()
    options = {"algorithm": "ppo", "clip": CLIP, "updates_per_rollout": 2, "max_steps": 2}
    options |= {"learning_rate": 0.05, "kl_anneal_steps": 10**9}
    trainer = gail(model, data, tmp_path, sampler=sampler, **TERMS, **options)
    trainer.add_callback(keep)
    spread(trainer.model)
    trainer.train()
    assert len(sampler.episodes) == len(data)
    old, now = keep.kept
    ratio = torch.cat([paid(now, *x)[0] - paid(old, *x)[0] for x in sampler.episodes]).exp()
    outside = ((ratio - 1).abs() > CLIP).sum()
    assert 0 < outside < len(ratio)
    given = answers_of(data, model), sampler.episodes, "scaled", "ppo"
    for networks, log in zip(keep.kept, trainer.state.log_history, strict=False):
        loss = reference(networks, *given, old=old)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)  # rounded for the log


@pytest.mark.parametrize("fused_linear", [False, True])
def test_bfloat16_changes_little(fused_linear, tmp_path):
    model = llama()
    data, sampler = examples(model), Canned()
    trainer = gail(
        model, data, tmp_path, sampler=sampler, bf16=True, fused_linear=fused_linear, **TERMS
    )
    spread(trainer.model)
    exact = copy.deepcopy(trainer.model).double().eval()
    trainer.train()
    loss = reference(exact, answers_of(data, model), sampler.episodes, "scaled")
    # products are rounded to 8 bits, and advantages divide what was rounded by their size
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=0.03)


SEVEN = [{"input_ids": [5, 7, EOS], "labels": [-100, 7, EOS]}] * 16


class Flipped(GAILTrainer):
    """Paid for what the discriminator takes for a sample."""

    def _rescale(self, rollout):
        super()._rescale(rollout)
        for batch in rollout:
            batch["advantage"] = -batch["advantage"]


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_it_learns_what_is_demonstrated(algorithm, tmp_path):
    """The probability of the only first token, from 1/8; no term of likelihood helps.

    Each token is paid for itself alone: with later rewards, which are positive, answers run as long
    as they may (Fig. 12).
    """
    found = {}
    for cls in (GAILTrainer, Flipped) if algorithm == "a2c" else (GAILTrainer,):
        model = llama(vocab_size=8)
        trainer = gail(
            model,
            SEVEN,
            tmp_path,
            cls=cls,
            algorithm=algorithm,
            updates_per_rollout=2 if algorithm == "ppo" else 1,
            optim="adamw_torch",
            learning_rate=1e-2,
            max_steps=25,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            logging_steps=25,
            max_new_tokens=2,
            gamma=0.0,
            kl_initial=0.0,
            kl_final=0.0,
        )
        trainer.train()
        with torch.no_grad():
            found[cls] = whole(model.double(), [5], [7])[0].softmax(-1)[7].item()
    assert found[GAILTrainer] > 0.5 and found.get(Flipped, 0.0) < 0.1, found


@pytest.mark.parametrize(
    ("build", "options"),
    [(llama, {"algorithm": "ppo", "updates_per_rollout": 2}), (adapted, {})],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(build, options, tmp_path):
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        **TERMS,
        **options,
    }
    torch.manual_seed(3)
    data = examples(llama(), lengths=(3, 4, 3, 4, 2, 3))
    model = build()
    start = copy.deepcopy(model)
    straight = gail(model, data, tmp_path, **options)
    straight.train()
    again = gail(start, data, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    timed = ("sampling_seconds", "update_seconds", "epoch")

    def curve(trainer):
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [{k: v for k, v in log.items() if k not in timed} for log in logs]

    assert curve(again) == curve(straight) and len(curve(straight)) == 5
    if build is adapted:
        return
    # The policy of a checkpoint is a model like any other.
    policy = type(model).from_pretrained(tmp_path / "checkpoint-5")
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, straight.model.policy.get_parameter(name))


@pytest.mark.parametrize("build", [llama, adapted])
def test_it_evaluates_keeps_the_best_and_makes_a_page(build, tmp_path):
    """Evaluations are NLLs; the best policy comes back with its critic; a page shows the policy."""
    model = build()
    data = examples(model, lengths=(3, 4, 3, 4))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nll"}
    every = {name: "steps" for name in ("eval_strategy", "save_strategy")}
    with pytest.raises(ValueError, match="accepted: greater_is_better=False"):
        gail(build(), data, tmp_path, **best, **every)
    best["greater_is_better"] = False
    changed = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "learning_rate": 3.0}
    trainer = GAILTrainer(
        model,
        arguments(GAILArguments, tmp_path, **changed, **best, **every),
        sampler=Canned(),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    policy = trainer.policy_model().eval()
    logged = [log["eval_nll"] for log in trainer.state.log_history if "eval_nll" in log]
    nll = torch.cat(
        [
            F.cross_entropy(
                whole(policy, prompt, answer)[:-1].double(), torch.tensor(answer), reduction="none"
            )
            for prompt, answer in answers_of(data, policy)
        ]
    ).mean()
    # float32; the last step has moved it by more
    assert min(logged) == pytest.approx(nll.item(), rel=1e-5)
    assert max(logged) > min(logged) + 1e-4
    trainer.save_model()
    trainer.create_model_card(model_name="m", tags=list(trainer.networks().model_tags))
    page = (tmp_path / "README.md").read_text()
    assert "- irl_ops" in page and "- GAILTrainer" in page and "Adversaries" not in page


def test_adapters_and_gradient_checkpointing_are_refused(tmp_path):
    trainer = gail(adapted(), SEVEN, tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        trainer.train()


def test_the_weight_of_the_kl_falls(tmp_path):
    trainer = gail(llama(), SEVEN, tmp_path, kl_initial=0.5, kl_final=0.1, kl_anneal_steps=10)
    weights = []
    for trainer.state.global_step in (0, 5, 10, 100):
        weights.append(trainer.kl_weight())
    assert weights == pytest.approx([0.5, 0.3, 0.1, 0.1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algorithm": "trpo"}, "algorithm='trpo'"),
        ({"advantages": "none"}, "advantages='none'"),
        ({"gae_lambda": 1.5}, "gae_lambda=1.5"),
        ({"mle_weight": -1.0}, "mle_weight=-1.0"),
        ({"updates_per_rollout": 2}, "updates_per_rollout=2"),
        ({"agent_batch_size": 0}, "agent_batch_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_arguments_that_no_run_could_use(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(GAILArguments, tmp_path, **changed)
