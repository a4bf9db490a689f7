"""Accuracy and F1 of labels: short texts, compared exactly except for white space at their ends."""

from collections.abc import Sequence

import numpy as np

from robust_ft.errors import UserError
from robust_ft.metrics.pairs import References, pairs

POSITIVE = ("True", "true", "yes", "Yes", "1", "equivalent", "duplicate", "entailment")
"""Names of the positive label in tasks with two labels."""


def accuracy(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that are their label.

    Args:
        targets: The label of each example, or several that count as right.
        predictions: The predicted labels.

    Returns:
        {"accuracy": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    labels = _labels("accuracy", targets, predictions)
    return {"accuracy": 100 * float(np.mean([label == given for label, given in labels]))}


def binary_f1(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """F1 of the positive label, as GLUE reports for MRPC and QQP.

    Args:
        targets: The label of each example; the positive one is one of `POSITIVE`.
        predictions: The predicted labels.

    Returns:
        {"binary_f1": 0..100}.

    Raises:
        UserError: No examples, not as many targets as predictions, or no one label among the
            targets that is known to be positive.
    """
    labels = _labels("binary_f1", targets, predictions)
    present = sorted({label for label, _ in labels})
    positive = [label for label in present if label in POSITIVE]
    if len(positive) != 1:
        raise UserError(
            f"binary_f1: of the labels {', '.join(present[:5])} it cannot be told which one is "
            f"positive; it must be one of {', '.join(POSITIVE)}. macro_f1 takes any labels."
        )
    return {"binary_f1": 100 * _f1(labels, positive[0])}


def macro_f1(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Mean over the targets' labels of the F1 of each, as SuperGLUE reports for CB.

    Predictions that are no label count as errors, not as labels of their own.

    Args:
        targets: The label of each example, or several that count as right.
        predictions: The predicted labels.

    Returns:
        {"macro_f1": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    labels = _labels("macro_f1", targets, predictions)
    scores = [_f1(labels, label) for label in sorted({label for label, _ in labels})]
    return {"macro_f1": 100 * float(np.mean(scores))}


def _labels(name: str, targets: References, predictions: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (label, prediction) of each example; of several labels the predicted one counts."""
    result = []
    for references, prediction in pairs(name, targets, predictions):
        labels, given = [label.strip() for label in references], prediction.strip()
        result.append((given if given in labels else labels[0], given))
    return result


def _f1(labels: Sequence[tuple[str, str]], positive: str) -> float:
    hits = sum(label == predicted == positive for label, predicted in labels)
    num_predicted = sum(predicted == positive for _, predicted in labels)
    num_true = sum(label == positive for label, _ in labels)
    return 2 * hits / (num_predicted + num_true) if num_predicted + num_true else 0.0
