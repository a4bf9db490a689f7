"""The accuracies behind Propositions 1 and 2, of which benchmarks/theory.py has the tables."""

import functools

from robust_ft.analysis.logistic_regression import Experiment

EXPERIMENT = Experiment(classes=20, dim=8, examples=500)  # where its 1,000 steps converge
WEIGHTS = (0.0, 0.5, 1.0)
TEACHERS = 5


@functools.cache
def _experiments() -> list[dict[str, tuple[float, float]]]:
    return [EXPERIMENT.accuracies(seed, WEIGHTS) for seed in range(TEACHERS)]


def accuracies(model: str) -> list[float]:
    """Returns a model's accuracy on unseen classes, for each teacher."""
    return [found[model][1] for found in _experiments()]
