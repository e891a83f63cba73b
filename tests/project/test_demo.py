"""The demo: what it reads, what it measures, and one run of it from end to end."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "finetune_transformers.py"
sys.path.insert(0, str(DEMO.parent))  # the examples are scripts, not a package

import command_line  # noqa: E402
import diversity  # noqa: E402
import figure  # noqa: E402
import finetune_transformers  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import run_record  # noqa: E402
import text_data  # noqa: E402
from text_data import DataError, Pair  # noqa: E402

WORDS = [f"w{i}" for i in range(250)]


def chat(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"says {role}"} for role in roles]}


ROWS = {
    "prompt": ({"prompt": "Two?", "completion": "2"}, Pair("Two?\n", "2")),
    "question": ({"question": "One?", "answer": "1\n#### 1"}, Pair("One?\n", "1\n#### 1")),
    "messages": (
        chat("system", "user", "assistant"),
        Pair("system: says system\nuser: says user\nassistant:\n", "says assistant"),
    ),
    "other fields": (
        {"id": 7, "prompt": "p", "completion": "c", "question": None},
        Pair("p\n", "c"),
    ),
}


# Reading


@pytest.mark.parametrize("form", ROWS)
def test_every_form_of_row_is_read(form, tmp_path):
    row, expected = ROWS[form]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    assert text_data.load_pairs(path, seed=0) == [expected]


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.jsonl"])
def test_a_byte_order_mark_and_capitals_in_the_suffix_are_accepted(name, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(ROWS["prompt"][0]), encoding="utf-8-sig")
    assert path.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert text_data.load_pairs(path, seed=0) == [ROWS["prompt"][1]]
    text = tmp_path / "text.TXT"
    text.write_text(" ".join(WORDS[:20]), encoding="utf-8-sig")
    assert text_data.load_pairs(text, seed=0)[0].prompt.startswith("w0 w1")


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a\u2028b", "completion": "c\x85d"}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert text_data.load_pairs(path, seed=0) == [Pair("a\u2028b\n", "c\x85d")]


def test_text_is_split_at_blank_lines_and_long_documents_are_cut(tmp_path):
    path = tmp_path / "text.txt"
    documents = [" ".join(WORDS[:20]), " ".join(WORDS[:5]), " ".join(WORDS), " ".join(WORDS[:20])]
    path.write_text(" \n\t\n".join(documents), encoding="utf-8")
    pairs = sorted(text_data.load_pairs(path, seed=0), key=lambda pair: len(pair.completion))
    # 20 words; too few words; 250 words in windows of 100, 100 and 50; the first one again.
    assert [len(pair.prompt.split()) for pair in pairs] == [8, 8, 8, 8]
    assert sorted(len(pair.completion.split()) for pair in pairs) == [12, 42, 92, 92]
    assert pairs[0] == Pair(" ".join(WORDS[:8]), " " + " ".join(WORDS[8:20]))


def test_the_documentation_is_there_and_repeats_no_completion():
    pairs = text_data.load_pairs(None, seed=3)
    assert len(pairs) > 500
    assert len({pair.completion for pair in pairs}) == len(pairs)
    assert pairs == text_data.load_pairs(None, seed=3) != text_data.load_pairs(None, seed=4)


BAD = {
    "suffix": ("rows.csv", "a,b", "rows.csv: the suffix '.csv'"),
    "a bad byte behind a mark": (
        "rows.txt",
        b"\xef\xbb\xbfab\xff",
        "rows.txt: byte 5 is not UTF-8",
    ),
    "no file": ("rows.jsonl", None, "rows.jsonl: cannot be read (No such file"),
    "not UTF-8": ("rows.txt", b"abc\xff", "rows.txt: byte 3 is not UTF-8"),
    "not JSON": (
        "rows.jsonl",
        '{"prompt": "a", "completion": "b"}\n{',
        "rows.jsonl, line 2: not J",
    ),
    "a list": ("rows.jsonl", "[1]", "rows.jsonl, line 1: a JSON list"),
    "unknown fields": (
        "rows.jsonl",
        '\n{"text": "a"}',
        "line 2: an object with the fields ['text']",
    ),
    "a number": ("rows.jsonl", '{"prompt": "a", "completion": 3}', "line 1: 'completion' is 3"),
    "no text": ("rows.jsonl", '{"question": " ", "answer": "b"}', "line 1: 'question' is ' '"),
    "messages": ("rows.jsonl", '{"messages": "hello"}', 'line 1: "messages" is not a list'),
    "one message": ("rows.jsonl", json.dumps(chat("assistant")), "the roles ['assistant']"),
    "user last": ("rows.jsonl", json.dumps(chat("assistant", "user")), "'user'], not ending"),
    "no content": ("rows.jsonl", '{"messages": [{"role": "user"}]}', "'content' is None"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_file_the_line_and_what_is_accepted(case, tmp_path):
    name, content, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        text_data.load_pairs(tmp_path / name, seed=0)
    assert message in str(error.value)
    assert ".jsonl  one JSON object per line" in str(error.value)


def test_too_few_pairs_are_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i : i + 20]) for i in range(39)), encoding="utf-8")
    with pytest.raises(DataError, match=r"text.txt: 39 usable pairs, the demo needs 40"):
        text_data.prepare(path, seed=0, held_out=8, vocab_size=300, max_length=32)


# Tokens


def test_labels_mask_the_prompt_and_end_with_the_end_token():
    pairs = text_data.load_pairs(None, seed=0)
    tokenizer = text_data.train_tokenizer(pairs, vocab_size=512)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    row = text_data.encode(tokenizer, pairs[0], max_length=10_000)
    prompt = len(text_data.prompt_of(row))
    assert tokenizer.decode(row["input_ids"][:prompt]) == pairs[0].prompt
    assert row["labels"][:prompt] == [-100] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert tokenizer.decode(row["labels"][prompt:-1]) == pairs[0].completion
    assert row["labels"][-1] == tokenizer.eos_token_id

    cut = text_data.encode(tokenizer, pairs[0], max_length=16)
    assert cut["input_ids"] != row["input_ids"][:16] or prompt <= 8
    assert len(cut["labels"]) == len(cut["input_ids"]) == 16
    assert tokenizer.eos_token_id not in cut["labels"]
    assert max(cut["labels"]) >= 0  # however long the prompt is, a completion is left

    rows = text_data.packed(tokenizer, pairs[:20], length=32)
    tokens = [token for packed in rows for token in packed["input_ids"]]
    assert tokens[: len(row["input_ids"])] == row["input_ids"]
    assert all(len(packed["labels"]) == 32 for packed in rows)


def test_held_out_text_is_measured_as_samples_are():
    rows = [
        {"labels": [-100, 5, 6, 7, 3]},  # three tokens and the end
        {"labels": [-100, -100, 5, 6, 7, 8, 9, 3]},  # five: cut after four
        {"labels": [-100, 5, 6]},  # no end: cut when the data was read
        {"labels": [5, 6, 7, 8, 3]},  # four tokens, and the end would be the fifth
    ]
    text = text_data.Text(SimpleNamespace(eos_token_id=3), start=[], train=[], held_out=rows)
    assert text.reference(longest=4) == ((3 + 4 + 2 + 4) / 4, 3 / 4)


# Measuring


def test_self_bleu_of_equal_and_of_unlike_samples():
    same, unlike = "one two three four five", "six seven eight nine ten"
    assert diversity.self_bleu([[same, same, same]]) == pytest.approx(100)
    # sacrebleu smooths counts of zero, so that unlike texts do not get 0 exactly
    assert diversity.self_bleu([[same, unlike]]) < 15
    assert diversity.self_bleu([[same, ""]]) == 0


def test_the_spread_of_times_is_that_of_their_middle_half():
    # outliers move neither the median nor the quartiles
    spread = run_record.spread([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert spread == (3.0, (2.0, 4.0))


def test_loss_megabytes_counts_what_the_loss_holds():
    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.ones(4, 64, 1000))

        def loss_function(self, logits, labels, vocab_size):
            return logits.exp().sum()

    batch = {"input_ids": torch.zeros(4, 64), "labels": torch.zeros(4, 64)}
    # exp(logits) is kept for the gradient, and the gradient itself: 2 x 4 x 64 x 1000 float32
    assert measure.loss_megabytes(Model(), batch) == pytest.approx(2.048, rel=0.01)


# The command line


def parsed(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments])
    return command_line.parse(
        None,
        full=finetune_transformers.FULL,
        quick=finetune_transformers.QUICK,
        lams=finetune_transformers.LAMS,
        out=finetune_transformers.OUT,
        head_lams=finetune_transformers.HEAD_LAMS,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lams", "-1"),
        ("--lams", "0", "0"),
        ("--head-lams", "0"),
        ("--head-lams", "1", "1"),
        ("--gamma", "1.5"),
        ("--steps", "0"),
    ],
)
def test_bad_options_are_named(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(monkeypatch, *arguments)
    message = capsys.readouterr().err
    assert f"{arguments[0]}: " in message and "accepted" in message


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        parsed(monkeypatch, "--help")
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if re.match(r"  (-h, )?--", line)]
    named = {re.search(r"--[a-z-]+", line)[0] for line in options}
    assert {"--data", "--lams", "--seed", "--out", "--overwrite", "--save-models"} <= named
    # what an option is called, its argument, and then at least three words
    assert not [line for line in options if not re.search(r"\S  +\S+( \S+){2,}", line)]


def test_the_value_head_has_a_run_of_its_own_unless_losses_are_named(monkeypatch):
    assert parsed(monkeypatch)[0].head_lams == [0.1]
    assert parsed(monkeypatch, "--lams", "0")[0].head_lams == []
    asked, _ = parsed(monkeypatch, "--lams", "0", "--head-lams", "0.2")
    assert asked.lams == [0.0] and asked.head_lams == [0.2]
    assert command_line.run_name(asked) == "pydoc_lam-0_head-0.2_gamma-1"


def test_fewer_steps_shorten_the_pre_training_too(monkeypatch):
    full = finetune_transformers.FULL
    assert parsed(monkeypatch)[1] == full
    _, few = parsed(monkeypatch, "--steps", "20")
    assert few == full._replace(steps=20, start_steps=60)
    assert parsed(monkeypatch, "--steps", "1", "--quick")[1].start_steps == 1


def test_every_comparison_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console, folders = Console(quiet=True), []
    asked = [
        (),
        (),
        ("--data", "my.jsonl"),
        ("--lams", "0", "0.2"),
        ("--gamma", "0.9"),
        ("--steps", "3"),
    ]
    for arguments in asked:
        options, _ = parsed(monkeypatch, *arguments)
        with command_line.run_folder(options, console) as folder:
            (folder / "results.json").write_text("{}")
        folders.append(folder.as_posix())
    first = "runs/demo/pydoc_lam-0-0.05-0.1-0.5_gamma-1"
    assert folders[:2] == [first, f"{first}_2"]
    assert folders[2] == "runs/demo/my_lam-0-0.05-0.1-0.5_gamma-1"
    assert len(set(folders)) == len(folders)


def test_two_runs_at_a_time_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, _ = parsed(monkeypatch)
    console = Console(quiet=True)
    with (
        command_line.run_folder(options, console) as one,
        command_line.run_folder(options, console) as other,
    ):
        assert one != other
    assert not one.exists() and not other.exists()  # nothing was written into them


def test_results_are_not_overwritten_unless_asked(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert parsed(monkeypatch, "--out", str(out))[0].out == out
    out.mkdir()
    (out / "notes.txt").touch()  # of the user, and no obstacle
    assert parsed(monkeypatch, "--out", str(out))[0].out == out
    (out / "results.json").touch()
    with pytest.raises(SystemExit, match="2"):
        parsed(monkeypatch, "--out", str(out))
    message = capsys.readouterr().err
    assert f"--out: {out} holds results.json of an earlier run" in message
    assert "--overwrite" in message
    assert parsed(monkeypatch, "--out", str(out), "--overwrite")[0].out == out
    with pytest.raises(SystemExit, match="2"):
        parsed(monkeypatch, "--out", str(out / "notes.txt"))
    assert "is a file; a folder is accepted" in " ".join(capsys.readouterr().err.split())


# From end to end


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_quick_run_leaves_a_table_a_figure_and_finite_numbers(tmp_path):
    out = tmp_path / "out"
    losses = ("--lams", "0", "0.5", "--head-lams", "0.5")
    options = ("--quick", *losses, "--gamma", "0.9", "--save-models")
    finished = run(*options, "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # no warnings
    for word in ("NLL", "TD²", "Self-", "MLE", "IQLearn λ=0.5", "One seed"):
        assert word in finished.stdout
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "report.png").stat().st_size > 20_000
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [run["lam"] for run in results["runs"]] == [0.0, 0.5, 0.5]
    assert [run["value_head"] for run in results["runs"]] == [False, False, True]
    assert all(map(math.isfinite, numbers(results)))
    for one in results["runs"]:
        # one starting point; TD² is that of the head's values, where there is one
        same = 2 if one["value_head"] else 3
        assert one["curve"][0][:same] == results["runs"][0]["curve"][0][:same]
        assert one["curve"][-1] == [results["steps"], one["nll"], one["td"]]
        low, high = one["loss_ms_quartiles"]
        assert 0 < low <= one["loss_ms"] <= high
        assert one["loss_mb"] > 0 and one["step_ms"] > 0
        assert 0 <= one["unfinished"] <= 1 and 0 <= one["length"] <= results["max_new_tokens"]
        assert 0 <= one["self_bleu"] <= 100 and one["td"] >= 0 and one["entropy"] > 0
        weights = load_file(out / one["model"] / "model.safetensors")
        head = [x.numel() for name, x in weights.items() if name.startswith("value_head.")]
        assert sum(head) == (results["hidden_size"] + 1 if one["value_head"] else 0)
        assert sum(x.numel() for x in weights.values()) - sum(head) == results["parameters"]
        assert LlamaForCausalLM.from_pretrained(out / one["model"]).vocab_size == 512
    curves = [str(run["curve"]) for run in results["runs"]]
    assert len(set(curves)) == len(curves)  # the losses were taken up
    assert {"torch", "transformers", "irl_ops"} <= results["versions"].keys()
    samples = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert [len(one["samples"]) for one in samples] == [results["prompts"]] * 3


def test_a_bad_file_ends_in_one_message(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{", encoding="utf-8")
    finished = run("--quick", "--data", str(path), cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"error: {path}, line 1: not JSON")
    assert not list((tmp_path / "runs" / "demo").iterdir())  # no folder of a run is left
    assert "Traceback" not in finished.stderr


def two_runs() -> list[run_record.Run]:
    common = dict(entropy=1.0, step_ms=1.0, samples={})
    curve = [run_record.Point(0, 3.0, 20.0)]
    mle = dict(nll=2.0, td=9.0, self_bleu=4.0, length=10.0, unfinished=0.0)
    iqlearn = dict(nll=2.5, td=1.0, self_bleu=3.0, length=20.0, unfinished=0.25)
    return [
        run_record.Run(0.0, [*curve, run_record.Point(5, 2.0, 9.0)], **mle, **common),
        run_record.Run(0.1, [*curve, run_record.Point(5, 2.5, 1.0)], **iqlearn, **common),
    ]


FACTS = {
    "seed": 0,
    "gamma": 1.0,
    "data": "my.jsonl",
    "parameters": 1_000_000,
    "held_out": 5,
    "max_new_tokens": 128,
    "reference_length": 12.0,
    "reference_cut": 0.125,
}


def test_the_words_follow_the_numbers():
    runs = two_runs()
    words = "\n".join(report.read_the_numbers(runs, FACTS))
    assert "NLL: lowest with MLE (2.000), highest with IQLearn λ=0.1 (2.500)." in words
    assert "residual: lowest with IQLearn λ=0.1 (1.00), highest with MLE (9.00)." in words
    assert "samples: lowest with MLE (10.0), highest with IQLearn λ=0.1 (20.0); held-" in words
    assert "held-out completions 12.0." in words
    assert "compare losses of like length only" in words
    assert "NLL: 2.000 with every loss." in report.read_the_numbers(runs[:1], FACTS)[0]


def test_the_figure_shows_td_and_length_and_says_how_to_read_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure.plt, "close", drawn.append)
    figure.draw(two_runs(), FACTS, tmp_path / "report.png")
    monkeypatch.undo()
    (one,) = drawn
    nll, td, _, length = one.axes
    assert [list(line.get_ydata()) for line in td.lines] == [[20.0, 9.0], [20.0, 1.0]]
    assert [list(line.get_ydata()) for line in nll.lines] == [[3.0, 2.0], [3.0, 2.5]]
    words = [" ".join(text.get_text() for text in axes.texts) for axes in one.axes]
    assert "10 tokens" in words[2] and "20 tokens" in words[2]  # beside each point
    assert "12 tokens, 12 % cut" in words[3] and "20 tokens, 25 % cut" in words[3]
    assert length.lines[0].get_xdata()[0] == 12.0  # held-out text, dashed
    phrases = ("Lower is", "falls as λ", "like length only", "near the dashed line")
    for phrase, panel in zip(phrases, words, strict=True):
        assert phrase in panel
    figure.plt.close(one)
