"""Computes a report from the rows of runs: tables and curves.

Pure functions on plain data; drawing is elsewhere. Scores are on a scale from 0 to 100; the share
of outputs in the target's format is in percent too.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from robust_ft.report.runs import Run
from robust_ft.summary import ANALYSIS, KEPT, Row

HELD_OUT = "held_out"  # the name under which aggregates over the held-out tasks are recorded
NORM_AVG = "norm_avg"
FORMAT_SHARE = "format_share"
PRETRAINED = "pretrained"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A mean over seeds; `sd` is the sample standard deviation, None for one seed.

    `split` is "test", unless a run has no test result there. `without` names the PEFT methods that
    the finetuned model was evaluated without.
    """

    mean: float
    sd: float | None
    seeds: int
    num_examples: int
    split: str
    without: tuple[str, ...] = ()

    def text(self, digits: int = 1) -> str:
        """Returns `90.1 ± 0.4`, with a dagger if the split is not the test split."""
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}" + ("" if self.split == "test" else " †")


@dataclasses.dataclass(frozen=True)
class Column:
    """A task, its number of shots and its metric.

    `kept` tells the results with the PEFT methods that those of held-out tasks are else without;
    the table has both in one column. `analysis` tells values of an analysis, which are no scores.
    """

    task: str
    shots: int
    metric: str
    kept: bool = False
    analysis: bool = False

    @classmethod
    def of(cls, row: Row) -> "Column":
        """Returns a row's column."""
        return cls(row.task, row.shots, row.metric, row.role == KEPT, row.role == ANALYSIS)

    @property
    def is_of_part(self) -> bool:
        """Whether it is an analysis of a part of the model, such as `decoder/layers_1/mlp`."""
        return self.analysis and "/" in self.metric

    @property
    def percent(self) -> bool:
        """Whether values are shares, shown in percent."""
        return self.metric == FORMAT_SHARE


@dataclasses.dataclass(frozen=True)
class Line:
    """A model in the table: the pretrained one, or the checkpoint a stage of a method selected.

    `weights` are the lambdas that its seeds selected, if it is an ensemble or a cocktail.
    """

    method: str
    stage: str
    steps: tuple[int, ...]
    seeds: int
    cells: Mapping[Column, Cell]
    weights: tuple[float, ...] = ()

    @property
    def without(self) -> tuple[str, ...]:
        """The PEFT methods that held-out tasks were evaluated without."""
        tasks = [cell for column, cell in self.cells.items() if not column.analysis]
        return tuple(dict.fromkeys(name for cell in tasks for name in cell.without))

    @property
    def has_both(self) -> bool:
        """Whether there are also scores with them."""
        return any(column.kept for column in self.cells)

    def text(self, column: Column) -> str:
        """Returns a cell's text, `–` without one; in brackets the score with all methods."""
        if column not in self.cells:
            return "–"
        kept = self.cells.get(dataclasses.replace(column, kept=True))
        digits = 3 if column.analysis else 1
        return self.cells[column].text(digits) + (f" ({kept.text()})" if kept else "")

    @property
    def checkpoint(self) -> str:
        """The stage and its selected steps as text."""
        if self.stage == PRETRAINED:
            return "step 0"
        if self.weights:
            return "λ " + lambdas(self.weights)
        low, high = min(self.steps), max(self.steps)
        return f"{self.stage}, step {low}" + (f"–{high}" if high > low else "")


@dataclasses.dataclass(frozen=True)
class Table:
    """Method by task: the target's columns, aggregates, the held-out tasks, then analyses."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity against the steps of a stage; mean and sample standard deviation over seeds."""

    method: str
    stage: str
    last: bool
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    seeds: int
    selected: int | None = None


def methods(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Groups runs by the name of their method, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def percent(row: Row) -> float:
    """Returns a row's value on a 0 to 100 scale."""
    return 100 * row.value if row.metric == FORMAT_SHARE else row.value


def pretrained_rows(run: Run) -> list[Row]:
    """Returns the rows of the pretrained model: step 0 of the first stage."""
    return [row for row in run.rows if row.stage == run.stages[0] and row.step == 0]


def selected_rows(run: Run, stage: str) -> list[Row]:
    """Returns the final rows of a stage: of the checkpoint that it selected."""
    step = selected_step(run, stage)
    return [row for row in run.rows if row.stage == stage and row.step == step]


def selected_step(run: Run, stage: str) -> int | None:
    """Returns the step that a stage selected, or None if it has not finished."""
    return run.selected.get(stage)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean and sample standard deviation, None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def aggregate(groups: Sequence[Sequence[Row]]) -> dict[Column, Cell]:
    """Averages over seeds.

    Args:
        groups: The rows of one model, a sequence for each seed. Of several splits the test
            split counts.
    """
    values: dict[Column, list[Row]] = {}
    for rows in groups:
        best: dict[Column, Row] = {}
        for row in rows:
            column = Column.of(row)
            if column not in best or row.split == "test":
                best[column] = row
        for column, row in best.items():
            values.setdefault(column, []).append(row)
    cells = {}
    for column, rows in values.items():
        mean, sd = spread([percent(row) for row in rows])
        if all(row.step == 0 for row in rows) and sd == 0:
            sd = None  # the same pretrained model in every run: no sample of seeds
        split = next((row.split for row in rows if row.split != "test"), "test")
        # The pretrained model has none of them anyway.
        trained = [row for row in rows if row.step != 0]
        without = tuple(dict.fromkeys(name for row in trained for name in row.without))
        cells[column] = Cell(mean, sd, len(rows), rows[0].num_examples, split, without)
    return cells


def lambdas(weights: Iterable[float]) -> str:
    """Returns the distinct lambdas that several seeds selected: `0.25, 0.5`."""
    return ", ".join(f"{weight:g}" for weight in sorted(set(weights)))


def make_table(runs: Sequence[Run]) -> Table:
    """Returns the table of all runs; a pretrained model that methods share has one line."""
    before: list[Line] = []
    after: list[Line] = []
    for name, group in methods(runs).items():
        start = aggregate([pretrained_rows(run) for run in group])
        if start:
            before.append(Line(name, PRETRAINED, (0,), len(group), start))
        for stage in dict.fromkeys(stage for run in group for stage in run.stages):
            by_run = [(run, selected_rows(run, stage)) for run in group if stage in run.stages]
            by_run = [(run, rows) for run, rows in by_run if rows]
            if by_run:
                steps = tuple(selected_step(run, stage) or 0 for run, _ in by_run)
                cells = aggregate([rows for _, rows in by_run])
                weights = tuple(run.weight for run, _ in by_run if run.weight is not None)
                after.append(Line(name, stage, steps, len(by_run), cells, weights))
    targets = tuple(dict.fromkeys(run.target for run in runs))
    if before and _agree(before):
        merged: dict[Column, Cell] = {}
        for line in before:
            merged = {**line.cells, **merged}
        most = max(line.seeds for line in before)
        before = [Line(PRETRAINED, PRETRAINED, (0,), most, merged)]
    lines = tuple(before + after)
    return Table(_columns(lines, targets), lines, targets)


def _agree(lines: Sequence[Line]) -> bool:
    """Returns whether lines are equal in all cells that they share."""
    first: dict[Column, Cell] = {}
    for line in lines:
        for column, cell in line.cells.items():
            other = first.setdefault(column, cell)
            if not math.isclose(other.mean, cell.mean, abs_tol=1e-6) or other.split != cell.split:
                return False
    return True


def _columns(lines: Iterable[Line], targets: Sequence[str]) -> tuple[Column, ...]:
    # Single tasks' format shares, and values of an analysis for parts of the model, stay in
    # summary.json; the table has those of the whole.
    columns = dict.fromkeys(
        column
        for line in lines
        for column in line.cells
        if not (column.kept or column.is_of_part)
        and (column.metric != FORMAT_SHARE or column.task == HELD_OUT)
    )

    def place(column: Column) -> tuple[int, int, int]:
        if column.task in targets:
            return 0, targets.index(column.task), column.shots
        if column.task == HELD_OUT:
            return 1, column.shots, int(column.percent)
        return (3 if column.analysis else 2), column.shots, 0

    return tuple(sorted(columns, key=place))  # stable: tasks stay in the order of the runs


def target_column(run: Run) -> Column | None:
    """Returns the target's column: its fewest shots and first metric."""
    rows = [
        row
        for row in run.rows
        if row.task == run.target and row.metric != FORMAT_SHARE and row.role != KEPT
    ]
    if not rows:
        return None
    row = min(rows, key=lambda row: row.shots)  # the first of equals
    return Column(row.task, row.shots, row.metric)


def held_out_column(run: Run, metric: str) -> Column | None:
    """Returns the column of an aggregate over held-out tasks, at 1 shot if that was measured."""
    shots = {row.shots for row in run.rows if row.task == HELD_OUT and row.metric == metric}
    if not shots:
        return None
    return Column(HELD_OUT, 1 if 1 in shots else min(shots), metric)


def quantity_column(run: Run, quantity: str | Column) -> Column | None:
    """Returns the column of `"target"`, `"norm_avg"` or `"format_share"` in a run."""
    if isinstance(quantity, Column):
        return quantity
    return target_column(run) if quantity == "target" else held_out_column(run, quantity)


def curves(runs: Sequence[Run], quantity: str | Column) -> list[Curve]:
    """Returns the curves of a quantity, one for each method and stage.

    Where seeds were evaluated at different steps, only the steps common to all are kept: a mean
    over changing seeds would jump.

    Args:
        runs: Runs of any methods.
        quantity: `"target"`, `"norm_avg"` or `"format_share"` or a column, on the validation
            split, or `"loss"` in training.
    """
    curves = []
    for name, group in methods(runs).items():
        for stage in dict.fromkeys(stage for run in group for stage in run.stages):
            if quantity == "loss":
                points = [_losses(run, stage) for run in group]
            else:
                points = [points_of(run, stage, quantity_column(run, quantity)) for run in group]
            picked = [selected_step(run, stage) for run in group]
            last = all(stage == run.stages[-1] for run in group)
            curve = _average(name, stage, last, [p for p in points if p])
            if curve:
                known = [step for step in picked if step is not None]
                one = known[0] if len(set(known)) == 1 else None
                curves.append(dataclasses.replace(curve, selected=one))
    return curves


def _losses(run: Run, stage: str, limit: int = 200) -> dict[int, float]:
    lines = [line for line in run.train.get(stage, ()) if math.isfinite(line.get("loss", math.nan))]
    every = max(1, len(lines) // limit)
    return {int(line["step"]): float(line["loss"]) for line in lines[::every]}


def points_of(run: Run, stage: str, column: Column | None) -> dict[int, float]:
    """Returns {step: value on the validation split} of a stage."""
    return {
        row.step: percent(row)
        for row in run.rows
        if row.stage == stage
        and row.split == "validation"
        and Column.of(row) == column
        and math.isfinite(row.value)
    }


def _average(
    name: str, stage: str, last: bool, points: Sequence[Mapping[int, float]]
) -> Curve | None:
    if not points:
        return None
    steps = sorted(set(points[0]).intersection(*points[1:]))
    pairs = [spread([p[step] for p in points]) for step in steps]
    mean = tuple(mean for mean, _ in pairs)
    sd = tuple(sd or 0.0 for _, sd in pairs)
    return Curve(name, stage, last, tuple(steps), mean, sd, len(points)) if steps else None


def before_and_after(runs: Sequence[Run], quantity: str) -> tuple[Cell | None, dict[str, Cell]]:
    """Returns a quantity of the pretrained model and at the end of each method.

    The former is None if it was not measured, or not the same quantity for all methods.
    """
    starts, ends = {}, {}
    columns = set()
    for name, group in methods(runs).items():
        column = quantity_column(group[0], quantity)
        if column is None:
            continue
        columns.add(column)
        before = aggregate([pretrained_rows(run) for run in group]).get(column)
        after = aggregate([selected_rows(run, run.stages[-1]) for run in group]).get(column)
        if before and math.isfinite(before.mean):
            starts[name] = before
        if after and math.isfinite(after.mean):
            ends[name] = after
    means = [cell.mean for cell in starts.values()]
    same = len(columns) == 1 and bool(means) and max(means) - min(means) < 1e-6
    return (next(iter(starts.values())) if same else None), ends


def ends_kept(runs: Sequence[Run]) -> dict[str, Cell]:
    """Returns Norm. Avg. at the end of each method that it is also known with, see `Column`."""
    ends = {}
    for name, group in methods(runs).items():
        column = held_out_column(group[0], NORM_AVG)
        if column is not None:
            cells = aggregate([selected_rows(run, run.stages[-1]) for run in group])
            cell = cells.get(dataclasses.replace(column, kept=True))
            if cell and math.isfinite(cell.mean):
                ends[name] = cell
    return ends


def joined(names: Sequence[str]) -> str:
    """Returns names of PEFT methods in words: `lora and prompt`."""
    return " and ".join(names)
