"""Scores of bootstrap resamples of a test set, without scoring any text twice.

A score of a test set is a function of sums over its examples: of n-gram counts for BLEU, of the
examples' own scores for metrics that are means. A draw needs only each example's summands.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from robust_ft import metrics
from robust_ft.metrics.bleu import (
    bleu_counts,
    bleu_of_counts,
    multi_bleu_counts,
    multi_bleu_of_counts,
    webnlg_bleu_counts,
)
from robust_ft.metrics.pairs import References

Counts = Callable[..., np.ndarray]
_SUMS: Mapping[str, tuple[Counts, Callable[..., float]]] = {
    "bleu": (bleu_counts, bleu_of_counts),
    "multi_bleu": (multi_bleu_counts, multi_bleu_of_counts),
    "webnlg_bleu": (webnlg_bleu_counts, multi_bleu_of_counts),
}
# Means over examples, by the name of a value and the metric that has it.
_MEANS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "exact_match": "exact_match",
    "rouge2": "rouge",
    "rouge2_stemmed": "rouge_stemmed",
    "token_f1": "token_f1",
    "trivia_qa_exact_match": "trivia_qa_exact_match",
}


def resampled_scores(
    value: str,
    targets: References,
    predictions: Sequence[str],
    counts: Float[np.ndarray, "draws examples"],
) -> Float[np.ndarray, "draws"]:
    """Returns the score of each draw.

    Args:
        value: The name of a metric's value, such as "bleu" or "rouge2".
        targets: The reference of each example, or several.
        predictions: The predicted texts.
        counts: How often each draw has each example.

    Raises:
        KeyError: The value is not `known`.
    """
    if value in _SUMS:
        summands, score = _SUMS[value]
        # [draws, examples] @ [examples, summands], in floats: rounded back to integers.
        sums = np.rint(counts @ summands(targets, predictions)).astype(np.int64)
        return np.array([score(row) for row in sums])
    metric = metrics.get(_MEANS[value])
    pairs = zip(targets, predictions, strict=True)
    scores = np.array([metric([target], [text])[value] for target, text in pairs])  # [examples]
    means: np.ndarray = counts @ scores / counts.sum(axis=1)  # [draws]
    return means


def known(value: str) -> bool:
    """Whether a metric's value is known to be a function of sums over examples."""
    return value in _SUMS or value in _MEANS
