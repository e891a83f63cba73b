"""Tiny random Transformers models, batches for them, and the reference: float64 autograd.

The reference is a float64 copy of the untouched model, whose logits go through ``naive_sum``.
"""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

VOCAB = 41
LAM, GAMMA = 0.1, 0.9
OPTIONS = {"lam": LAM, "gamma": GAMMA}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The models run in float32, the reference in float64; a loss differs by some 1e-7 of itself, and
# an update, a sum of terms that partly cancel, by some 1e-5.
close_loss = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)
CLOSE_UPDATE = 1e-3


def llama(vocab_size=VOCAB, **config):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            **TOKENS | config,
        )
    )


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64, **TOKENS)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def gemma2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 64}
    config = Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=0.5, **sizes, **heads, **TOKENS)
    return Gemma2ForCausalLM(config)


def mixtral():
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **T5_SIZES, **TOKENS
    )
    return T5ForConditionalGeneration(config)


def bart(cls=BartForConditionalGeneration):
    torch.manual_seed(0)
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


# -------------------------------------------------------------------------------------------------
# The batches
# -------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------
# The reference
# -------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------
# The training
# -------------------------------------------------------------------------------------------------


def train(
    model,
    data,
    tmp_path,
    *,
    callbacks=(),
    collator=collate,
    loss_func=None,
    trainer_class=Trainer,
    resume=None,
    **arguments,
):
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
    trainer = trainer_class(
        model,
        TrainingArguments(**defaults | arguments),
        train_dataset=data,
        data_collator=collator,
        callbacks=list(callbacks),
        compute_loss_func=loss_func,
    )
    trainer.train(resume_from_checkpoint=resume)
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
