"""``irl-ops score``: against the float64 reference; interruptions; lines that cannot be scored."""

import copy
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from irl_ops import command
from irl_ops.integrations.transformers import apply_iqlearn
from irl_ops.score import picture, run
from irl_ops.score.batches import by_length
from irl_ops.score.lines import BadLineError, Fields, Item, item
from irl_ops.score.sampling import Sampling, sample
from irl_ops.score.scorer import Encoded, Scorer

from .. import naive
from .tiny_transformers import VOCAB, gemma2, llama, t5

# float32 models against a float64 copy; sums of some ten tokens, each within some 1e-6.
CLOSE = {"rel": 1e-4, "abs": 1e-4}
WORDS = [f"w{i}" for i in range(VOCAB - 4)]
EOS = 2


def tokenizer(**options):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names, **options)


BATCH = [
    Encoded([5, 6, 7], [8, 9, 10, EOS]),
    Encoded([5], [11, EOS]),
    Encoded([12, 13, 14, 15, 16], [4, 5, 6, 7, 8, 9]),  # not finished
]


def exact(model, one, gamma):
    """The statistics of one answer alone, by loops in float64."""
    labels = [*one.answer, -100]  # the last row is that of the state after the answer
    if model.config.is_encoder_decoder:
        logits = model(
            input_ids=torch.tensor([one.prompt]),
            decoder_input_ids=torch.tensor([[0, *one.answer]]),
        ).logits
    else:
        logits = model(input_ids=torch.tensor([[*one.prompt, *one.answer]])).logits
        logits = logits[:, len(one.prompt) - 1 :]
    found = naive.token_stats(logits, torch.tensor([labels]), gamma=gamma, eos_token_id=EOS)
    return {name: values[0, :-1].tolist() for name, values in found.items()}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("build", [llama, gemma2, t5])
def test_statistics_are_those_of_the_reference(build, stored):
    model = build()
    reference = copy.deepcopy(model).double().eval()
    scorer = Scorer(model, tokenizer(), gamma=0.9, stored_logits=stored)
    for one, scored in zip(BATCH, scorer.score(BATCH), strict=True):
        with torch.no_grad():
            wanted = exact(reference, one, 0.9)
        for name in ("value", "logprob", "entropy", "reward"):
            assert getattr(scored, name) == pytest.approx(wanted[name], **CLOSE), name
        assert scored.finished == (one.answer[-1] == EOS)
        assert scored.total == pytest.approx(sum(wanted["reward"]), **CLOSE)
        discounted = sum(0.9**t * r for t, r in enumerate(wanted["reward"]))
        assert scored.discounted == pytest.approx(discounted, **CLOSE)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("build", [llama, t5])
def test_a_saved_value_head_is_used(build, stored, tmp_path):
    model = apply_iqlearn(build(), value_head=True)
    with torch.no_grad():
        model.value_head.weight.copy_(torch.randn(1, 16))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    scorer = Scorer(again, tokenizer(), gamma=0.9, stored_logits=stored)
    seen = []
    exact_model = copy.deepcopy(model).double().eval()
    exact_model.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for one, scored in zip(BATCH, scorer.score(BATCH), strict=True):
        with torch.no_grad():
            logprob = exact(exact_model, one, 0.9)["logprob"]
            hidden = seen[-1][0, -len(one.answer) - 1 :]
            values = exact_model.value_head(hidden)[:, 0].tolist()
        following = [*values[1:-1], 0.0 if scored.finished else values[-1]]
        pairs = zip(values, logprob, following, strict=False)
        assert scored.value == pytest.approx(values[:-1], **CLOSE)
        assert scored.reward == pytest.approx([v + p - 0.9 * n for v, p, n in pairs], **CLOSE)


def test_rewards_telescope_at_gamma_1():
    scored = Scorer(llama(), tokenizer(), gamma=1.0).score(BATCH)
    for one in scored[:2]:
        assert one.total == pytest.approx(one.likelihood + one.value[0], **CLOSE)
    last = scored[2]  # less the value of the state at which it was cut
    assert last.total != pytest.approx(last.likelihood + last.value[0], **CLOSE)


def test_samples_end_at_the_end_token_and_are_scored_as_they_were_drawn():
    scorer = Scorer(llama(), tokenizer(), gamma=0.9)
    torch.manual_seed(1)
    groups = sample(scorer, [[5, 6, 7], [8]], Sampling(40, max_new_tokens=12))
    assert [len(group) for group in groups] == [40, 40]
    for prompt, group in zip([[5, 6, 7], [8]], groups, strict=True):
        for one, scored in zip(group, scorer.score(group), strict=True):
            assert one.prompt == prompt and EOS not in one.answer[:-1]
            assert scored.finished == (one.answer[-1] == EOS)
            assert len(one.answer) == 12 or scored.finished
    assert any(one.answer[-1] == EOS for group in groups for one in group)


def test_answers_are_cut_at_the_positions_of_the_model():
    scorer = Scorer(llama(max_position_embeddings=6), tokenizer())
    one = scorer.encode(Item("w1 w2", "w3 w4 w5 w6 w7"))
    assert one.length == 6 and EOS not in one.answer
    with pytest.raises(BadLineError, match="the prompt has 6 tokens, and max_length is 6"):
        scorer.encode(Item("w1 w2 w3 w4 w5 w6", "w1"))


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=f"{VOCAB} tokens, and the model 20"):
        Scorer(llama(vocab_size=20), tokenizer())


def test_pieces_of_a_character_are_shown_with_its_last(monkeypatch):
    scorer = Scorer(llama(), tokenizer())
    shown = {(4,): "\ufffd", (4, 5): "\ufffd", (4, 5, 6): "\u2019", (7,): "b"}
    monkeypatch.setattr(scorer.tokenizer, "decode", lambda ids, **_: shown[tuple(ids)])
    assert scorer.pieces([4, 5, 6, 7]) == ["", "", "\u2019", "b"]


def test_batches_hold_like_lengths_and_every_item():
    lengths = [3, 9, 1, 20, 8, 2]
    batches = list(by_length(lengths, lambda x: x, 18))
    assert sorted(i for batch in batches for i, _ in batch) == list(range(6))
    assert [[x for _, x in batch] for batch in batches] == [[20], [9, 8], [3, 2, 1]]


# -------------------------------------------------------------------------------------------------
# Lines
# -------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.mark.parametrize(
    ("line", "fields", "wanted"),
    [
        ('{"question": "a", "answer": "b"}', Fields(), Item("a", "b")),
        ('{"prompt": "a", "completion": "b", "question": 1}', Fields(), Item("a", "b")),
        ('\ufeff{"x": "a", "y": "b", "prompt": 1}', Fields("x", "y"), Item("a", "b")),
        ('{"question": "a"}', Fields(answers_wanted=False), Item("a", None)),
        (json.dumps({"messages": CHAT}), Fields(template=lambda m: f"{len(m)}"),
         Item("1", "w2", True)),
        (json.dumps({"messages": CHAT[:1]}), Fields(None, None, False, lambda m: f"{len(m)}"),
         Item("1", None, True)),
    ],
)  # fmt: skip
def test_every_form_of_line_is_read(line, fields, wanted):
    assert item(line.encode(), fields) == wanted


BAD = {
    b"{": "not JSON",
    b'"text"': "a JSON str; accepted: an object",
    b'{"prompt": "w1"}': "accepted: 'prompt' and 'completion' or 'question' and 'answer'",
    b'{"prompt": "w1", "completion": 3}': "'completion' is 3",
    b'{"prompt": "w1", "completion": " "}': "a string with text in it",
    b'{"prompt": "\xff", "completion": "w1"}': "byte 12 is not UTF-8",
    json.dumps({"messages": CHAT}).encode(): "no chat template",
}


@pytest.mark.parametrize("raw", BAD)
def test_what_is_wrong_with_a_line_is_said(raw):
    with pytest.raises(BadLineError) as said:
        item(raw, Fields())
    assert BAD[raw] in str(said.value)


def test_chats_must_end_with_the_assistant():
    with pytest.raises(BadLineError, match=r"the roles \['user'\]"):
        item(json.dumps({"messages": CHAT[:1]}).encode(), Fields(template=str))


# -------------------------------------------------------------------------------------------------
# The command
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    good = [
        json.dumps({"question": f"w{i} w1", "answer": " ".join(["w2"] * (i % 5 + 1))}).encode()
        for i in range(14)
    ]
    lines = [*good[:3], b"", *BAD, *good[3:]]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def score(saved, data, out, *arguments):
    given = ["--model", saved, "--data", str(data), "--out", str(out), "--device", "cpu"]
    return command.main(["score", *given, "--window", "4", *arguments])


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_lines_are_scored_or_reported(saved, data, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    html = tmp_path / "page.html"
    assert score(saved, data, out, "--gamma", "0.9", "--html", str(html)) == 1
    found = records(out)
    bad = records(out.with_name("scores.jsonl.bad.jsonl"))
    raw = data.read_bytes().splitlines()
    assert [one["line"] for one in bad] == list(range(5, 5 + len(BAD)))
    assert sorted(x["line"] for x in found + bad) == [n for n, x in enumerate(raw, 1) if x]
    for one, reason in zip(bad, BAD.values(), strict=True):
        assert reason in one["reason"]
    assert [one["line"] for one in found] == sorted(one["line"] for one in found)
    scorer = Scorer(llama(), tokenizer(), gamma=0.9)
    for one in found:
        row = json.loads(raw[one["line"] - 1])
        (alone,) = scorer.score([scorer.encode(Item(row["question"], row["answer"]))])
        assert one["per_token"]["reward"] == pytest.approx(alone.reward, **CLOSE)
        assert one["discounted_reward"] == pytest.approx(alone.discounted, **CLOSE)
        assert one["answer"] == row["answer"]
    printed = capsys.readouterr()
    assert "discounted reward at \u03b3 = 0.9, 14 answers" in printed.out
    assert f"{len(BAD)} lines could not be scored" in " ".join(printed.err.split())
    page = html.read_text(encoding="utf-8")
    assert "background-color" in page and "w2" in page


@pytest.mark.parametrize("sampled", [(), ("--sample", "2", "--max-new-tokens", "5")])
def test_an_interrupted_run_goes_on_to_the_same_file(saved, data, tmp_path, monkeypatch, sampled):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert score(saved, data, whole, *sampled) == 1
    windows = []
    work = run.Work.window

    def interrupted(self, window):
        windows.append(window)
        if len(windows) == 3:
            raise KeyboardInterrupt
        return work(self, window)

    monkeypatch.setattr(run.Work, "window", interrupted)
    assert score(saved, data, out, *sampled) == 130
    kept = out.read_bytes()
    assert 0 < len(kept) < whole.stat().st_size
    first = kept.splitlines(keepends=True)
    out.write_bytes(b"".join(first) + first[0][:30])  # the process died while it wrote
    scored = []
    batch = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, x: scored.extend(x) or batch(self, x))
    assert score(saved, data, out, *sampled) == 1
    assert records(out) == records(whole)
    assert len(scored) == len(records(whole)) - len(first)  # none was scored again
    bad = ".bad.jsonl"
    assert records(tmp_path / f"out.jsonl{bad}") == records(tmp_path / f"whole.jsonl{bad}")


def test_the_samples_of_a_half_written_line_are_drawn_again(saved, data, tmp_path):
    out = tmp_path / "out.jsonl"
    score(saved, data, out, "--sample", "3", "--max-new-tokens", "4")
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]))  # one of the three samples of the second line
    score(saved, data, out, "--sample", "3", "--max-new-tokens", "4")
    assert [(x["line"], x["sample"]) for x in records(out)] == [
        (x["line"], x["sample"]) for x in map(json.loads, lines)
    ]


def test_scores_of_other_settings_are_not_continued(saved, data, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    score(saved, data, out, "--gamma", "0.9")
    kept = out.read_bytes()
    assert score(saved, data, out, "--gamma", "0.8") == 2
    assert "made with gamma=0.9, and this run has 0.8" in capsys.readouterr().err
    assert out.read_bytes() == kept
    out.with_name("out.jsonl.run.json").unlink()
    assert score(saved, data, out, "--gamma", "0.9") == 2
    assert "without the settings that made it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--data": "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"--model": "./absent"}, "--model ./absent"),
        ({"--device": "nowhere"}, "--device nowhere"),
    ],
)
def test_what_is_not_there_is_named(saved, data, tmp_path, capsys, monkeypatch, changed, said):
    monkeypatch.chdir(tmp_path)
    given = {"--model": saved, "--data": str(data), "--out": "out.jsonl"} | changed
    assert command.main(["score", *[x for pair in given.items() for x in pair]]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_statistics_that_are_no_numbers_are_reported(saved, data, tmp_path, monkeypatch):
    batch = Scorer.score

    def broken(self, encoded):
        found = batch(self, encoded)
        found[0].value[0] = math.nan
        return found

    monkeypatch.setattr(Scorer, "score", broken)
    out = tmp_path / "out.jsonl"
    assert score(saved, data, out, "--answers-only", "--batch-tokens", "1") == 1
    bad = records(tmp_path / "out.jsonl.bad.jsonl")
    assert sum("not finite" in one["reason"] for one in bad) == 14 and not records(out)


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "FOR_SCORE", ("torch", "a_package_that_is_not_there"))
    assert command.main(["score", "--model", "m", "--data", "d", "--out", "o"]) == 2
    assert "irl-ops score needs a_package_that_is_not_there" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# The pictures
# -------------------------------------------------------------------------------------------------


def test_colours_tell_the_sign_and_the_size():
    assert picture.colour(0.0, 1.0).endswith("rgb(255,255,255)")
    assert picture.colour(5.0, 1.0).endswith("rgb({},{},{})".format(*picture.HIGH))
    assert picture.colour(-5.0, 1.0).endswith("rgb({},{},{})".format(*picture.LOW))


def test_a_histogram_counts_every_answer():
    table = picture.histogram("reward", [0.0, 0.0, 1.0, 4.0])
    assert sum(map(int, table.columns[2].cells)) == 4
    assert picture.histogram("reward", [3.0]).row_count == 1
