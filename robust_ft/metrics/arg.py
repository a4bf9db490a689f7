"""ARG, average relative gain: how much better than chance a model is on many templates.

From continued pretraining for promptability, section 4, after Ye et al. 2021.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from robust_ft.errors import UserError, nearest

RANDOM_BASELINES: Mapping[str, float] = {
    "anli": 100 / 3,
    "cb": 100 / 3,
    "copa": 50.0,
    "hellaswag": 25.0,
    "rte": 50.0,
    "story_cloze": 50.0,
    "wic": 50.0,
    "winogrande": 50.0,
    "wsc": 50.0,
}
"""Accuracy of guessing on the evaluation datasets of P3; ANLI is its three rounds together."""


def average_relative_gain(
    accuracies: Mapping[str, Sequence[float]],
    baselines: Mapping[str, float] = RANDOM_BASELINES,
    by_dataset: bool = False,
) -> float:
    """Mean over templates of (accuracy - random baseline) / random baseline, in percent.

    Args:
        accuracies: 0..100, of each template of each dataset.
        baselines: Accuracy of guessing, 0..100, of each dataset.
        by_dataset: Average within datasets first, so that each counts the same whatever its number
            of templates. The paper's text says templates, its numbers come from code that does
            this.

    Returns:
        -100 (never right) and up; 0 is guessing.

    Raises:
        UserError: No accuracies, one that is not from 0 to 100, or a dataset without a baseline.
    """
    weights = relative_gain_weights(
        {dataset: len(values) for dataset, values in accuracies.items()}, baselines, by_dataset
    )
    gain = 0.0
    for dataset, values in accuracies.items():
        if not all(0 <= accuracy <= 100 for accuracy in values):  # also false for NaN
            raise UserError(f"ARG: accuracies must be from 0 to 100, not those of '{dataset}'.")
        gain += weights[dataset] * float(np.sum(np.asarray(values) - baselines[dataset]))
    return gain


def relative_gain_weights(
    templates: Mapping[str, int],
    baselines: Mapping[str, float] = RANDOM_BASELINES,
    by_dataset: bool = False,
) -> dict[str, float]:
    """Returns what one point of accuracy on one template of each dataset adds to ARG.

    Args:
        templates: Number of templates of each dataset.
        baselines: See `average_relative_gain`.
        by_dataset: See `average_relative_gain`.

    Raises:
        UserError: No templates, or a dataset without a baseline.
    """
    if not templates or not all(templates.values()):
        raise UserError("ARG: there are no accuracies to average.")
    for dataset in templates:
        if dataset not in baselines:
            raise UserError(
                f"ARG: the dataset '{dataset}' has no random baseline, only "
                f"{', '.join(baselines)} have.{nearest(dataset, baselines)}"
            )
    total = sum(templates.values())
    return {
        dataset: 100 / baselines[dataset] / (len(templates) * number if by_dataset else total)
        for dataset, number in templates.items()
    }
