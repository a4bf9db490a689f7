"""ROUGE (Lin 2004) as rouge-score computes it: mean F1 of n-grams and longest common subsequences.

ROUGE-2 comes first, as the one that papers on XSum report. Words are lower-cased runs of a-z and
0-9. ROUGE-Lsum takes each line of a text for a sentence; without line breaks it is ROUGE-L.
"""

from collections.abc import Sequence

import numpy as np

from robust_ft.metrics.pairs import References, pairs

_TYPES = ("rouge2", "rouge1", "rougeL", "rougeLsum")


def rouge(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE of words as they are, as T5's evaluation has it.

    Args:
        targets: The reference of each example, or several, of which the best one counts for each
            kind of ROUGE.
        predictions: The predicted texts.

    Returns:
        {"rouge2", "rouge1", "rougeL", "rougeLsum": mean F1, 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _scores(rouge_parts(targets, predictions), "")


def rouge_stemmed(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE of word stems (Porter), as the papers on BART and prefix-tuning have it.

    Args:
        targets: The reference of each example, or several (see `rouge`).
        predictions: The predicted texts.

    Returns:
        {"rouge2_stemmed", "rouge1_stemmed", "rougeL_stemmed", "rougeLsum_stemmed": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _scores(rouge_stemmed_parts(targets, predictions), "_stemmed")


def rouge_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the scores of `rouge`, and "..._precision" and "..._recall" of each, 0..100."""
    return _rouge("rouge", "", targets, predictions)


def rouge_stemmed_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the scores of `rouge_stemmed`, and "..._precision" and "..._recall" of each."""
    return _rouge("rouge_stemmed", "_stemmed", targets, predictions)


def _rouge(
    name: str, suffix: str, targets: References, predictions: Sequence[str]
) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_TYPES, use_stemmer=bool(suffix))
    scores = [
        scorer.score_multi(references, prediction)
        for references, prediction in pairs(name, targets, predictions)
    ]
    means = {
        kind + suffix: 100 * np.mean([score[kind] for score in scores], axis=0) for kind in _TYPES
    }
    return {
        **{kind: float(f1) for kind, (_, _, f1) in means.items()},
        **{f"{kind}_precision": float(precision) for kind, (precision, _, _) in means.items()},
        **{f"{kind}_recall": float(recall) for kind, (_, recall, _) in means.items()},
    }


def _scores(parts: dict[str, float], suffix: str) -> dict[str, float]:
    return {kind + suffix: parts[kind + suffix] for kind in _TYPES}
