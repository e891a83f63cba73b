"""What is measured of a model: likelihood on held-out answers, and the quality of its own."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import sacrebleu
import torch
from diversity import self_bleu
from rouge_score.rouge_scorer import RougeScorer
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, set_seed

from irl_ops.score.batches import by_length
from irl_ops.score.scorer import Encoded, Scorer
from study.config import Decoding
from study.start import Sizes, Start
from study.tasks import calculated, is_correct

ROUGE = ("rouge1", "rouge2", "rougeLsum")
LAST = 32  # tokens in which a calculation is looked for


def scorer_of(start: Start, model: PreTrainedModel, gamma: float = 1.0) -> Scorer:
    """As that of the initial policy."""
    return Scorer(model, start.tokenizer, gamma=gamma, max_length=start.scorer.max_length)


def score_all(scorer: Scorer, items: Sequence[Encoded], tokens: int = 4096) -> list[Any]:
    """The statistics of answers, in their order."""
    found: list[Any] = [None] * len(items)
    for batch in by_length(items, lambda x: x.length, tokens):
        for (place, _), one in zip(batch, scorer.score([x for _, x in batch]), strict=True):
            found[place] = one
    return found


def held_out(start: Start, model: PreTrainedModel) -> dict[str, float]:
    """Mean NLL and entropy over the tokens of held-out answers; the squared TD residual at γ = 1.

    Values are those of the logits, or of the head that the model has for them.
    """
    scored = score_all(scorer_of(start, model), start.test)

    def mean(values: Any) -> float:
        return statistics.fmean(x for one in scored for x in values(one))

    return {
        "nll": -mean(lambda one: one.logprob),
        "entropy": mean(lambda one: one.entropy),
        "td": mean(lambda one: [r * r for r in one.reward]),
    }


class Calculator(LogitsProcessor):
    """Writes the result behind every ``<<...=``, as GSM8k's answers are meant to be generated."""

    def __init__(self, tokenizer: Any, prompt_length: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.prompt_length, self.ends = tokenizer, prompt_length, set(ends)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Leave one token possible in rows whose calculation is open."""
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if ids and ids[-1] in self.ends:
                continue
            rest = calculated(self.tokenizer.decode(ids[-LAST:], skip_special_tokens=True))
            if not rest:
                continue
            forced = self.first(rest)
            kept = scores[row, forced].clone()
            scores[row] = -torch.inf
            scores[row, forced] = torch.where(kept.isfinite(), kept, 0.0)
        return scores

    def first(self, rest: str) -> int:
        """The first token of what is to be written, within a word if the tokenizer has words."""
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        sign, behind = encode("="), encode("=" + rest)
        if behind[: len(sign)] == sign:
            return int(behind[len(sign)])
        return int(encode(rest)[0])


@torch.no_grad()
def generate(
    start: Start, model: PreTrainedModel, how: Decoding, sizes: Sizes, seed: int,
    calculator: bool = False,
) -> list[list[Encoded]]:  # fmt: skip
    """Answers to every test question; a beam gives one."""
    model.eval()
    set_seed(seed)
    tokenizer = start.tokenizer
    prompts = [one.prompt for one in start.test]
    found: list[list[Encoded]] = [[] for _ in prompts]
    number = 1 if how.beams > 1 else sizes.samples
    most = 64 * (sizes.max_length + sizes.max_new_tokens)

    def room(prompt: list[int]) -> int:
        return number * how.beams * (len(prompt) + sizes.max_new_tokens)

    for batch in by_length(prompts, room, most):
        inputs = tokenizer.pad(
            {"input_ids": [prompt for _, prompt in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        width = 1 if start.scorer.two_parts else inputs["input_ids"].shape[1]
        drawn = (
            {"do_sample": False, "num_beams": how.beams, "length_penalty": 0.6}
            if how.beams > 1
            else {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p,
                  "top_k": 0, "num_return_sequences": number}
        )  # fmt: skip
        if calculator:
            drawn["logits_processor"] = LogitsProcessorList(
                [Calculator(tokenizer, width, start.scorer.ends)]
            )
        made = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **drawn,
            max_new_tokens=sizes.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=start.scorer.ends,
        )[:, width:].tolist()  # fmt: skip
        for i, (place, prompt) in enumerate(batch):
            answers = made[i * number : (i + 1) * number]
            found[place] = [Encoded(prompt, until_end(x, start.scorer.ends)) for x in answers]
    return found


def until_end(answer: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its end token, which is kept."""
    for t, token in enumerate(answer):
        if token in ends:
            return answer[: t + 1]
    return answer


def texts(start: Start, groups: Sequence[Sequence[Encoded]]) -> list[list[str]]:
    """The answers to each question, as text."""
    decode = start.tokenizer.decode
    return [[decode(x.answer, skip_special_tokens=True) for x in group] for group in groups]


def quality(
    groups: Sequence[Sequence[str]], lengths: Sequence[int], ended: Sequence[bool],
    references: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """The metrics of answers, means over all; length and unfinished answers beside them.

    Args:
        groups: answers to each question.
        lengths: tokens of each answer, in the same order.
        ended: whether each has an end token.
        references: the right answer to each question.
    """
    pairs = [(x, ref) for group, ref in zip(groups, references, strict=True) for x in group]
    answers, right = map(list, zip(*pairs, strict=True))
    rouge = RougeScorer(ROUGE, use_stemmer=False)
    scores = [rouge.score(ref, x) for x, ref in pairs]
    found = {
        "accuracy": 100 * statistics.fmean(is_correct(x, ref) for x, ref in pairs),
        "bleu": sacrebleu.corpus_bleu(answers, [right]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [right]).score,
        **{name: 100 * statistics.fmean(s[name].fmeasure for s in scores) for name in ROUGE},
        "length": statistics.fmean(lengths),
        "unfinished": 100 * (1 - statistics.fmean(ended)),
    }
    if all(len(group) > 1 for group in groups):
        found["self_bleu"] = self_bleu(groups)
    return found


def measured(
    start: Start, model: PreTrainedModel, how: Decoding, sizes: Sizes, seed: int,
    references: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """``quality`` of generated answers, and accuracy with the calculator."""
    ends = set(start.scorer.ends)
    groups = generate(start, model, how, sizes, seed)
    flat = [one.answer for group in groups for one in group]
    ended = [answer[-1] in ends for answer in flat]
    lengths = [len(answer) - end for answer, end in zip(flat, ended, strict=True)]
    found = quality(texts(start, groups), lengths, ended, references)
    helped = texts(start, generate(start, model, how, sizes, seed, calculator=True))
    found["accuracy_calculator"] = 100 * statistics.fmean(
        is_correct(x, ref) for group, ref in zip(helped, references, strict=True) for x in group
    )
    return found
