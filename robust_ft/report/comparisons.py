"""Tests whether methods differ: on the target, on OOD data and on held-out tasks.

Each method's end is compared with the pretrained model and with each other method.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from robust_ft.report import results
from robust_ft.report.results import HELD_OUT, NORM_AVG, PRETRAINED, Column
from robust_ft.report.runs import Run
from robust_ft.summary import KEPT, Row

if TYPE_CHECKING:
    from robust_ft.metrics.significance import Bootstrap
    from robust_ft.report.significance import Draws

DRAWS = 1000  # of the bootstrap


class Side(NamedTuple):
    """One seed's model in a comparison: a run's at a step of a stage."""

    run: Run
    stage: str
    step: int | None

    @classmethod
    def end(cls, run: Run) -> "Side":
        """Returns what a run ended with."""
        stage = run.stages[-1]
        return cls(run, stage, results.selected_step(run, stage))

    @classmethod
    def pretrained(cls, run: Run) -> "Side":
        """Returns what a run began with."""
        return cls(run, run.stages[0], 0)

    @property
    def rows(self) -> list[Row]:
        """The results on test splits."""
        place = (self.stage, self.step, "test")
        return [row for row in self.run.rows if (row.stage, row.step, row.split) == place]

    def value(self, column: Column) -> float | None:
        return next((row.value for row in self.rows if Column.of(row) == column), None)

    def parts(self, column: Column) -> tuple[Column, ...]:
        """Returns the columns that a column is the mean of: of a Norm. Avg. the tasks' scores."""
        if column.task != HELD_OUT:
            return (column,)
        parts: dict[str, Column] = {}
        for row in self.rows:
            if _is_held_out(row, self.run) and row.shots == column.shots:
                parts.setdefault(row.task, Column.of(row))  # a task's first metric is its score
        return tuple(parts.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods, or a method and the pretrained model, in one column.

    Attributes:
        p_value: The p-value of Welch's t-test over seeds, two-sided; None if a method has one seed.
        bootstrap: The paired bootstrap over examples, the mean over the seeds that both have; None
            if the predictions are missing or the metric cannot be resampled from sums.
    """

    first: str
    second: str
    column: Column
    difference: float
    p_value: float | None
    bootstrap: "Bootstrap | None"


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """All comparisons of a report.

    Attributes:
        columns: The target, OOD tasks, and Norm. Avg. of the held-out tasks.
        tasks: The held-out tasks one by one.
        all: The comparisons in all of these.
    """

    columns: tuple[Column, ...]
    tasks: tuple[Column, ...]
    all: tuple[Comparison, ...]


def make_comparisons(runs: Sequence[Run]) -> Comparisons:
    """Returns the comparisons of all methods with the pretrained model and with each other.

    Args:
        runs: Runs, one for each model (`report.members`).
    """
    from robust_ft.report import significance  # numpy, which nothing else here needs

    columns, tasks = _columns(runs)
    groups = results.methods(runs)
    ends = {name: [Side.end(run) for run in group] for name, group in groups.items()}
    pairs = [
        (name, PRETRAINED, ends[name], [Side.pretrained(run) for run in group])
        for name, group in groups.items()
    ]
    pairs += [(a, b, ends[a], ends[b]) for a, b in itertools.combinations(groups, 2)]
    draws = significance.Draws()
    found = [
        comparison
        for first, second, one, two in pairs
        for column in (*columns, *tasks)
        if (comparison := _compare((first, second), (one, two), column, draws)) is not None
    ]
    return Comparisons(columns, tasks, tuple(found))


def _columns(runs: Sequence[Run]) -> tuple[tuple[Column, ...], tuple[Column, ...]]:
    targets = {run.target: results.target_column(run) for run in runs}
    found: dict[Column, None] = {column: None for column in targets.values() if column}
    metrics = {column.metric for column in found}
    norm_avg: dict[Column, None] = {}
    tasks: dict[Column, None] = {}
    for run in runs:
        for row in run.rows:
            if row.role == "ood" and row.metric in metrics:
                found.setdefault(Column.of(row))
            elif row.task == HELD_OUT and row.metric == NORM_AVG and row.role != KEPT:
                norm_avg.setdefault(Column.of(row))
        end = Side.end(run)
        for column in norm_avg:
            tasks |= dict.fromkeys(end.parts(column))
    return (*found, *sorted(norm_avg, key=lambda column: column.shots)), tuple(tasks)


def _is_held_out(row: Row, run: Run) -> bool:
    """Returns whether a row is of a single held-out task; early versions recorded no role."""
    unknown = row.role == "" and row.task not in (run.target, HELD_OUT)
    return unknown or (row.role == "held_out" and row.task != HELD_OUT)


def _compare(
    names: tuple[str, str],
    sides: tuple[Sequence[Side], Sequence[Side]],
    column: Column,
    draws: "Draws",
) -> Comparison | None:
    from robust_ft.report.significance import welch

    values = [[side.value(column) for side in group] for group in sides]
    one, two = ([v for v in group if v is not None and math.isfinite(v)] for group in values)
    if not one or not two:
        return None
    difference = statistics.fmean(one) - statistics.fmean(two)
    bootstrap = draws.compare(*sides, column, difference)
    return Comparison(*names, column, difference, welch(one, two), bootstrap)


def by_pair(
    comparisons: Sequence[Comparison],
) -> Mapping[tuple[str, str], Mapping[Column, Comparison]]:
    """Returns the comparisons of each pair by column."""
    pairs: dict[tuple[str, str], dict[Column, Comparison]] = {}
    for comparison in comparisons:
        pair = pairs.setdefault((comparison.first, comparison.second), {})
        pair[comparison.column] = comparison
    return pairs
