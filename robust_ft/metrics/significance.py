"""Whether a difference is more than chance: over seeds, and over the examples of a test set.

Mean and standard deviation over seeds are `robust_ft.report`'s.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from robust_ft.errors import UserError
from robust_ft.metrics.arg import RANDOM_BASELINES, relative_gain_weights

Scores = Mapping[Hashable, float]
"""The score of each example, by its id; 0 or 1 (or 100) where it is wrong or right."""

_BLOCK = 1 << 22  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class WelchTest:
    """Welch's t-test.

    Attributes:
        difference: Mean of the first minus mean of the second.
        statistic: t; infinite where neither varies and the means differ.
        degrees_of_freedom: By Welch and Satterthwaite; NaN where neither varies.
        p_value: Two-sided, 0..1.
    """

    difference: float
    statistic: float
    degrees_of_freedom: float
    p_value: float


def welch_t_test(first: Sequence[float], second: Sequence[float]) -> WelchTest:
    """Tests whether two methods differ, from the scores of their seeds.

    Args:
        first: At least two scores.
        second: At least two scores; neither their number nor their variance need be equal.

    Raises:
        UserError: A side has fewer than two scores.
    """
    for values in (first, second):
        if len(values) < 2:
            raise UserError(
                f"Welch's t-test needs at least two seeds of each method, not {len(values)}."
            )
    difference = float(np.mean(first) - np.mean(second))
    if len(set(first)) == len(set(second)) == 1:
        if first[0] == second[0]:
            return WelchTest(0.0, 0.0, math.nan, 1.0)
        return WelchTest(difference, math.copysign(math.inf, difference), math.nan, 0.0)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    variance = sum(parts)
    from scipy.special import stdtr  # a third of a second

    t = difference / math.sqrt(variance)
    weights = [part / variance for part in parts]  # before squaring: tiny variances underflow
    freedom = 1 / sum(
        weight**2 / (len(values) - 1)
        for weight, values in zip(weights, (first, second), strict=True)
    )
    return WelchTest(difference, t, freedom, float(2 * stdtr(freedom, -abs(t))))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """A paired bootstrap.

    Attributes:
        difference: First minus second, on the test set itself.
        low: 2.5th percentile of the difference over draws.
        high: 97.5th percentile.
        p_value: Share of draws in which the first is not better than the second (one-sided).
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(first: Scores, second: Scores, draws: int = 1000, seed: int = 0) -> Bootstrap:
    """Compares the mean scores of two models on one test set.

    Each draw takes as many examples as the test set has, with replacement, the same for both.

    Args:
        first: Scores of one model.
        second: Scores of the other on the same examples, in any order.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        UserError: No examples, or not the same ones on both sides.
    """
    differences = _differences("", first, second)
    rng = np.random.default_rng(seed)
    return summary_of_draws(float(differences.mean()), _resampled_means(differences, draws, rng))


def paired_bootstrap_arg(
    first: Mapping[str, Sequence[Scores]],
    second: Mapping[str, Sequence[Scores]],
    baselines: Mapping[str, float] = RANDOM_BASELINES,
    by_dataset: bool = False,
    draws: int = 1000,
    seed: int = 0,
) -> Bootstrap:
    """Compares the ARG of two models; examples are drawn anew for each template.

    Args:
        first: For each dataset, the scores (0 or 100) of one model under each of its templates.
        second: Of the other model, under the same templates in the same order.
        baselines: See `robust_ft.metrics.arg.average_relative_gain`.
        by_dataset: See `robust_ft.metrics.arg.average_relative_gain`.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        UserError: Datasets, templates or examples are not the same on both sides, or there are
            none.
    """
    sides = (first, second)
    numbers = [{dataset: len(scores) for dataset, scores in side.items()} for side in sides]
    if numbers[0] != numbers[1]:
        raise UserError(
            f"A paired bootstrap needs the same templates on both sides, not {numbers[0]} and "
            f"{numbers[1]}."
        )
    weights = relative_gain_weights(numbers[0], baselines, by_dataset)
    rng = np.random.default_rng(seed)
    difference, resampled = 0.0, np.zeros(draws)
    for dataset in sorted(first):
        for index, (one, other) in enumerate(zip(first[dataset], second[dataset], strict=True)):
            differences = _differences(f" under template {index} of {dataset}", one, other)
            difference += weights[dataset] * float(differences.mean())
            resampled += weights[dataset] * _resampled_means(differences, draws, rng)
    return summary_of_draws(difference, resampled)


def _differences(place: str, first: Scores, second: Scores) -> Float[np.ndarray, "examples"]:
    """Returns first minus second by example id, in an order that only depends on the ids."""
    if not first:
        raise UserError(f"A paired bootstrap needs examples{place}.")
    unpaired = sorted(map(str, first.keys() ^ second.keys()))
    if unpaired:
        raise UserError(
            f"A paired bootstrap needs the same examples on both sides{place}; "
            f"'{unpaired[0]}' is only on one ({len(unpaired)} are)."
        )
    return np.array([first[key] - second[key] for key in sorted(first, key=str)], np.float64)


def _resampled_means(
    values: Float[np.ndarray, "examples"], draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws"]:
    size = len(values)
    block = max(1, _BLOCK // size)
    means = [
        values[rng.integers(size, size=(min(block, draws - start), size))].mean(axis=1)
        for start in range(0, draws, block)
    ]
    return np.concatenate(means)


def summary_of_draws(difference: float, resampled: Float[np.ndarray, "draws"]) -> Bootstrap:
    """Summarizes the draws of a paired bootstrap.

    Args:
        difference: Difference of the two models on the test set itself.
        resampled: Difference of the two models in each draw.
    """
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Bootstrap(difference, float(low), float(high), float(np.mean(resampled <= 0)))
