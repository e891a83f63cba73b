"""How much the samples of a prompt differ."""

import statistics
from collections.abc import Sequence

import sacrebleu


def self_bleu(groups: Sequence[Sequence[str]]) -> float:
    """Average the BLEU of each sample against the other samples of its prompt (0-100).

    Lower is more diverse. BLEU depends on length too, so read it next to the mean length.
    """
    return statistics.mean(
        sacrebleu.sentence_bleu(text, [*group[:i], *group[i + 1 :]]).score
        for group in groups
        for i, text in enumerate(group)
    )
