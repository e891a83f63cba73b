"""The toy MDP: its dynamics, its exact success rates, and what the original objective gains."""

import json
import sys
from math import comb
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts, not a package

import toy_mdp  # noqa: E402
import toy_report  # noqa: E402
from toy_chain import NOISE, RIGHT, UP, chains  # noqa: E402
from toy_report import Result  # noqa: E402


def test_without_recovery_every_mistake_is_the_last():
    for length, horizon in ((4, 6), (8, 12), (3, 3)):
        best = chains(1, length, horizon).best()
        assert best[1].item() == pytest.approx((1 - NOISE) ** length, rel=1e-5)


def test_with_recovery_time_alone_is_short():
    """With one step to spare no mistake can be mended, which takes two; with two, one can."""
    assert chains(1, 4, 5).best()[0].item() == pytest.approx(0.9**4, rel=1e-5)
    one_mistake = comb(4, 1) * 0.1 * 0.9 * 0.9**4  # up, back, and all steps to the right
    assert chains(1, 4, 6).best()[0].item() == pytest.approx(0.9**4 + one_mistake, rel=1e-5)


def test_episodes_succeed_as_often_as_computed():
    chain = chains(2, 4, 7)
    torch.manual_seed(0)
    policy = torch.rand(4, chain.states, 2)
    policy /= policy.sum(-1, keepdim=True)
    states, actions = chain.episodes(policy, 4000)
    # An episode that reached green before the horizon has actions of -100; one that reached it with
    # its last step has none, so that a longer horizon is asked for one step less.
    sampled = (actions[..., -1] == -100).float().mean(-1)
    exact = chain._replace(horizon=6).success(policy)
    # five standard deviations of a rate over 4000 episodes
    torch.testing.assert_close(sampled, exact, rtol=0, atol=5 * 0.5 / 4000**0.5)
    assert states[..., 0].eq(0).all() and states.max() < chain.states


def test_the_demonstration_has_no_mistake():
    states, actions = chains(1, 3, 5).demonstration()
    assert actions.tolist() == [RIGHT] * 3 + [-100] * 2
    assert states[:3].tolist() == [0, 1, 2]
    assert UP != RIGHT


def test_every_copy_weighs_the_same():
    chain = chains(3, 4, 6)
    torch.manual_seed(0)
    states, actions = chain.episodes(torch.full((6, 8, 2), 0.5), 2)
    demonstration = [x.expand(6, 1, -1) for x in chain.demonstration()]
    rows = (torch.cat(pair, 1) for pair in zip(demonstration, (states, actions), strict=True))
    _, labels, is_expert, weights = toy_mdp.weighed(*rows)
    assert weights[labels == -100].eq(0).all()
    per_copy = weights.view(6, 3, 6)
    for group in (per_copy[:, :1], per_copy[:, 1:]):
        torch.testing.assert_close(group.sum((1, 2)), torch.ones(6))
    assert is_expert.view(6, 3).tolist() == [[True, False, False]] * 6


def negated(batch, alpha):
    return -toy_mdp.original(batch, alpha, semi_gradient=True)


def test_the_original_objective_learns_to_mend_mistakes():
    """A smaller run; 60 copies of the difference, which is about 11 points, are far from 6."""
    objectives = {"MLE": toy_mdp.mle, "eq": toy_mdp.OBJECTIVES["Eq. 16"]}
    objectives["semi"] = toy_mdp.OBJECTIVES["original, semi-gradient"]
    objectives["negated"] = negated
    found = toy_mdp.results(
        length=4, horizon=6, seeds=6, steps=120, alpha=0.5,
        models={"table": toy_mdp.Table}, objectives=objectives,
    )  # fmt: skip
    of = {(one.objective, one.recovery): one for one in found}
    semi, mle = of["semi", True], of["MLE", True]
    assert semi.gain[0] > 6
    assert toy_report.mean(semi.online)[0] > toy_report.mean(mle.offline)[0] + 0.06
    assert abs(of["semi", False].gain[0]) < 1
    assert of["eq", True].gain[0] < 3  # the paper's own equation does not
    assert toy_report.mean(of["negated", True].online)[0] < toy_report.mean(mle.offline)[0]


def test_the_words_follow_the_numbers(tmp_path):
    good = Result("table", "one", True, [0.7, 0.7], [0.85, 0.87])
    none = Result("table", "one", False, [0.4, 0.4], [0.4, 0.401])
    bad = Result("table", "two", True, [0.7, 0.7], [0.6, 0.62])
    lost = Result("table", "two", False, [0.4, 0.4], [0.2, 0.2])
    mle = [Result("table", "MLE", x, [0.5, 0.5], None) for x in (True, False)]
    assert good.gain == pytest.approx((16.0, 1.0))
    assert toy_report.reproduces(good, none) == "both"
    assert toy_report.reproduces(bad, lost) == "none"
    (said,) = toy_report.sentences([*mle, good, none, bad, lost])
    assert "none without: one. Not so: two." in said
    toy_report.draw([*mle, good, none, bad, lost], [0.9, 0.4], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_command_writes_table_figure_and_numbers(tmp_path, monkeypatch, capsys):
    arguments = ["--length", "3", "--horizon", "5", "--seeds", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["toy_mdp.py", *arguments, "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        toy_mdp.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "original, semi-gradient" in printed and "none" in printed
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(record["results"]) == 2 * 2 * len(toy_mdp.OBJECTIVES)
    assert (tmp_path / "toy_mdp.png").exists()
