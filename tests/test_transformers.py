"""The Hugging Face integration against float64 autograd of the formula.

Models are tiny, random and built from a config. The reference is a float64 copy of the untouched
model, whose logits go through ``naive_sum`` below.
"""

import copy
import inspect
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from irl_ops.integrations.transformers import (
    IQLearnCallback,
    LamScheduleCallback,
    apply_iqlearn,
    iqlearn_loss_func,
)
from irl_ops.integrations.transformers.model import segment_ids
from irl_ops.schedules import warmup_ramp

VOCAB = 41
LAM, GAMMA = 0.1, 0.9
OPTIONS = {"lam": LAM, "gamma": GAMMA}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The models run in float32, the reference in float64; a loss differs by some 1e-7 of itself, and
# an update, a sum of terms that partly cancel, by some 1e-5.
close_loss = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)
CLOSE_UPDATE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------- the models


def llama(**config):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            **TOKENS | config,
        )
    )


def gpt2():
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64, **TOKENS)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
            **TOKENS,
        )
    )


T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def t5():
    config = T5Config(
        vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **T5_SIZES, **TOKENS
    )
    return T5ForConditionalGeneration(config)


def bart(cls=BartForConditionalGeneration, **config):
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return cls(
        BartConfig(
            vocab_size=VOCAB, d_model=16, dropout=0.0, decoder_start_token_id=2, **sizes, **TOKENS
        )
    )


DECODERS = {"llama": llama, "gpt2": gpt2}
ENCODER_DECODERS = {"t5": t5, "bart": bart}
MODELS = DECODERS | ENCODER_DECODERS
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


# -------------------------------------------------------------------------------------- the batches


def examples(model, lengths=(5, 9, 7, 3)):
    """Prompts of two tokens, whose labels are masked, and answers that end in eos."""
    made = []
    for length in lengths:
        answer = [*torch.randint(3, VOCAB, (length,)).tolist(), 2]
        prompt = torch.randint(3, VOCAB, (2,)).tolist()
        if model.config.is_encoder_decoder:
            made.append({"input_ids": prompt, "labels": answer})
        else:
            made.append({"input_ids": prompt + answer, "labels": [-100, -100, *answer]})
    return made


def collate(rows, left=False):
    def pad(values, value):
        width = max(map(len, values))
        fill = [[value] * (width - len(v)) for v in values]
        padded = [f + v if left else v + f for v, f in zip(values, fill, strict=True)]
        return torch.tensor(padded)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], -100),
    }


# ----------------------------------------------------------------------------------- the reference


def naive_sum(logits, labels, *, shift, segments=None, lam=LAM, gamma=GAMMA):
    """Summed loss and count of labels: -log π(a_t) + λ (q_t[a_t] - γ V'_t)², in float64.

    V' is V of the next row if that has a label and lies in the same segment, else 0.
    """
    if segments is None:
        segments = torch.zeros_like(labels)
    same = F.pad(segments[:, 1:] == segments[:, :-1], (0, 1))
    if shift:
        labels = torch.where(same, F.pad(labels[:, 1:], (0, 1)), -100)
    q = logits.double()
    value = q.logsumexp(-1)
    labelled = labels != -100
    q_label = q.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    boots = same & F.pad(labelled[:, 1:], (0, 1))
    residual = q_label - gamma * torch.where(boots, F.pad(value[:, 1:], (0, 1)), 0)
    loss = value - q_label + lam * residual**2
    return torch.where(labelled, loss, 0).sum(), labelled.sum()


def naive_loss(model, batches, **options):
    """The loss of an accumulated batch by the untouched model's logits: sum / count."""
    shift = not model.config.is_encoder_decoder
    total, count = 0, 0
    for batch in batches:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        if not shift:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        loss, n = naive_sum(model(**inputs).logits, labels, shift=shift, **options)
        total, count = total + loss, count + n
    return total / count


def reference_gradients(model, batches, **options):
    """By name, of a float64 copy of ``model``, which has not been touched yet."""
    model = copy.deepcopy(model).double().train()
    naive_loss(model, batches, **options).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------ the training


def train(model, data, tmp_path, *, callbacks=(), collator=collate, loss_func=None, **arguments):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**defaults | arguments),
        train_dataset=data,
        data_collator=collator,
        callbacks=list(callbacks),
        compute_loss_func=loss_func,
    )
    trainer.train()
    return trainer


def assert_one_step(model, before, gradients, lr=0.1):
    """One SGD step: parameters moved by -lr * gradient, to 1e-3 of the whole update."""
    after = dict(model.named_parameters())
    assert gradients
    error = norm = 0.0
    for name, gradient in gradients.items():
        update = (before[name] - after[name].detach()).double() / lr
        error += (update - gradient).square().sum()
        norm += gradient.square().sum()
    assert error.sqrt() < CLOSE_UPDATE * norm.sqrt()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@every_model
def test_one_accumulated_step_is_float64_autograd(build, tmp_path):
    model = build()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    trainer = train(apply_iqlearn(model, **OPTIONS), data, tmp_path, callbacks=[IQLearnCallback()])
    assert_one_step(model, before, gradients)
    assert trainer.model_accepts_loss_kwargs


@every_model
def test_loss_func_takes_the_same_step(build, tmp_path):
    model = build()
    data = examples(model)
    aligned = model.config.is_encoder_decoder
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)

    def collator(rows):
        batch = collate(rows)
        if aligned:  # as DataCollatorForSeq2Seq(tokenizer, model=model) does
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(
                batch["labels"]
            )
        return batch

    loss_func = iqlearn_loss_func(shift=not aligned, **OPTIONS)
    callbacks = [IQLearnCallback(loss_func)]
    trainer = train(
        model, data, tmp_path, callbacks=callbacks, loss_func=loss_func, collator=collator
    )
    assert_one_step(model, before, gradients)
    assert "nll" in trainer.state.log_history[0]


@every_model
@pytest.mark.parametrize("num_items", [None, 10, torch.tensor(10), torch.tensor([10.0])])
def test_lam_zero_is_the_builtin_loss(build, num_items):
    model = build()
    batch = collate(examples(model))
    builtin = model(**batch).loss
    count = (batch["labels"] != -100).sum()
    model = apply_iqlearn(model, lam=0.0)
    loss = model(**batch, num_items_in_batch=num_items).loss
    close_loss(loss, builtin if num_items is None else builtin * count / 10)


class ReservedLlamaForCausalLM(LlamaForCausalLM):
    """As some vision-language models: the Trainer is told to pass no num_items_in_batch."""

    accepts_loss_kwargs = False

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_takes_no_loss_kwargs_is_normalised_as_well(tmp_path):
    model = ReservedLlamaForCausalLM(llama().config)
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    train(apply_iqlearn(model, **OPTIONS), data, tmp_path)
    assert_one_step(model, before, gradients)


def test_gradient_checkpointing(tmp_path):
    model = llama()
    data = examples(model)
    gradients = reference_gradients(model, [collate(data)])
    before = parameters(model)
    train(apply_iqlearn(model, **OPTIONS), data, tmp_path, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_one_step(model, before, gradients)


@pytest.mark.parametrize("build", [llama, t5])
@pytest.mark.parametrize("peft_first", [True, False])
def test_lora(build, peft_first, tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj", "q"], init_lora_weights=False, lora_dropout=0.0
    )
    model = build()
    data = examples(model)
    if peft_first:
        model = apply_iqlearn(get_peft_model(model, config), **OPTIONS)
    else:
        model = get_peft_model(apply_iqlearn(model, **OPTIONS), config)
    plain = get_peft_model(build(), config)
    plain.load_state_dict(model.state_dict())
    gradients = reference_gradients(plain, [collate(data)])
    assert gradients and all("lora" in name for name in gradients)
    before = parameters(model)
    train(model, data, tmp_path, callbacks=[IQLearnCallback()])
    assert_one_step(model, before, gradients)


@every_model
def test_inplace_and_entropy_reach_the_loss(build):
    model = build()
    batch = collate(examples(model))
    shift = not model.config.is_encoder_decoder
    reference = copy.deepcopy(model).double()
    logits = reference(**batch).logits
    total, count = naive_sum(logits, batch["labels"], shift=shift)
    labels = F.pad(batch["labels"][:, shift:], (0, int(shift)), value=-100)
    entropy = torch.distributions.Categorical(logits=logits).entropy()[labels != -100].mean()
    expected = total / count - 0.3 * entropy
    expected.backward()
    loss = apply_iqlearn(model, **OPTIONS, entropy_coef=0.3, inplace=True)(**batch).loss
    close_loss(loss, expected)
    loss.backward()
    for name, parameter in reference.named_parameters():
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=CLOSE_UPDATE, atol=1e-6, check_dtype=False
        )
    close_loss(torch.tensor(model.loss_function.drain("")["entropy"]), entropy)


def test_router_loss_is_kept():
    model = mixtral()
    batch = collate(examples(model))
    aux = 0.5 * model(**batch).aux_loss
    assert aux > 0.1
    expected = naive_loss(model, [batch]) + aux  # the experts' kernels have no float64
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, expected)


@pytest.mark.parametrize("build", [llama, t5])
def test_bf16_autocast_keeps_the_loss(build, tmp_path):
    """accelerate wraps the forward, and may unwrap it further than it wrapped."""
    model = apply_iqlearn(build(), **OPTIONS)
    data = examples(model)
    trainer = train(model, data, tmp_path, bf16=True, callbacks=[IQLearnCallback()])
    batch = collate(data)
    wrapped = model(**batch).loss
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    expected = naive_loss(copy.deepcopy(model).double(), [batch])
    close_loss(model(**batch).loss, expected)
    assert abs(wrapped - expected) < 0.02 * expected  # bf16 keeps two to three digits


def test_torch_compile():
    model = apply_iqlearn(llama(), **OPTIONS)
    batch = collate(examples(model))
    eager = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        loss = compiled(**batch).loss
        loss.backward()
    close_loss(loss, eager)


# ----------------------------------------------------------------------- packed and padded batches


def packed_batch():
    """Four documents in one row, one of a single token, their first labels not masked."""
    documents = [torch.randint(3, VOCAB, (n,)) for n in (6, 4, 1, 7)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    ends = torch.tensor([0, 6, 10, 11, 18], dtype=torch.int32)
    segments = torch.tensor([0] * 6 + [1] * 4 + [2] + [3] * 7)[None]
    return documents, {"input_ids": ids, "labels": ids, "position_ids": positions}, ends, segments


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
def test_packed_positions_are_separate_documents(build):
    model = build()
    documents, batch, _, _ = packed_batch()
    separate = [{"input_ids": d[None], "labels": d[None]} for d in documents]
    expected = naive_loss(copy.deepcopy(model).double(), separate)
    # with a cache, Transformers does not read positions as packing, and documents see each other
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch, use_cache=False).loss, expected)


@pytest.mark.parametrize("mark", ["seq_idx", "cu_seq_lens_q"])
def test_other_marks_of_packing(mark):
    """Given alone, so that the attention is not block-diagonal: the logits are the model's own."""
    model = llama()
    _, batch, ends, segments = packed_batch()
    del batch["position_ids"]
    marks = {"seq_idx": segments.int(), "cu_seq_lens_q": ends}
    logits = model(batch["input_ids"]).logits
    total, count = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    loss = apply_iqlearn(model, **OPTIONS)(**batch, **{mark: marks[mark]}).loss
    close_loss(loss, total / count)


def test_positions_are_packing_beside_a_full_mask_too():
    model = llama()
    _, batch, _, segments = packed_batch()
    batch["attention_mask"] = torch.ones_like(segments)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    total, count = naive_sum(logits, batch["labels"], shift=True, segments=segments)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)


@pytest.mark.parametrize("clamp", [0, 1])
def test_left_padding_is_not_packing(clamp):
    model = llama()
    rows = [{"input_ids": row, "labels": row} for row in ([5, 6, 7, 8, 2], [9, 10, 2])]
    batch = collate(rows, left=True)
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, clamp)
    builtin = model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    total, count = naive_sum(model(**inputs).logits, batch["labels"], shift=True)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)
    close_loss(apply_iqlearn(model, lam=0.0)(**batch).loss, builtin)


def test_positions_of_several_axes_are_not_packing():
    model = apply_iqlearn(llama(), **OPTIONS)
    _, batch, _, _ = packed_batch()
    del batch["position_ids"]
    assert segment_ids(batch | {"position_ids": torch.zeros(3, 1, 18)}) is None
    assert model(**batch).loss > 0


def test_shift_labels():
    model = llama()
    batch = collate(examples(model))
    total, count = naive_sum(model(**batch).logits, batch["labels"], shift=True)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    # the unshifted ones only say that a loss is wanted
    loss = apply_iqlearn(model, **OPTIONS)(**batch, shift_labels=shifted).loss
    close_loss(loss, total / count)


# -------------------------------------------------------------------------- what stays as it was


@every_model
def test_without_labels_nothing_changes(build):
    model = build().eval()
    batch = collate(examples(model))
    del batch["labels"]
    decode = (
        {} if not model.config.is_encoder_decoder else {"decoder_input_ids": batch["input_ids"]}
    )
    signature = inspect.signature(model.forward)
    logits = model(**batch, **decode).logits
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
    apply_iqlearn(model, **OPTIONS)
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], **decode)
    assert out.loss is None and torch.equal(out.logits, logits)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), tokens)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(TypeError, match="input_ids"):
        model(batch["input_ids"], input_ids=batch["input_ids"])


@every_model
def test_tuples(build):
    model = apply_iqlearn(build(), **OPTIONS)
    batch = collate(examples(model))
    outputs = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    assert list(outputs)[:2] == ["loss", "logits"]


@pytest.mark.parametrize("build", [llama, t5])
def test_save_pretrained(build, tmp_path):
    model = apply_iqlearn(build(), **OPTIONS)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, loaded.get_parameter(name))
    batch = collate(examples(model))
    close_loss(apply_iqlearn(loaded, **OPTIONS)(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("build", [llama, t5])
def test_deepcopy_is_a_model_of_its_own(build):
    model = apply_iqlearn(build(), **OPTIONS)
    batch = collate(examples(model))
    loss = model(**batch).loss
    twin = copy.deepcopy(model)
    apply_iqlearn(twin, lam=0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    expected = naive_loss(copy.deepcopy(twin).double(), [batch], lam=0.0)
    close_loss(twin(**batch).loss, expected)
    assert torch.equal(model(**batch).loss, loss)


@every_model
def test_a_second_call_replaces_the_options(build):
    model = build()
    batch = collate(examples(model))
    expected = naive_loss(copy.deepcopy(model).double(), [batch], lam=0.3, gamma=1.0)
    assert apply_iqlearn(apply_iqlearn(model, **OPTIONS), lam=0.3) is model
    close_loss(model(**batch).loss, expected)


def test_a_forward_that_computes_its_own_inputs_keeps_them():
    """Whisper alone knows how to shift its labels to the right."""
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        dropout=0.0,
        num_mel_bins=4,
        decoder_start_token_id=1,
        **TOKENS,
    )
    model = WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(2, 4, 16), "labels": torch.randint(3, VOCAB, (2, 6))}
    builtin = model(**batch)
    total, count = naive_sum(builtin.logits, batch["labels"], shift=False)
    close_loss(apply_iqlearn(model, lam=0.0)(**batch).loss, builtin.loss)
    close_loss(apply_iqlearn(model, **OPTIONS)(**batch).loss, total / count)


# ---------------------------------------------------------------------------- metrics and schedules


class Reporter(TrainerCallback):
    """What TensorBoard and W&B are to the Trainer."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def naive_metrics(model, batches):
    """Means over all labelled tokens of nll, value, td, reward."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            q = model(**inputs).logits
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        for row, row_labels in zip(q, labels, strict=True):
            for t in torch.nonzero(row_labels != -100).flatten().tolist():
                value, q_label = row[t].logsumexp(-1), row[t, row_labels[t]]
                last = t + 1 == len(row_labels) or row_labels[t + 1] == -100
                reward = q_label - (0 if last else GAMMA * row[t + 1].logsumexp(-1))
                sums += torch.stack([value - q_label, value, reward**2, reward, reward * 0 + 1])
    return dict(zip(("nll", "value", "td", "reward"), (sums / sums[-1])[:4], strict=True))


def test_metrics_reach_logs_reporters_and_evaluate(tmp_path):
    model = llama()
    data, held_out = examples(model, (5, 9, 7, 3)), examples(model, (4, 8, 2))
    reference = copy.deepcopy(model).double()
    trainer = Trainer(
        apply_iqlearn(model, **OPTIONS),
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.0,  # so that both steps see the reference's parameters
            use_cpu=True,
            report_to="none",
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=2,
            save_strategy="best",
            metric_for_best_model="eval_a_nll",
            greater_is_better=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset={"a": held_out, "b": data},
        data_collator=collate,
        callbacks=[reporter := Reporter()],
    )
    IQLearnCallback().attach(trainer)
    model(**collate(held_out))  # before the training: no part of its logs
    trainer.train()

    expected = naive_metrics(reference, [collate(data)])
    expected_held_out = naive_metrics(reference, [collate(held_out)])
    stored = trainer.state.log_history
    for log, prefix, values in (
        (stored[0], "", expected),
        (stored[1], "eval_a_", expected_held_out),
        (stored[2], "eval_b_", expected),
        (reporter.seen[0], "", expected),
        (reporter.seen[1], "eval_a_", expected_held_out),
        (trainer.evaluate(), "eval_b_", expected),
        (trainer.predict(held_out).metrics, "test_", expected_held_out),
    ):
        assert f"{prefix}loss" in log
        for name, value in values.items():
            close_loss(torch.tensor(log[prefix + name]), value)
    assert trainer.state.best_metric == stored[1]["eval_a_nll"]
    assert "nll" not in stored[3]  # the summary of the training has nothing left to report


def test_lam_follows_its_schedule(tmp_path):
    model = llama()
    data = examples(model)
    before = parameters(model)
    gradients = reference_gradients(model, [collate(data)], lam=0.0, gamma=1.0)
    lam = torch.tensor(0.5)  # what a forgotten first step would use
    schedule = partial(warmup_ramp, lam=0.2, warmup_steps=1, ramp_steps=2)
    first_step = []

    class AfterFirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            first_step.append(parameters(model))

    trainer = train(
        apply_iqlearn(model, lam=lam),
        data,
        tmp_path,
        max_steps=4,
        callbacks=[LamScheduleCallback(lam, schedule), AfterFirstStep()],
    )
    logged = [log["lam"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx([0.0, 0.0, 0.1, 0.2], rel=1e-6)  # float32
    for name, gradient in gradients.items():
        update = (before[name] - first_step[0][name]).double() / 0.1
        torch.testing.assert_close(update, gradient, rtol=CLOSE_UPDATE, atol=1e-5)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            NotImplementedError,
            r"fused_linear=True comes with irl_ops 0\.3\.0",
            {"fused_linear": True},
        ),
        (TypeError, "no option 'lamda'; accepted: lam gamma", {"lamda": 0.1}),
        (TypeError, "no option 'shift'", {"shift": False}),
        (ValueError, "lam", {"lam": -1.0}),
        (ValueError, "boundary", {"boundary": "nowhere"}),
    ],
)
def test_bad_options_are_named_at_once(error, message, options):
    model = llama()
    with pytest.raises(error, match=message):
        apply_iqlearn(model, **options)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "model=Linear; accepted: a Transformers", lambda: torch.nn.Linear(2, 2)),
        (ValueError, "DataParallel", lambda: torch.nn.DataParallel(llama())),
        (
            ValueError,
            "loss_type='ForSequenceClassification'",
            lambda: LlamaForSequenceClassification(llama().config),
        ),
    ],
)
def test_other_models_are_refused(error, message, build):
    with pytest.raises(error, match=message):
        apply_iqlearn(build())


def test_an_inline_loss_is_found():
    """BartForCausalLM computes its cross-entropy itself."""
    model = bart(BartForCausalLM)
    model.config.is_encoder_decoder = False
    apply_iqlearn(model)
    ids = torch.randint(3, VOCAB, (1, 5))
    with pytest.raises(RuntimeError, match=r"BartForCausalLM\.forward computes a loss"):
        model(input_ids=ids, labels=ids)


def test_routers_of_an_encoder_decoder_are_refused():
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, num_experts=2, decoder_start_token_id=0, **T5_SIZES, **TOKENS
    )
    model = apply_iqlearn(SwitchTransformersForConditionalGeneration(config))
    ids = torch.randint(3, VOCAB, (1, 5))
    assert model(input_ids=ids, labels=ids).loss > 0
    with pytest.raises(NotImplementedError, match="output_router_logits=True"):
        model(input_ids=ids, labels=ids, output_router_logits=True)


@pytest.mark.parametrize("with_callback", [True, False])
def test_label_smoothing_is_refused(with_callback, tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    callbacks = [IQLearnCallback()] if with_callback else []
    error, message = (
        (ValueError, r"label_smoothing_factor=0\.3")
        if with_callback
        else (RuntimeError, "withheld the labels .* label_smoothing_factor=0")
    )
    with pytest.raises(error, match=message):
        train(model, examples(model), tmp_path, callbacks=callbacks, label_smoothing_factor=0.3)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_loss_that_is_not_called_stops_the_training(steps, tmp_path):
    model = apply_iqlearn(llama(), **OPTIONS)
    data = examples(model)
    saved = []

    class Replace(TrainerCallback):
        """Puts another forward and loss in place, as Liger and TRL do."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == steps:
                model.forward = type(model).forward.__get__(model)
                del model._loss_function
                saved.append(parameters(model))

    with pytest.raises(RuntimeError, match="IQLearn was not called in this step"):
        train(model, data, tmp_path, callbacks=[IQLearnCallback(), Replace()], max_steps=3)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, saved[0][name])


def test_the_callback_needs_a_loss(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="no IQLearn loss: call apply_iqlearn"):
        train(model, examples(model), tmp_path, callbacks=[IQLearnCallback()])
    with pytest.raises(TypeError, match="accepted: None or an iqlearn_loss_func"):
        IQLearnCallback(print)
    with pytest.raises(TypeError, match=r"lam=0\.1; accepted: the 0-d floating tensor"):
        LamScheduleCallback(0.1, warmup_ramp)


def test_data_parallel_and_split_sequences_are_refused():
    model = apply_iqlearn(llama(), **OPTIONS)
    batch = collate(examples(model))
    with pytest.raises(ValueError, match="DataParallel"):
        model(**batch, num_items_in_batch=torch.ones(1, 1))
    with pytest.raises(ValueError, match="DataParallel"):
        iqlearn_loss_func()(model(**batch), batch["labels"], torch.ones(2, 1))

    callback = IQLearnCallback()
    arguments = SimpleNamespace(label_smoothing_factor=0.0, n_gpu=2)
    with pytest.raises(ValueError, match="DataParallel"):
        callback.on_train_begin(arguments, None, None, model=model)
    arguments.n_gpu = 1
    arguments.parallelism_config = ParallelismConfig()
    callback.on_train_begin(arguments, None, None, model=model)
    for name in ("cp_size", "sp_size"):
        arguments.parallelism_config = ParallelismConfig()
        setattr(arguments.parallelism_config, name, 2)  # what the constructor takes needs ranks
        with pytest.raises(ValueError, match=f"parallelism_config.{name}=2 splits sequences"):
            callback.on_train_begin(arguments, None, None, model=model)


def test_loss_func_refuses_what_it_would_get_wrong():
    loss_func = iqlearn_loss_func(**OPTIONS)
    model = t5()
    batch = collate(examples(model))
    with pytest.raises(ValueError, match="shift=True with the outputs of an encoder-decoder"):
        loss_func(model(**batch), batch["labels"])
    model = mixtral()
    batch = collate(examples(model))
    with pytest.raises(ValueError, match=r"outputs.aux_loss: a router's loss would be dropped"):
        loss_func(model(**batch), batch["labels"])
    outputs = llama()(**batch)
    with pytest.raises(ValueError, match="labels=None"):
        loss_func(outputs, None)
    with pytest.raises(ValueError, match="outputs=dict without logits"):
        loss_func({"loss": outputs.loss}, batch["labels"])
    with pytest.raises(TypeError, match="iqlearn_loss_func has no option 'lamda'"):
        iqlearn_loss_func(lamda=1)


def test_masked_ends_are_told_once():
    model = apply_iqlearn(llama(pad_token_id=2), **OPTIONS)
    batch = collate(examples(model))
    erased = batch | {"labels": batch["labels"].masked_fill(batch["labels"] == 2, -100)}
    with pytest.warns(UserWarning, match=r"no end token \(\[2\]\), and pad_token_id is one"):
        model(**erased)
    kept = apply_iqlearn(llama(pad_token_id=2), **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**erased)  # once
        kept(**batch)
        apply_iqlearn(llama(), **OPTIONS)(**erased)  # another pad token: nothing was erased
