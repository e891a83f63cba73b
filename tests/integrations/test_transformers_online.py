"""OnlineIQLearnTrainer against float64 autograd, in what it learns, and when it is resumed."""

import copy
import json
import types

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from peft import LoraConfig, get_peft_model

from irl_ops.integrations.transformers import (
    ContinuousSampler,
    OnlineIQLearnArguments,
    OnlineIQLearnTrainer,
    VLLMSampler,
    apply_iqlearn,
    sampled,
)

from .tiny_systems import EOS, Canned, answers_of, arguments, collate, counting, whole
from .tiny_transformers import assert_one_step, examples, llama, parameters, t5

ALPHA, LAM, GAMMA = 0.3, 0.2, 0.9


def online(model, data, tmp_path, *, sampler=None, cls=OnlineIQLearnTrainer, **changed):
    given = {"alpha": ALPHA, "lam": LAM, "gamma": GAMMA, **changed}
    args = arguments(OnlineIQLearnArguments, tmp_path, **given)
    return cls(model, args, sampler=sampler, train_dataset=data, data_collator=collate)


def residuals(model, prompt, answer, semi_gradient=False):
    """log pi, V - gamma V' and Q - gamma V' of each token; V' is 0 behind an end token."""
    q = whole(model, prompt, answer)
    value = q.logsumexp(-1)
    logp = q[range(len(answer)), answer] - value[:-1]
    if hasattr(model, "value_head"):
        ids = torch.tensor([prompt + answer])
        hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
        value = model.value_head(hidden)[:, 0]
    ahead = torch.cat([value[1:-1], value[-1:] * (answer[-1] != EOS)])
    picked = value[:-1] + logp
    stopped = ahead.detach() if semi_gradient else ahead
    return logp, value[:-1] - GAMMA * ahead, picked - GAMMA * stopped


def headed():
    model = apply_iqlearn(llama(), value_head=True)
    torch.nn.init.normal_(model.value_head.weight)
    return model


def reference(model, demonstrations, episodes, objective, semi_gradient):
    """Eqs. 15-17, or the value objective: means over the tokens of each group."""

    def of(group):
        parts = [residuals(model, *pair, semi_gradient) for pair in group]
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    (logp, drop, r), (_, drop_b, r_b) = of(demonstrations), of(episodes)
    if objective == "value":
        expert = (1 - ALPHA) * (drop + LAM * r**2).mean() - r.mean()
        return expert + ALPHA * (drop_b + LAM * r_b**2).mean()
    expert = (LAM / (1 - ALPHA) * r**2 - logp).mean()
    return expert + LAM * ALPHA / (1 - ALPHA) ** 2 * (r_b**2).mean()


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {}),
        (llama, {"fused_linear": True}),
        (t5, {"semi_gradient": True}),
        (llama, {"objective": "value", "semi_gradient": True}),
        (t5, {"objective": "value", "fused_linear": True}),
        (headed, {}),
        (headed, {"objective": "value", "fused_linear": True}),
    ],
)
def test_an_update_is_that_of_float64_autograd(build, options, tmp_path):
    model = build()
    data = examples(model)
    exact, before = copy.deepcopy(model).double(), parameters(model)
    sampler = Canned()
    trainer = online(model, data, tmp_path, sampler=sampler, **options)
    trainer.train()
    assert len(sampler.episodes) == len(data)
    objective, semi = options.get("objective", "iqlearn"), options.get("semi_gradient", False)
    loss = reference(exact, answers_of(data, model), sampler.episodes, objective, semi)
    loss.backward()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)  # rounded for the log
    gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    assert_one_step(model, before, gradients)
    assert {"td", "value", "reward", "episode_age", "answer_length"} <= set(logged)
    assert logged["sampling_seconds"] > 0 and logged["update_seconds"] > 0
    assert 0 < logged["answers_cut_off"] < 1


@pytest.mark.parametrize(
    "options",
    [{}, {"fused_linear": True}, {"objective": "value", "gradient_checkpointing": True}],
)
def test_bfloat16_changes_little(options, tmp_path):
    model = headed()
    data, sampler = examples(model), Canned()
    exact = copy.deepcopy(model).double()
    trainer = online(model, data, tmp_path, sampler=sampler, bf16=True, **options)
    trainer.train()
    objective = options.get("objective", "iqlearn")
    loss = reference(exact, answers_of(data, model), sampler.episodes, objective, False)
    # products are rounded to 8 bits
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=0.03)


class Flipped(OnlineIQLearnTrainer):
    """The samples' term with the wrong sign: 2 L_E - L."""

    def _loss(self, readout, labels, is_expert, items):
        loss, metrics = super()._loss(readout, labels, is_expert, items)
        alone = labels.where(is_expert[:, None], -100)
        expert, _ = super()._loss(readout, alone, is_expert, items)
        return 2 * expert - loss, metrics


def test_it_learns_and_samples_count(tmp_path):
    """Likelihood rises, and the residuals of samples shrink; with a wrong sign they grow."""
    data = counting(32)
    found = {}
    for cls in (OnlineIQLearnTrainer, Flipped):
        model = llama()
        trainer = online(
            model,
            data,
            tmp_path,
            cls=cls,
            sampler=Canned(),
            optim="adamw_torch",
            learning_rate=1e-2,
            max_steps=40,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            alpha=0.5,
            lam=0.1,
            refresh_every=4,
            logging_steps=40,
        )
        trainer.train()
        nll = trainer.evaluate(counting(16, seed=1))["eval_nll"]
        episodes = trainer.sampler.episodes[-16:]
        with torch.no_grad():
            td = [residuals(model, *pair)[2].square().mean() for pair in episodes]
        found[cls] = nll, torch.stack(td).mean().item()
    nll, td = found[OnlineIQLearnTrainer]
    # untrained: log 41 = 3.7 and about (log 41)^2 (1 - gamma) .. (log 41)^2
    assert nll < 1.0
    assert td < 0.5 < found[Flipped][1]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """The same losses, with a buffer that is older than the checkpoint and real sampling."""
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "refresh_every": 2,
        "max_age": 3,
        "samples_per_refresh": 3,
    }
    data = counting(16)
    straight = online(llama(), data, tmp_path, **options)
    straight.train()
    kept = json.loads((tmp_path / "checkpoint-3" / "episodes.json").read_text())
    assert {step for step, _, _ in kept} == {0, 2}
    again = online(llama(), data, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    timed = ("sampling_seconds", "update_seconds", "epoch")

    def curve(trainer):
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [{k: v for k, v in log.items() if k not in timed} for log in logs]

    assert curve(again) == curve(straight)
    assert len(curve(straight)) == 6 and curve(straight)[3]["episode_age"] > 0


def test_maximum_likelihood_first(tmp_path):
    """While ``lam`` is 0, nothing is sampled and the loss is the NLL."""
    sampler, model = Canned(), llama()
    exact = copy.deepcopy(model).double()
    data = examples(model)
    trainer = online(
        model, data, tmp_path, sampler=sampler, mle_warmup_steps=1, lam_ramp_steps=2, max_steps=3
    )
    trainer.train()
    pairs = answers_of(data, model)
    with torch.no_grad():
        nll = -torch.cat([residuals(exact, *pair)[0] for pair in pairs]).mean()
    first, *later = (log for log in trainer.state.log_history if "loss" in log)
    assert first["loss"] == pytest.approx(nll.item(), rel=1e-4)  # rounded for the log
    assert "answer_length" not in first and "answer_length" in later[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 1.0}, "alpha=1.0"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"objective": "q"}, "objective='q'"),
        ({"refresh_every": 5, "max_age": 3}, "refresh_every=5 and max_age=3"),
        ({"agent_batch_size": 0}, "agent_batch_size=0"),
        ({"objective": "value", "mle_warmup_steps": 1}, "mle_warmup_steps"),
    ],
)
def test_arguments_that_no_run_could_use(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(OnlineIQLearnArguments, tmp_path, **changed)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


def test_batches_and_models_that_are_refused(tmp_path):
    model = llama()
    data = [{**row, "position_ids": list(range(len(row["labels"])))} for row in examples(model)]
    trainer = online(model, data, tmp_path, sampler=Canned())
    trainer.data_collator = lambda rows: {**collate(rows), "position_ids": torch.zeros(1)}
    with pytest.raises(ValueError, match="'position_ids'"):
        trainer.train()
    with pytest.raises(ValueError, match="train_dataset=Stream"):
        online(model, Stream(), tmp_path, max_steps=1)
    endless = llama(eos_token_id=None)
    endless.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id is None"):
        online(endless, data, tmp_path)


def test_engines_that_cannot_sample_are_refused(tmp_path, monkeypatch):
    """No engine runs here: the Trainer is only told that one does."""
    data = examples(llama())
    client = types.SimpleNamespace(communicator=True)
    with monkeypatch.context() as patch:
        patch.setattr(sampled, "is_deepspeed_zero3_enabled", lambda: True)
        for sampler in (ContinuousSampler(4), VLLMSampler(client, 4)):
            with pytest.raises(ValueError, match=f"{type(sampler).__name__} with .*ZeRO-3"):
                online(llama(), data, tmp_path, sampler=sampler)
        tuned = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="with PEFT under ZeRO-3"):
            online(tuned, data, tmp_path, fused_linear=True)
        online(tuned, data, tmp_path)
    accelerator = types.SimpleNamespace(is_fsdp2=False)
    fsdp1 = types.SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"\['version'\]=1"):
        OnlineIQLearnTrainer._refuse_engines(fsdp1)
