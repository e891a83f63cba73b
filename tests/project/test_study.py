"""The study: its data, metrics and losses, and one run of it from end to end."""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts, not a package

import run_study  # noqa: E402
from study import findings, measures, rewards, start, tasks, work  # noqa: E402
from study.config import ConfigError, Decoding, Experiment, Run, expand, read  # noqa: E402
from study.results import Results, lacks  # noqa: E402
from study.training import OfflineTrainer, divergence  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, TrainingArguments  # noqa: E402

from irl_ops.score.record import Scored  # noqa: E402

from .. import naive  # noqa: E402
from ..integrations.tiny_transformers import collate, examples, llama, t5  # noqa: E402

# -------------------------------------------------------------------------------------------------
# Configurations
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", run_study.ORDER)
def test_every_table_can_be_read(name):
    experiment = read(run_study.CONFIGS / f"{name}.toml")
    assert len(set(experiment.runs.values())) == len(experiment.runs)  # no two are the same
    assert set(experiment.columns) <= set(run_study.page.table.__globals__["NAMES"])
    if "self_bleu" in experiment.columns:
        assert "length" in experiment.columns  # it is never reported alone


def test_a_list_makes_a_run_of_each_value():
    found = dict(expand({"label": "λ={lam:g}", "loss": "iqlearn", "lam": [0.1, 0.5]}))
    assert found == {"λ=0.1": Run("iqlearn", 0.1), "λ=0.5": Run("iqlearn", 0.5)}
    assert Run("iqlearn", 0.1).key != Run("iqlearn", 0.5).key


@pytest.mark.parametrize(
    ("entry", "said"), [({"lamda": 1}, "'lamda'"), ({"loss": "bc"}, "loss='bc'")]
)
def test_bad_settings_are_named(entry, said):
    with pytest.raises(ConfigError, match=said):
        expand({"label": "x", **entry})


# -------------------------------------------------------------------------------------------------
# Data and metrics
# -------------------------------------------------------------------------------------------------


def test_stories_are_right():
    task = tasks.synthetic(5, 40, 5)
    assert (len(task.start), len(task.train), len(task.test)) == (5, 40, 5)
    assert not {p.prompt for p in task.train} & {p.prompt for p in task.test}
    for pair in task.train:
        sums = re.findall(r"<<(\d+)([+-])(\d+)=(\d+)>>(\d+)", pair.completion)
        for a, sign, b, c, shown in sums:
            assert int(a) + int(sign + b) == int(c) == int(shown) >= 0
        told = [int(n) for n in re.findall(r"\d+", pair.prompt)]
        assert told == [int(sums[0][0]), *(int(b) for _, _, b, _, _ in sums)]
        assert tasks.final_answer(pair.completion) == sums[-1][3]


# Written for this test, in the form of GSM8k.
GSM8K = [
    {"question": "A box holds 3 rows of 1,000 pins. How many pins are that?",
     "answer": "It holds 3*1000 = <<3*1000=3000>>3,000 pins.\n#### 3,000"},
    {"question": "Half of 7 litres are poured out, a third of a litre of it lost. What is left?",
     "answer": "7/2 = <<7/2=3.5>>3.5 litres.\n#### 3.5"},
]  # fmt: skip


def test_the_lines_of_gsm8k_are_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in GSM8K), encoding="utf-8")
    task = tasks.from_files(path, path, 1, 2)
    assert (task.name, len(task.start), len(task.train), len(task.test)) == ("train", 2, 1, 2)
    found = {pair.prompt.rstrip("\n"): pair.completion for pair in task.test}
    assert found == {x["question"]: x["answer"] for x in GSM8K}
    ends = [tasks.final_answer(x["answer"]) for x in GSM8K]
    assert ends == ["3000", "3.5"]
    for row, end in zip(GSM8K, ends, strict=True):
        opened, closed = re.search(r"(<<.*?=)(.*?>>)", row["answer"]).groups()
        assert tasks.calculated("so " + opened) == closed == end + ">>"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("she has <<3+4=", "7>>"),
        ("she has << 3+4= ", "7>>"),  # as tokenizers of words put it
        ("<<560//10=", "56>>"),
        ("<<3+4=7>> <<12*3=3", "6>>"),
        ("<<3+4=7", ">>"),
        ("<<3+4=8", None),
        ("<<1,000/8=", "125>>"),
        ("<<(2+1)*-2.5=", "-7.5>>"),
        ("<<3+4", None),
        ("<<3+4=7>>", ""),
        ("<<1/0=", None),
        ("<<3+=", None),
        ("<<9**9**9=", None),
        ("3+4=", None),
    ],
)
def test_the_calculator_knows_what_is_still_to_come(text, rest):
    assert tasks.calculated(text) == rest


def words_tokenizer():
    """Of T5's kind: a space before every word is part of it, and there is no "<"."""
    words = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((c, -2.0) for c in "\u2581sohe0123456789/=>.")], 0)
    )
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def bytes_tokenizer():
    """Of GPT-2's kind; it has no padding token."""
    letters = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    words = Tokenizer(models.BPE({**letters, "</s>": len(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


@pytest.mark.parametrize("build", [words_tokenizer, bytes_tokenizer])
def test_the_calculator_writes_with_every_tokenizer(build, tmp_path):
    build().save_pretrained(tmp_path)
    tokenizer = start.tokenizer_of(None, str(tmp_path), None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encode = partial(tokenizer.encode, add_special_tokens=False)
    calculator = measures.Calculator(tokenizer, 1, [tokenizer.eos_token_id])
    ids, idle = [0, *encode("so <<48/2=")], [0, *encode("so he")]
    for _ in range(9):
        width = max(len(ids), len(idle))
        rows = [row + [idle[-1]] * (width - len(row)) for row in (ids, idle)]
        scores = calculator(torch.tensor(rows), torch.zeros(2, len(tokenizer)))
        assert torch.equal(scores[1], torch.zeros(len(tokenizer)))
        possible = scores[0].isfinite().nonzero().flatten().tolist()
        if len(possible) > 1:
            break
        ids += possible
    assert tokenizer.decode(ids[1:]).replace(" ", "") == "so<<48/2=24>>"


def test_the_end_of_an_answer_decides():
    assert tasks.final_answer("#### 1,234.5 apples") == "1234.5"
    assert tasks.is_correct("so\n#### 12", "#### 12")
    assert not tasks.is_correct("12", "#### 12")


def test_metrics_of_known_answers():
    reference = "a b c d e\n#### 7"
    groups = [[reference, reference], ["x y\n#### 7", "p q\n#### 8"]]
    found = measures.quality(groups, [4, 4, 2, 2], [True, True, False, False], [reference] * 2)
    assert found["accuracy"] == pytest.approx(75)
    assert found["length"] == 3 and found["unfinished"] == 50
    # 1 for both exact ones; one word of 3 and of 6 in common (rouge-score drops the signs) for one
    assert found["rouge1"] == pytest.approx(100 * (1 + 1 + 2 * (1 / 3) * (1 / 6) / (1 / 2) + 0) / 4)
    alone = measures.quality([[reference]], [4], [True], [reference])
    assert alone["bleu"] == pytest.approx(100) and alone["chrf"] == pytest.approx(100)
    assert "self_bleu" not in alone  # of a single answer there is none
    same = measures.quality([[reference, reference]], [4, 4], [True, True], [reference])
    assert same["self_bleu"] == pytest.approx(100)


# -------------------------------------------------------------------------------------------------
# Rewards
# -------------------------------------------------------------------------------------------------


def answer(seed, finished=True):
    """An answer scored at gamma = 1, with V' as it follows from its values."""
    draw = torch.Generator().manual_seed(seed)
    value = torch.rand(4, generator=draw).double() * 9
    logprob = -torch.rand(4, generator=draw).double()
    following = torch.cat([value[1:], torch.tensor([0.0 if finished else 5.0])])
    reward = value + logprob - following
    series = [x.tolist() for x in (value, logprob, logprob, reward)]
    return Scored([1] * 4, [""] * 4, *series, 1.0, finished), following


@pytest.mark.parametrize("finished", [True, False])
def test_rewards_of_every_gamma_follow_from_those_at_1(finished):
    one, following = answer(0, finished)
    q = torch.tensor(one.value) + torch.tensor(one.logprob)
    wanted = (q - 0.3 * following).tolist()
    assert rewards.rewards_at(one, 0.3) == pytest.approx(wanted)
    assert rewards.discounted([1.0, 2.0, 4.0], 0.5) == pytest.approx(3.0)


def test_correlations_find_what_was_put_in():
    scored = [[answer(i + 10 * p)[0] for i in range(6)] for p in range(2)]
    # the more of the reference's words, the larger the log-likelihood
    flat = sorted(one.likelihood for group in scored for one in group)
    words = [
        [" ".join(f"w{k}" for k in range(1 + flat.index(one.likelihood))) for one in group]
        for group in scored
    ]
    reference = " ".join(f"w{k}" for k in range(12))
    found = rewards.correlations(scored, words, [reference] * 2)
    (of,) = [r for r in found["rows"] if r["score"] == "log-likelihood" and r["metric"] == "rouge1"]
    assert of["all"] == pytest.approx(1) and of["per_prompt"] == pytest.approx(1)
    assert all(r["all"] is None for r in found["rows"] if r["metric"] == "accuracy")  # all wrong
    assert found["telescoping"] < 1e-9 and found["finished"] == 12


# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------


def offline_trainer(run, model, tmp_path, steps=10):
    arguments = TrainingArguments(str(tmp_path), max_steps=steps, use_cpu=True, report_to="none")
    initial = copy.deepcopy(model)
    return OfflineTrainer(run, initial, [2], model=model, args=arguments)


@pytest.mark.parametrize("build", [llama, t5])
def test_the_loss_is_that_of_the_settings(build, tmp_path):
    run = Run(
        "iqlearn", 0.3, gamma=0.9, entropy_coef=0.05, z_loss=0.01, value_head=True, kl=0.2, warmup=0
    )
    model = build()
    trainer = offline_trainer(run, model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial policy
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    inputs = collate(examples(model))
    labels = inputs.pop("labels")
    if model.config.is_encoder_decoder:  # as the study's collator does
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    loss = trainer.compute_loss(model, {**inputs, "labels": labels})
    exact, first = (copy.deepcopy(m).double() for m in (model, trainer.initial))
    shift = not model.config.is_encoder_decoder
    seen = []
    exact.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        outputs = exact(**inputs)
        values = exact.value_head(seen[0])[..., 0]
        wanted, rows = naive.loss(
            "iqlearn_loss", outputs.logits, labels, shift=shift, lam=0.3, gamma=0.9,
            entropy_coef=0.05, z_loss=0.01, eos_token_id=2, values=values,
        )  # fmt: skip
        ours, theirs = outputs.logits.log_softmax(-1), first(**inputs).logits.log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    scored = torch.tensor([[row.label is not None for row in sequence] for sequence in rows])
    wanted = wanted + 0.2 * kl[scored].mean()
    # float32 against float64: some 1e-6 of a loss of about 5
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_divergence_of_a_policy_from_itself_is_0():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 4]])
    assert divergence(logits, logits, labels, two_parts=False).item() == pytest.approx(0, abs=1e-6)


def test_lam_waits_and_is_annealed(tmp_path):
    trainer = offline_trainer(Run("iqlearn", 0.4, warmup=0.2, anneal=0.5), llama(), tmp_path)
    found = []
    for trainer.state.global_step in range(11):
        found.append(trainer.lam())
    wanted = [0, 0, 0.4, 0.4, 0.4, 0.4, 0.32, 0.24, 0.16, 0.08, 0]
    assert found == pytest.approx(wanted, abs=1e-6)


# -------------------------------------------------------------------------------------------------
# From end to end
# -------------------------------------------------------------------------------------------------

CONFIG = """
title = "Everything"
paper = "Figure 2"
says = "A test."
columns = ["nll", "accuracy", "accuracy_calculator", "self_bleu", "entropy", "length"]
plot = { kind = "scatter", x = "length", y = "nll" }
decodings = [{ temperature = 1.0 }, { beams = 2 }]
rewards = true

[[runs]]
label = "MLE"

[[runs]]
label = "IQLearn"
loss = "iqlearn"
lam = 0.1
value_head = true
kl = 0.1

[[runs]]
label = "online"
loss = "online"
lam = 0.1
alpha = 0.1

[[runs]]
label = "GAIL"
loss = "gail"
mle_weight = 1.0
architecture = "encoder-decoder"
"""


def test_a_study_is_run_once_and_reported_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "pareto.toml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setattr(run_study, "CONFIGS", tmp_path)
    out = tmp_path / "out"
    arguments = ["run_study.py", "--quick", "--only", "pareto", "--seeds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--jobs", "2"])
    run_study.main()
    page = (out / "study.md").read_text(encoding="utf-8")
    for label in ("MLE", "IQLearn", "online", "GAIL"):
        assert re.search(rf"^\| {label} \| T=1 \| \d+\.\d{{3}} \|", page, re.MULTILINE), label
    assert "python examples/run_study.py --quick --only pareto --seeds 1\n" in page
    assert str(tmp_path) not in page
    assert "- Best NLL: " in page and "- Length nearest to that of held-out answers (" in page
    assert "| *held-out answers* |" in page and "summed to their log-likelihood" in page
    assert (out / "study" / "pareto.png").stat().st_size > 10_000
    records = [json.loads(p.read_text(encoding="utf-8")) for p in out.glob("*/seed-0.json")]
    assert len(records) == 4
    for record in records:
        assert record["decodings"].keys() == {"T=1", "beam 2"}
        assert record["curve"][-1]["nll"] == pytest.approx(record["held_out"]["nll"], rel=1e-6)

    assert all(record["cpu_seconds"] > 0 for record in records)
    assert {p.name for p in (out / "start").glob("*.json")} == {
        "decoder-0.json", "encoder-decoder-0.json"
    }  # fmt: skip

    def trained(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(work, "fine_tune", trained)
    monkeypatch.setattr(sys, "argv", arguments)
    first, last = run_study.page.BY_HAND
    hand = f"{first}\n\nWritten by hand.\n\n{last}"
    page = page.replace("\n\n## ", f"\n\n{hand}\n\n## ", 1)
    (out / "study.md").write_text(page, encoding="utf-8")
    run_study.main()  # all results are there, and what was written by hand stays
    assert (out / "study.md").read_text(encoding="utf-8") == page
    next(out.glob("mle-*/seed-0.json")).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        run_study.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "7"])
    with pytest.raises(ValueError, match="holds results with sizes="):
        run_study.main()
    capsys.readouterr()


def test_what_was_not_measured_is_missed(tmp_path):
    results = Results(tmp_path, {"data": "d"})
    run = Run()
    assert results.read(run, 0) is None and lacks(None, [], False)
    results.write(run, 0, {"decodings": {"T=1": {}}})
    record = results.read(run, 0)
    assert not lacks(record, ["T=1"], False)
    assert lacks(record, ["T=1", "beam 4"], False) and lacks(record, [], True)
    assert Decoding(top_p=0.9).name == "top-p 0.9"


def test_runs_are_compared_with_the_baseline_seed_by_seed(tmp_path):
    results = Results(tmp_path, {})
    runs = {
        "base": Run(),
        "same": Run(kl=1),
        "long": Run(kl=2),
        "short": Run(kl=3),
        "one": Run(kl=4),
    }
    more = {"base": [0, 0, 0], "same": [1, -1, 0.5], "long": [1, 1.5, 2], "short": [-3, -2, -3]}
    for label, run in runs.items():
        for seed, difference in enumerate(more.get(label, [9])):
            # the seeds are further apart than the runs
            found = {"length": 40 + 20 * seed + difference}
            results.write(run, seed, {"held_out": {}, "decodings": {"T=1": found}})
    experiment = Experiment("n", "", "", "", runs, [Decoding()], ["length"], baseline="base")
    (said,) = findings.against(experiment, results, [0, 1, 2])
    assert said == "Length beside *base*: like it: *same*; shorter: *short*; longer: *long*."
    assert findings.difference(experiment, results, [0, 1, 2], "long", "length") == pytest.approx(
        (1.5, 0.5 / 3**0.5)
    )
    assert findings.against(experiment, results, [0]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "train.jsonl"], "accepted: both, or neither"),
        (["--paper", "--model", "m"], "accepted: all three"),
        (["--jobs", "0"], "--jobs: 0 given"),
    ],
)
def test_the_command_line_asks_for_what_belongs_together(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_study.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_study.parse()
    assert said in capsys.readouterr().err
