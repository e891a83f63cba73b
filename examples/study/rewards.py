"""Table 2: do the rewards of a model's own answers go with the task's metrics?"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import spearmanr

from study.tasks import is_correct

GAMMAS = (1.0, 0.99, 0.95, 0.9, 0.5, 0.0)


def rewards_at(one: Any, gamma: float) -> list[float]:
    """r_t = Q_t - gamma V' of an answer that was scored at gamma = 1."""
    q = [v + logp for v, logp in zip(one.value, one.logprob, strict=True)]
    return [x - gamma * (x - r) for x, r in zip(q, one.reward, strict=True)]


def discounted(rewards: Sequence[float], gamma: float) -> float:
    """The sum of gamma^t r_t."""
    return math.fsum(gamma**t * r for t, r in enumerate(rewards))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where either is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def per_prompt(
    groups: Sequence[Sequence[float]], metric: Sequence[Sequence[float]]
) -> float | None:
    """The mean over prompts of the correlation within each, where there is one."""
    pairs = zip(groups, metric, strict=True)
    found = [r for x, y in pairs if (r := spearman(x, y)) is not None]
    return statistics.fmean(found) if found else None


def correlations(
    scored: Sequence[Sequence[Any]], answers: Sequence[Sequence[str]], references: Sequence[str]
) -> dict[str, Any]:
    """Correlations of rewards with accuracy and ROUGE-1, over all answers and within prompts.

    Args:
        scored: the statistics at gamma = 1 of the answers to each prompt.
        answers: the same answers as text.
        references: the right one to each prompt.

    Returns:
        ``rows``, one for each score (rewards summed or discounted, for each gamma, and the
        log-likelihood) and metric; ``telescoping``, the largest |sum r - (log pi + V_0)| at gamma
        = 1 over finished answers.
    """
    rouge = RougeScorer(["rouge1"], use_stemmer=False)
    grouped = list(zip(answers, references, strict=True))
    metrics = {
        "accuracy": [[float(is_correct(x, ref)) for x in group] for group, ref in grouped],
        "rouge1": [[rouge.score(ref, x)["rouge1"].fmeasure for x in g] for g, ref in grouped],
    }
    scores: dict[tuple[str, float | None], list[list[float]]] = {
        ("log-likelihood", None): [[one.likelihood for one in group] for group in scored]
    }
    for gamma in GAMMAS:
        rewards = [[rewards_at(one, gamma) for one in group] for group in scored]
        scores["summed", gamma] = [[math.fsum(r) for r in group] for group in rewards]
        scores["discounted", gamma] = [[discounted(r, gamma) for r in group] for group in rewards]
    rows = [
        {
            "score": name,
            "gamma": gamma,
            "metric": metric,
            "all": spearman(flat(of), flat(values)),
            "per_prompt": per_prompt(of, values),
        }
        for (name, gamma), of in scores.items()
        for metric, values in metrics.items()
    ]
    ends = [one for group in scored for one in group if one.finished]
    gaps = [abs(one.total - (one.likelihood + one.value[0])) for one in ends]
    return {"rows": rows, "telescoping": max(gaps, default=0.0), "finished": len(ends)}


def flat(groups: Sequence[Sequence[float]]) -> list[float]:
    """All of them in one list."""
    return [x for group in groups for x in group]
