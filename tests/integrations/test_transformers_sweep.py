"""Every language model of Transformers that builds tiny: at lam = 0 its loss is the built-in one.

And without stored logits its loss and gradients are those with them. Or it is refused aloud. What
does not build from a few sizes alone is left out, and counted.
"""

import copy
import warnings

import pytest
import torch
import transformers
from transformers import FSMTForConditionalGeneration, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from irl_ops.integrations.transformers import apply_iqlearn

VOCAB, WIDTH, HEADS = 40, 32, 4
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {
    VOCAB: "vocab_size target_vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size",
    WIDTH: "hidden_size d_model n_embd dim embed_dim intermediate_size ffn_dim d_ff n_inner "
    "encoder_ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size",
    HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer num_layers n_layers num_key_value_heads num_kv_heads "
    "num_experts_per_tok",
    1: "encoder_layers decoder_layers num_decoder_layers",
    16: "q_lora_rank kv_lora_rank mamba_d_state mamba_chunk_size chunk_size",
    64: "max_position_embeddings n_positions",
    WIDTH // HEADS: "d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
HEAD = {"head_dim": WIDTH // HEADS}
LARGEST = 3e6  # parameters; more would take the minute that all of them have


def shrunk(kind):
    """Sizes set on a finished configuration, and on those inside it."""
    config = kind()
    for inner in (config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))):
        for name, size in (TINY | HEAD).items():
            if getattr(inner, name, None) is not None:
                setattr(inner, name, size)
    for name, token in IDS.items():
        setattr(config, name, token)
    return config


def made_small(kind):
    """Sizes given when it is made, from which it derives the rest, such as kinds of layers."""
    known = kind()
    sizes = TINY | HEAD
    sizes = {name: size for name, size in sizes.items() if getattr(known, name, None) is not None}
    layers = {name: 4 for name in ("num_hidden_layers", "n_layer") if name in sizes}
    return kind(**sizes | layers | IDS)


def models():
    """Pairs of a class's name and a tiny model of it, None for what does not build."""
    pairs = {
        (model_type, name)
        for mapping in (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
        for model_type, names in mapping.items()
        for name in ((names,) if isinstance(names, str) else names)
    }
    seen = set()
    for model_type, name in sorted(pairs):
        if name in seen:  # under the names of several configurations
            continue
        seen.add(name)
        yield name, built(getattr(transformers, name), CONFIG_MAPPING[model_type])


def built(model_class, kind):
    for configure in (shrunk, made_small):
        try:
            config = configure(model_class.config_class or kind)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                continue
            torch.manual_seed(0)
            model = model_class(config).eval()
            ids, labels = batch()
            if model(input_ids=ids, labels=labels, use_cache=False).loss.isfinite():
                return model
        except Exception:
            continue  # it wants more than sizes: it does not build tiny
    return None


def batch():
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (2, 6))
    labels = ids.clone()
    labels[0, :2] = labels[1, -2:] = -100  # a prompt, and padding
    return ids, labels


def compare(model):
    """ "equal", "refused", or what is wrong."""
    ids, labels = batch()
    inputs = {"input_ids": ids, "use_cache": False}
    teacher = {}
    if isinstance(model, FSMTForConditionalGeneration):  # else it would force the source's tokens
        teacher["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels.clone())
    builtin = model(**inputs, **teacher, labels=labels.clone()).loss
    try:
        apply_iqlearn(model, lam=0.0)
        loss = model(**inputs, labels=labels).loss
    except Exception as error:
        ours = "accepted:" in str(error) or "computes a loss of its own" in str(error)
        return "refused" if ours else repr(error)
    if not torch.equal(labels, batch()[1]):
        return "the caller's labels were changed"
    # float32 sums in another order
    same = torch.allclose(loss, builtin.float(), rtol=1e-5, atol=1e-6)
    return "equal" if same else f"{loss.item()} for {builtin.item()}"


def compare_fused(model):
    """A verdict on the loss and the gradients without stored logits, with the same dropout."""
    ids, labels = batch()
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    model.train()
    try:
        dense = step(apply_iqlearn(model, lam=0.1), inputs)
    except Exception as error:
        return "does not train", repr(error)
    try:
        fused = step(apply_iqlearn(model, lam=0.1, fused_linear=True), inputs)
    except Exception as error:
        ours = "fused_linear=True" in str(error) and "accepted:" in str(error)
        return "refused" if ours else "wrong", repr(error)
    for name, expected in dense.items():
        # float32 sums in another order, beside the largest gradient of the parameter
        if (fused[name] - expected).abs().max() > 1e-3 * expected.abs().max() + 1e-6:
            return "wrong", f"{name}: {fused[name].flatten()[:3]} for {expected.flatten()[:3]}"
    return "equal", ""


def step(model, inputs):
    torch.manual_seed(1)
    model.zero_grad()
    outputs = model(**inputs)
    if (outputs.logits is None) != bool(model.loss_function.fused_linear):
        pytest.fail(f"{type(model).__name__}: logits {outputs.logits}")  # no Exception
    outputs.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"the loss": outputs.loss.detach(), **gradients}


@pytest.mark.slow
def test_at_lam_zero_the_loss_is_the_builtin_one_or_is_refused():
    found = {"equal": [], "refused": [], "not built": [], "wrong": []}
    fused = {"equal": [], "refused": [], "does not train": [], "wrong": []}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, model in models():
            verdict = "not built" if model is None else compare(model)
            known = verdict in found
            found[verdict if known else "wrong"].append(name if known else (name, verdict))
            if verdict == "equal":
                with torch.enable_grad():
                    verdict, why = compare_fused(model)
                fused[verdict].append(name if verdict == "equal" else (name, why))
    print({verdict: len(names) for verdict, names in found.items()})
    print("refused:", *found["refused"])
    print("not built:", *found["not built"])
    print("without stored logits:", {verdict: len(names) for verdict, names in fused.items()})
    for verdict in ("refused", "does not train"):
        print(f"{verdict}:", *fused[verdict], sep="\n    ")
    assert not found["wrong"]
    assert not fused["wrong"]
    assert len(fused["equal"]) >= 130
    assert len(fused["refused"]) + len(fused["does not train"]) <= 15
    assert "FSMTForConditionalGeneration" in found["equal"]  # whose own code changes the labels
    assert len(found["equal"]) >= 140
    assert len(found["refused"]) <= 20
