"""Tests whether two methods differ: over seeds, and by a bootstrap over test examples."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from robust_ft import task_names
from robust_ft.metrics import resampling
from robust_ft.metrics.significance import Bootstrap, summary_of_draws, welch_t_test
from robust_ft.report.results import Column, selected_step
from robust_ft.report.runs import Run
from robust_ft.report.tradeoff import DRAWS


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Returns the p-value of Welch's t-test over seeds; None if a side has fewer than two."""
    if min(len(first), len(second)) < 2:
        return None
    return welch_t_test(first, second).p_value


class Draws:
    """Bootstrap draws: each test set is drawn once for all methods, so comparisons are paired."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Column, int], Float[np.ndarray, "draws examples"]] = {}
        self._scores: dict[tuple[str, str, int, Column], Float[np.ndarray, "draws"] | None] = {}

    def compare(
        self, first: Sequence[Run], second: Sequence[Run], column: Column, difference: float
    ) -> Bootstrap | None:
        """Compares two methods' predictions, seed by seed; None where predictions are missing."""
        others = {run.seed: run for run in second}
        differences = []
        for run in first:
            if run.seed in others:
                sides = [self._of(run, column), self._of(others[run.seed], column)]
                if sides[0] is None or sides[1] is None:
                    return None
                differences.append(sides[0] - sides[1])
        if not differences:
            return None
        return summary_of_draws(difference, np.mean(differences, axis=0))

    def _of(self, run: Run, column: Column) -> Float[np.ndarray, "draws"] | None:
        key = (str(run.directory), run.stages[-1], run.seed, column)
        if key not in self._scores:
            self._scores[key] = self._draw(run, column)
        return self._scores[key]

    def _draw(self, run: Run, column: Column) -> Float[np.ndarray, "draws"] | None:
        stage = run.stages[-1]
        task = task_names.with_shots(column.task, column.shots)
        step = selected_step(run, stage)
        files = [
            file for file in run.samples
            if (file.stage, file.step, file.name) == (stage, step, f"{task}-test")
        ]  # fmt: skip
        if not files or not resampling.known(column.metric):
            return None
        records = files[0].read()
        size = len(records)
        if (column, size) not in self._counts:
            drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), DRAWS)
            self._counts[column, size] = drawn.astype(np.float64)
        targets = [entry.get("references", [entry["target"]]) for entry in records]
        texts = [entry["prediction"] for entry in records]
        counts = self._counts[column, size]
        return resampling.resampled_scores(column.metric, targets, texts, counts)
