"""Share of predictions that equal a reference: accuracy for labels, exact match for answers."""

from collections.abc import Sequence

import numpy as np

from robust_ft.metrics.pairs import References, pairs


def accuracy(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that are their label, apart from space at the ends.

    Args:
      targets: the label of each example, or several that count as right.
      predictions: the predicted labels.

    Returns:
      {"accuracy": 0..100}.

    Raises:
      UserError: no examples, or not as many targets as predictions.
    """
    return {"accuracy": _percentage("accuracy", targets, predictions, str.strip)}


def exact_match(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that equal one of their references, whitespace apart.

    Runs of whitespace count as one space; case, punctuation and articles count.

    Args:
      targets: the reference of each example, or several of which any may match.
      predictions: the predicted texts.

    Returns:
      {"exact_match": 0..100}.

    Raises:
      UserError: no examples, or not as many targets as predictions.
    """
    return {"exact_match": _percentage("exact_match", targets, predictions, normalize_whitespace)}


def normalize_whitespace(text: str) -> str:
    """Makes every run of whitespace one space and removes it at the ends."""
    return " ".join(text.split())


def _percentage(name, targets, predictions, normalize) -> float:
    right = [
        normalize(prediction) in {normalize(reference) for reference in references}
        for references, prediction in pairs(name, targets, predictions)
    ]
    return 100 * float(np.mean(right))
