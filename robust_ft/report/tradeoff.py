"""In distribution (ID) against out of distribution (OOD): the table and the grid of lambda.

The table is Table 2 of Ensembles and Cocktails, the grid its Figure 3.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from robust_ft.report import results
from robust_ft.report.results import Cell, Column
from robust_ft.report.runs import Run
from robust_ft.summary import Row


@dataclasses.dataclass(frozen=True)
class Line:
    """A method's row: a cell for each column, and the lambdas that its seeds selected, if any."""

    method: str
    weights: tuple[float, ...]
    cells: Mapping[Column, Cell]


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in the plane of ID and OOD; means over seeds, and each seed's."""

    weight: float | None
    id: float
    ood: float
    seeds: tuple[tuple[float, float], ...]
    chosen: bool


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """A report's results on ID and OOD data; columns are empty if no OOD data was evaluated.

    Where there is a selection of lambda but no OOD data, the mean over held-out tasks stands in.
    """

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    points: Mapping[str, tuple[Point, ...]]

    @property
    def title(self) -> str:
        """What it is about."""
        held_out = any(column.task == results.HELD_OUT for column in self.columns)
        return "On the target and on other tasks" if held_out else "In and out of distribution"

    @property
    def heads(self) -> tuple[str, str]:
        """What stands before the first column's name, and before those of the others."""
        held_out = any(column.task == results.HELD_OUT for column in self.columns)
        return ("target: ", "") if held_out else ("ID: ", "OOD: ")


def make_tradeoff(runs: Sequence[Run]) -> Tradeoff:
    """Returns the table and the points of each method.

    Args:
        runs: Runs of one target, one for each model (`report.members`).
    """
    columns = _columns(runs) if runs else ()
    groups = results.methods(runs)
    if not columns:
        return Tradeoff((), (), {})
    lines = []
    for name, group in groups.items():
        means = results.aggregate([_final(run) for run in group])
        cells = {column: means[column] for column in columns if column in means}
        weights = tuple(run.weight for run in group if run.weight is not None)
        if cells:
            lines.append(Line(name, weights, cells))
    points = {name: _points(group, columns) for name, group in groups.items()}
    return Tradeoff(columns, tuple(lines), points)


def _columns(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Returns the target's column and those of OOD tasks, with the same metric."""
    target = results.target_column(runs[0])
    ood = dict.fromkeys(
        Column.of(row)
        for run in runs
        for row in run.rows
        if row.role == "ood" and target is not None and row.metric == target.metric
    )
    others = tuple(ood) or _held_out(runs)
    return (target, *others) if target is not None and others else ()


def _held_out(runs: Sequence[Run]) -> tuple[Column, ...]:
    """Returns the mean over the held-out tasks of a selection, with all methods if it has that."""
    for run in runs:
        column = results.held_out_column(run, results.NORM_AVG) if run.grid else None
        if column is not None:
            kept = dataclasses.replace(column, kept=True)
            return (kept if any(Column.of(row) == kept for row in run.rows) else column,)
    return ()


def _final(run: Run) -> list[Row]:
    return [row for row in results.selected_rows(run, run.stages[-1]) if row.split == "test"]


def _value(rows: Sequence[Row], column: Column) -> float | None:
    values = [row.value for row in rows if Column.of(row) == column]
    return values[0] if values else None


def _points(group: Sequence[Run], columns: Sequence[Column]) -> tuple[Point, ...]:
    """Returns a point for each lambda of a selection, or one for a method without."""
    weights = sorted({weight for run in group for weight in run.grid})
    alternatives: list[float | None] = [*weights] or [None]
    points = []
    for weight in alternatives:
        pairs = []
        for run in group:
            rows = _final(run) if weight is None else run.grid.get(weight, ())
            rows = [row for row in rows if row.split == "test"]
            values = [_value(rows, column) for column in columns]
            ood = [value for value in values[1:] if value is not None]
            if values[0] is not None and ood:
                pairs.append((values[0], statistics.fmean(ood)))
        if pairs:
            means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
            chosen = any(run.weight == weight for run in group)
            points.append(Point(weight, means[0], means[1], tuple(pairs), chosen))
    return tuple(points)
