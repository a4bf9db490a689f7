"""Computes a report from the rows of runs: tables, curves, verdicts, samples.

Pure functions on plain data; drawing is elsewhere. Scores are on a scale from 0 to 100; the share
of outputs in the target's format is in percent too.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from robust_ft.report.runs import Run
from robust_ft.summary import Row

HELD_OUT = "held_out"  # the name under which aggregates over the held-out tasks are recorded
NORM_AVG = "norm_avg"
FORMAT_SHARE = "format_share"
PRETRAINED = "pretrained"
KEEPS = 0.9  # a method keeps the other tasks if this share of their score is left
GAINS = 1.02


@dataclasses.dataclass(frozen=True)
class Cell:
    """A mean over seeds; `sd` is the sample standard deviation, None for one seed.

    `split` is "test", unless a run has no test result there.
    """

    mean: float
    sd: float | None
    seeds: int
    num_examples: int
    split: str

    def text(self, digits: int = 1) -> str:
        """Returns `90.1 ± 0.4`, with a dagger if the split is not the test split."""
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}" + ("" if self.split == "test" else " †")


@dataclasses.dataclass(frozen=True)
class Column:
    """A task, its number of shots and its metric."""

    task: str
    shots: int
    metric: str

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
    """Method by task; the target's columns first, aggregates next, then the held-out tasks."""

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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What finetuning did: score on the target and on the other tasks, before and after."""

    method: str
    target: str
    target_before: float | None
    target_after: float | None
    others_before: float | None
    others_after: float | None

    @property
    def word(self) -> str:
        """`loses`, `keeps` or `improves` (the other tasks), or `` if they were not measured."""
        if not self.others_before or self.others_after is None:
            return ""
        left = self.others_after / self.others_before
        return "loses" if left < KEEPS else "improves" if left > GAINS else "keeps"


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
            column = Column(row.task, row.shots, row.metric)
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
        cells[column] = Cell(mean, sd, len(rows), rows[0].num_examples, split)
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
    # Single tasks' format shares stay in summary.json; the table has their mean.
    columns = dict.fromkeys(
        column
        for line in lines
        for column in line.cells
        if column.metric != FORMAT_SHARE or column.task == HELD_OUT
    )

    def place(column: Column) -> tuple[int, int, int]:
        if column.task in targets:
            return 0, targets.index(column.task), column.shots
        if column.task == HELD_OUT:
            return 1, column.shots, int(column.percent)
        return 2, column.shots, 0

    return tuple(sorted(columns, key=place))  # stable: tasks stay in the order of the runs


def target_column(run: Run) -> Column | None:
    """Returns the target's column: its fewest shots and first metric."""
    rows = [row for row in run.rows if row.task == run.target and row.metric != FORMAT_SHARE]
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


def quantity_column(run: Run, quantity: str) -> Column | None:
    """Returns the column of `"target"`, `"norm_avg"` or `"format_share"` in a run."""
    return target_column(run) if quantity == "target" else held_out_column(run, quantity)


def curves(runs: Sequence[Run], quantity: str) -> list[Curve]:
    """Returns the curves of a quantity, one for each method and stage.

    Where seeds were evaluated at different steps, only the steps common to all are kept: a mean
    over changing seeds would jump.

    Args:
        runs: Runs of any methods.
        quantity: `"target"`, `"norm_avg"` or `"format_share"` on the validation split, or
            `"loss"` in training.
    """
    curves = []
    for name, group in methods(runs).items():
        for stage in dict.fromkeys(stage for run in group for stage in run.stages):
            if quantity == "loss":
                points = [_losses(run, stage) for run in group]
            else:
                points = [_points(run, stage, quantity_column(run, quantity)) for run in group]
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


def _points(run: Run, stage: str, column: Column | None) -> dict[int, float]:
    return {
        row.step: percent(row)
        for row in run.rows
        if row.stage == stage
        and row.split == "validation"
        and Column(row.task, row.shots, row.metric) == column
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


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Returns what each method did to the target and to the other tasks, from its last stage."""
    verdicts = []
    for name, group in methods(runs).items():
        before = aggregate([pretrained_rows(run) for run in group])
        after = aggregate([selected_rows(run, run.stages[-1]) for run in group])
        scores = []
        for quantity in ("target", NORM_AVG):
            column = quantity_column(group[0], quantity)
            for cells in (before, after):
                cell = cells.get(column) if column else None
                scores.append(cell.mean if cell else None)
        verdicts.append(Verdict(name, group[0].target, *scores))
    return verdicts


def headline(verdicts: Sequence[Verdict], numbers: bool = True) -> str:
    """Returns one sentence on what the methods did to the other tasks, the worst one first.

    Args:
        verdicts: The verdicts of all methods; for more than three, the sentence only counts those
            that keep the other tasks.
        numbers: Whether to give the scores before and after.
    """
    known = [v for v in verdicts if v.others_before and v.others_after is not None]
    if len(known) > 3:
        kept = [v for v in known if v.word != "loses"]
        return f"{len(kept)} of {len(known)} methods keep the other tasks"
    parts = []
    for v in sorted(known, key=lambda v: (v.others_after or 0) - (v.others_before or 0)):
        scores = f" ({v.others_before:.0f} → {v.others_after:.0f})" if numbers else ""
        parts.append(f"{v.method} {v.word} the other tasks{scores}")
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One input with the outputs of the models, in the order of `Samples.models`."""

    task: str
    input: str
    target: str
    outputs: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Outputs side by side."""

    models: tuple[str, ...]
    rows: tuple[Sample, ...]


def samples(runs: Sequence[Run], per_task: int = 2) -> Samples:
    """Returns outputs of the pretrained and the finetuned models for the same inputs.

    The first examples of each evaluation are taken, unpicked; of each method its first run. The
    evaluations of held-out tasks come first.
    """
    columns: dict[str, dict[str, list[dict[str, str]]]] = {PRETRAINED: {}}
    for name, group in methods(runs).items():
        run, stage = group[0], group[0].stages[-1]
        step = selected_step(run, stage)
        for file in run.samples:
            if file.stage == run.stages[0] and file.step == 0:
                if file.name not in columns[PRETRAINED]:
                    columns[PRETRAINED][file.name] = file.read()
            elif file.stage == stage and file.step == step:
                columns.setdefault(name, {})[file.name] = file.read()
    columns = {model: files for model, files in columns.items() if files}
    shown: list[Sample] = []
    names = sorted({name for files in columns.values() for name in files})
    targets = {run.target for run in runs}
    for name in sorted(names, key=lambda name: any(_is_of(name, t) for t in targets)):
        if sum(name in files for files in columns.values()) < min(2, len(columns)):
            continue  # nothing to compare
        by_input = [
            {str(row.get("input")): str(row.get("prediction")) for row in files.get(name, ())}
            for files in columns.values()
        ]
        first = next(files[name] for files in columns.values() if name in files)
        for row in first[:per_task]:
            text, wanted = str(row.get("input")), row.get("target", "")
            target = " | ".join(wanted) if isinstance(wanted, list) else str(wanted)
            shown.append(Sample(name, text, target, tuple(b.get(text) for b in by_input)))
    return Samples(tuple(columns), tuple(shown))


def _is_of(name: str, task: str) -> bool:
    return name == task or name.startswith((task + "_", task + "-"))
