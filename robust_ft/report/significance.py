"""Tests whether two methods differ: over seeds, and by a bootstrap over test examples."""

import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from robust_ft import task_names
from robust_ft.metrics import resampling
from robust_ft.metrics.significance import Bootstrap, summary_of_draws, welch_t_test
from robust_ft.report.comparisons import DRAWS, Side
from robust_ft.report.results import Column


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns the p-value of Welch's t-test over seeds; None if a side has fewer than two."""
    if min(len(first), len(second)) < 2:
        return None
    return welch_t_test(first, second).p_value


def is_significant(p_value: float | None, bootstrap: Bootstrap | None) -> bool:
    """Whether a difference is significant at 5%, by both tests or the one that there is.

    Args:
        p_value: Of Welch's t-test over seeds.
        bootstrap: The paired one over test examples: significant where its interval is without 0.
    """
    over_seeds = p_value is None or p_value < 0.05
    over_examples = bootstrap is None or bootstrap.low > 0 or bootstrap.high < 0
    return over_seeds and over_examples and (p_value is not None or bootstrap is not None)


class Draws:
    """Bootstrap draws: each test set is drawn once for all methods, so comparisons are paired."""

    def __init__(self) -> None:
        self._records: dict[pathlib.Path, Sequence[Mapping[str, Any]]] = {}
        self._counts: dict[tuple[Column, int], Float[np.ndarray, "draws examples"]] = {}
        self._scores: dict[
            tuple[str, str, int | None, float | None, Column], Float[np.ndarray, "draws"] | None
        ] = {}

    def compare(
        self, first: Sequence[Side], second: Sequence[Side], column: Column, difference: float
    ) -> Bootstrap | None:
        """Compares two methods' predictions, seed by seed.

        None where predictions are missing, or are of other examples.
        """
        others = {side.run.seed: side for side in second}
        differences = []
        for side in first:
            if side.run.seed in others:
                other = others[side.run.seed]
                if side.parts(column) != other.parts(column):
                    return None
                if not self._same_examples(side, other, column):
                    return None
                drawn = self._of(side, column), self._of(other, column)
                if drawn[0] is None or drawn[1] is None:
                    return None
                differences.append(drawn[0] - drawn[1])
        if not differences:
            return None
        return summary_of_draws(difference, np.mean(differences, axis=0))

    def _of(self, side: Side, column: Column) -> Float[np.ndarray, "draws"] | None:
        scores = []
        for part in side.parts(column):
            key = (str(side.run.directory), side.stage, side.step, side.run.weight, part)
            if key not in self._scores:
                self._scores[key] = self._draw(side, part)
            score = self._scores[key]
            if score is None:
                return None
            scores.append(score)
        mean: Float[np.ndarray, "draws"] = np.mean(scores, axis=0)
        return mean if scores else None

    def _same_examples(self, side: Side, other: Side, column: Column) -> bool:
        return all(
            [entry["input"] for entry in self._read(side, part)]
            == [entry["input"] for entry in self._read(other, part)]
            for part in side.parts(column)
        )

    def _read(self, side: Side, column: Column) -> Sequence[Mapping[str, Any]]:
        """Returns the predictions on a task's test split, none if there is no file."""
        task = task_names.with_shots(column.task, column.shots)
        place = (side.stage, side.step, f"{task}-test")
        for file in side.run.samples:
            if (file.stage, file.step, file.name) == place:
                if file.path not in self._records:
                    self._records[file.path] = file.read()
                return self._records[file.path]
        return ()

    def _draw(self, side: Side, column: Column) -> Float[np.ndarray, "draws"] | None:
        records = self._read(side, column)
        if not records or not resampling.known(column.metric):
            return None
        size = len(records)
        if (column, size) not in self._counts:
            self._counts[column, size] = _multinomial(side, column, size)
        targets = [entry.get("references", [entry["target"]]) for entry in records]
        texts = [entry["prediction"] for entry in records]
        counts = self._counts[column, size]
        return resampling.resampled_scores(column.metric, targets, texts, counts)


def _multinomial(side: Side, column: Column, size: int) -> Float[np.ndarray, "draws examples"]:
    # Held-out tasks are averaged, so each is drawn independently of the others.
    held_out = any(r.task == column.task and r.role in ("held_out", "") for r in side.rows)
    task = f"{column.task} {column.shots}" if held_out and column.task != side.run.target else ""
    rng = np.random.default_rng(zlib.crc32(task.encode()))  # of "" that is 0
    return rng.multinomial(size, np.full(size, 1 / size), DRAWS).astype(np.float64)
