"""Steps of TRL's SFTTrainer, against float64 autograd of the formula on the separate documents."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

import irl_ops.torch as irl
from irl_ops.integrations.transformers import (
    IQLearnCallback,
    apply_iqlearn,
    iqlearn_loss_func,
)
from irl_ops.integrations.transformers.model import applied_loss
from irl_ops.integrations.trl import IQLearnMixin

from .tiny_transformers import (
    OPTIONS,
    VOCAB,
    assert_one_step,
    close_loss,
    gemma2,
    llama,
    mixtral,
    naive_loss,
    naive_sum,
    parameters,
    reference_gradients,
)

END, USER, ASSISTANT = 2, 3, 4
WORDS = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", *(f"w{i}" for i in range(5, VOCAB))]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<user> ' + m.content + ' ' }}{% else %}"
    "{{ '<assistant> ' }}{% generation %}{{ m.content + ' </s>' }}{% endgeneration %}{{ ' ' }}"
    "{% endif %}{% endfor %}"
)


class IQLearnTrainer(IQLearnMixin, SFTTrainer):
    pass


def tokenizer():
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, **specials)
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    assert len(made) == VOCAB
    return made


# -------------------------------------------------------------------------------------------------
# The data, as TRL takes it and as documents of ids and labels
# -------------------------------------------------------------------------------------------------

LENGTHS = (5, 9, 3, 7, 4, 8, 2, 11)


def words(length):
    return torch.randint(5, VOCAB, (length,)).tolist()


def said(ids):
    return " ".join(WORDS[i] for i in ids)


def document(ids, labels):
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def text_data():
    torch.manual_seed(0)
    answers = [words(n) for n in LENGTHS]
    rows = [{"text": said(a)} for a in answers]
    return rows, [document([*a, END], [*a, END]) for a in answers]


def prompt_data():
    torch.manual_seed(0)
    pairs = [(words(2 + n % 3), words(n)) for n in LENGTHS]
    rows = [{"prompt": said(p) + " ", "completion": said(a)} for p, a in pairs]
    return rows, [document([*p, *a, END], [-100] * len(p) + [*a, END]) for p, a in pairs]


def chat_data():
    """Two turns of each: the labels of the second user's turn are a gap."""
    torch.manual_seed(0)
    rows, documents = [], []
    for n in LENGTHS:
        ids, labels, messages = [], [], []
        for length in (n, 2):
            question, answer = words(2), words(length)
            messages += [
                {"role": "user", "content": said(question)},
                {"role": "assistant", "content": said(answer)},
            ]
            ids += [USER, *question, ASSISTANT, *answer, END]
            labels += [-100] * 4 + [*answer, END]
        rows.append({"messages": messages})
        documents.append(document(ids, labels))
    return rows, documents


PACKED = {"packing": True, "max_length": 24}
MODES = {
    "text": (llama, text_data, {}),
    "prompt-completion": (llama, prompt_data, {}),
    "assistant-only": (llama, chat_data, {"assistant_only_loss": True}),
    "packed": (llama, text_data, PACKED),
    "packed completions": (llama, prompt_data, PACKED),
    "padding-free": (llama, prompt_data, {"padding_free": True, "max_length": None}),
    "checkpointed": (llama, prompt_data, {"gradient_checkpointing": True}),
    "soft-capped": (gemma2, prompt_data, {}),
    "soft-capped and packed": (gemma2, text_data, PACKED),
}


def sft(model, rows, tmp_path, *, trainer_class=IQLearnTrainer, **arguments):
    """One step over all rows: an epoch, of as many micro-batches as it takes."""
    names = {"peft_config", "callbacks", "eval_dataset", "compute_loss_func"}
    given = {name: arguments.pop(name) for name in names & set(arguments)}
    defaults = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return trainer_class(
        model,
        SFTConfig(**defaults | arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **given,
    )


# -------------------------------------------------------------------------------------------------
# The steps
# -------------------------------------------------------------------------------------------------


STORED = ("prompt-completion", "packed", "soft-capped and packed")
STEPS = [(mode, None) for mode in MODES] + [(mode, False) for mode in STORED]


@pytest.mark.parametrize(("mode", "fused_linear"), STEPS)
def test_a_step_is_float64_autograd_of_the_separate_documents(mode, fused_linear, tmp_path):
    build, make, arguments = MODES[mode]
    model = build()
    rows, documents = make()
    gradients = reference_gradients(model, documents)
    expected = naive_loss(copy.deepcopy(model).double(), documents)
    before = parameters(model)
    applied = apply_iqlearn(model, fused_linear=fused_linear, **OPTIONS)
    trainer = sft(applied, rows, tmp_path, **arguments)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.current_gradient_accumulation_steps > 1
    assert applied_loss(model).fused_linear is (fused_linear is None)
    assert_one_step(model, before, gradients)
    logged = trainer.state.log_history[0]
    close_loss(torch.tensor(logged["loss"]), expected, rtol=1e-4, atol=0)  # rounded for the log


def test_logits_are_stored_where_something_waits_for_them(tmp_path):
    model, (rows, _) = apply_iqlearn(llama(), **OPTIONS), prompt_data()
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(type(logits)))
    sft(model, rows, tmp_path).train()
    assert applied_loss(model).fused_linear is False
    assert seen and set(seen) == {torch.Tensor}


def test_lora_of_trl(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = llama()
    rows, documents = prompt_data()
    trainer = sft(apply_iqlearn(model, **OPTIONS), rows, tmp_path, peft_config=config)
    plain = get_peft_model(llama(), config)
    plain.load_state_dict(trainer.model.state_dict())
    gradients = reference_gradients(plain, documents)
    assert gradients and all("lora" in name for name in gradients)
    before = parameters(trainer.model)
    trainer.train()
    assert_one_step(trainer.model, before, gradients)


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_router_is_weighted_as_trl_does(padding_free, tmp_path):
    """By its coefficient, times the mean over micro-batches; the experts have no float64."""
    model = mixtral()
    rows, _ = prompt_data()
    batches = []

    def keep(module, args, kwargs):
        batches.append({k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

    before, twin = parameters(model), mixtral()
    coefficient = 0.3  # another than the model was made with
    packing = {"padding_free": True, "max_length": None} if padding_free else {}
    trainer = sft(
        apply_iqlearn(model, **OPTIONS),
        rows,
        tmp_path,
        router_aux_loss_coef=coefficient,
        **packing,
    )
    model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.train()
    assert len(batches) == 4
    total, count, router = 0, 0, []
    for inputs in batches:
        labels = inputs.pop("labels")
        inputs.pop("num_items_in_batch")
        outputs = twin(**inputs, use_cache=False, output_router_logits=True)
        segments = inputs.get("seq_idx")
        loss, n = naive_sum(outputs.logits, labels, shift=True, segments=segments)
        total, count, router = total + loss, count + n, [*router, outputs.aux_loss]
    router = torch.stack(router).mean()
    (total / count + coefficient * router).backward()
    gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert_one_step(model, before, gradients)
    logged = trainer.state.log_history[0]
    close_loss(torch.tensor(logged["loss"]), total / count + coefficient * router, rtol=1e-4)
    close_loss(torch.tensor(logged["aux_loss"]), router)


@pytest.mark.parametrize(
    ("mode", "fused_linear"),
    [("prompt-completion", None), ("packed", None), ("assistant-only", None), ("packed", False)],
)
def test_the_metrics_of_trl_and_our_own_are_logged(mode, fused_linear, tmp_path):
    build, make, arguments = MODES[mode]
    model = build()
    rows, documents = make()
    sums = torch.zeros(4, dtype=torch.float64)
    reference = copy.deepcopy(model).double()
    for inputs in documents:
        q = reference(inputs["input_ids"]).logits[0, :-1].detach()
        labels = inputs["labels"][0, 1:]
        q, labels = q[labels != -100], labels[labels != -100]
        entropy = torch.distributions.Categorical(logits=q).entropy().sum()
        nll = F.cross_entropy(q, labels, reduction="sum")
        sums += torch.stack([entropy, nll, (q.argmax(-1) == labels).sum(), q.new_tensor(len(q))])
    entropy, nll, accuracy = (sums / sums[-1])[:3]
    trainer = sft(
        apply_iqlearn(model, fused_linear=fused_linear, **OPTIONS),
        rows,
        tmp_path,
        eval_dataset=Dataset.from_list(rows),
        eval_packing=mode == "packed",
        per_device_train_batch_size=8,  # one micro-batch: TRL averages over micro-batches
        per_device_eval_batch_size=8,
        learning_rate=0.0,
        **arguments,
    )
    trainer.train()
    evaluated = trainer.evaluate()
    for logs, prefix in ((trainer.state.log_history[0], ""), (evaluated, "eval_")):
        logs = {**logs, **trainer.state.log_history[-1]} if prefix else logs
        close_loss(torch.tensor(logs[prefix + "entropy"]), entropy)
        close_loss(torch.tensor(logs[prefix + "mean_token_accuracy"]), accuracy)
        close_loss(torch.tensor(logs[prefix + "nll"]), nll)
        assert {prefix + "td", prefix + "value", prefix + "reward"} <= set(logs)
        assert logs[prefix + "num_tokens"] == sum(d["input_ids"].numel() for d in documents)
    loss = naive_loss(reference, documents)
    close_loss(torch.tensor(evaluated["eval_loss"]), loss, rtol=1e-4)


def test_inplace_leaves_the_metrics_alone(tmp_path):
    rows, _ = prompt_data()
    logs = []
    for inplace in (False, True):
        trainer = sft(apply_iqlearn(llama(), **OPTIONS, inplace=inplace), rows, tmp_path)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "entropy", "mean_token_accuracy", "nll", "grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)


# -------------------------------------------------------------------------------------------------
# What is refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_a_plain_sft_trainer_with_an_applied_model_raises(lora, tmp_path):
    """It would train the NLL. No callback is there to notice."""
    model = apply_iqlearn(llama(), **OPTIONS)
    rows, _ = text_data()
    trainer = sft(model, rows, tmp_path, trainer_class=SFTTrainer, peft_config=lora)
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"put irl_ops\.integrations\.trl\.IQLearnMixin before"):
        trainer.train()
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, before[name])


def test_a_model_without_iqlearn_is_refused(tmp_path):
    rows, _ = text_data()
    with pytest.raises(ValueError, match="model=LlamaForCausalLM without IQLearn; accepted: one a"):
        sft(llama(), rows, tmp_path)
    with pytest.raises(ValueError, match="model='some/model'; accepted: a loaded model"):
        sft("some/model", rows, tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("loss_type='dft' would be ignored", {"loss_type": "dft"}),
        ("label_smoothing_factor=0.1 would be ignored", {"label_smoothing_factor": 0.1}),
        ("compute_loss_func: the loss is that of", {"compute_loss_func": iqlearn_loss_func()}),
        ("compute_loss_func: the loss is that of", {"compute_loss_func": irl.iqlearn_loss}),
    ],
)
def test_other_losses_are_refused(message, arguments, tmp_path):
    rows, _ = text_data()
    with pytest.raises(ValueError, match=message):
        sft(apply_iqlearn(llama(), **OPTIONS), rows, tmp_path, **arguments)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match="SFTTrainer comes before IQLearnMixin"):

        class Behind(SFTTrainer, IQLearnMixin):
            pass

    class Mine(SFTTrainer):
        """A subclass of TRL's, with other things in it."""

    class Ours(IQLearnMixin, Mine):
        """Fine, and so is a loss that builds on this one."""

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class OfOurs(Ours):
        pass

    assert issubclass(OfOurs, Trainer)


def test_a_callback_that_is_given_is_not_doubled(tmp_path):
    rows, _ = text_data()
    given = IQLearnCallback()
    trainer = sft(apply_iqlearn(llama(), **OPTIONS), rows, tmp_path, callbacks=[given])
    trainer.train()
    ours = [c for c in trainer.callback_handler.callbacks if isinstance(c, IQLearnCallback)]
    assert ours == [given] == trainer.callback_handler.callbacks[:1]
    assert "nll" in trainer.state.log_history[0]
