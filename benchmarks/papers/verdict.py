"""Whether a claim held, told from finished runs.

One rule for all: it held if the first model's mean is above the second's and the difference is
significant at 5%, over runs (Welch's t-test over checkpoints and seeds) and over test examples (a
paired bootstrap within runs, the mean over them), or by the one of these tests that there is. A
claim that a model is no worse is the same with the margin added to the first one's scores.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from runs import Arm, Replicate, Runner

from papers import theory
from papers.claim import (
    ARG_0,
    ARG_16,
    BEST_OOD,
    FORMAT,
    HELD_OUT,
    OOD,
    PRETRAINED,
    TARGET,
    UNSEEN,
    Claim,
    Model,
)
from robust_ft.errors import UserError
from robust_ft.metrics.significance import Bootstrap
from robust_ft.report import results
from robust_ft.report.comparisons import Side
from robust_ft.report.few_shot import Setting
from robust_ft.report.members import split_members
from robust_ft.report.promptability import difference, make_promptability
from robust_ft.report.results import Column
from robust_ft.report.runs import Run, load_run
from robust_ft.report.significance import Draws, is_significant, welch
from robust_ft.report.table import difference_text

HELD, NOT_HELD, CANNOT_SHOW = "held", "not held", "cannot show"
SETTINGS = {ARG_0: Setting(0, "zero"), ARG_16: Setting(16, "last")}
AGGREGATES = {HELD_OUT: results.NORM_AVG, FORMAT: results.FORMAT_SHARE}
_EDGE = 0.5  # points from 0 and from 100 at which nothing can be told


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a claim compares, as it was measured.

    Attributes:
        above: The value of each run of the first model.
        below: Of the second, from the same replicates.
        bootstrap: Of their difference, over examples; None where there is none.
        bounded: Whether values are from 0 to 100.
    """

    above: Sequence[float]
    below: Sequence[float]
    bootstrap: Bootstrap | None = None
    bounded: bool = True


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        status: "held", "not held" or "cannot show".
        why: In words, "" where it held.
        difference: Of the means.
        p_value: Of Welch's t-test over runs, of the difference and the margin.
        bootstrap: The difference over examples.
        above: Mean and standard deviation of the first model.
        below: Of the second.
    """

    status: str
    why: str
    difference: float
    p_value: float | None
    bootstrap: Bootstrap | None
    above: tuple[float, float | None]
    below: tuple[float, float | None]

    @property
    def text(self) -> str:
        """Returns the difference and its tests in a cell of a table."""
        return difference_text(self.difference, self.p_value, self.bootstrap)


def tell(claim: Claim, found: Measured) -> Verdict:
    """Returns whether a claim held."""
    above, below = results.spread(found.above), results.spread(found.below)
    p_value = welch([value + claim.margin for value in found.above], found.below)
    status, why = _status(claim, found, above[0], below[0], p_value)
    return Verdict(status, why, above[0] - below[0], p_value, found.bootstrap, above, below)


def _status(
    claim: Claim, found: Measured, above: float, below: float, p_value: float | None
) -> tuple[str, str]:
    if found.bounded and (why := _no_room(claim, above, below)):
        return CANNOT_SHOW, why
    shifted = None
    if (bootstrap := found.bootstrap) is not None:
        low, high = bootstrap.low + claim.margin, bootstrap.high + claim.margin
        shifted = dataclasses.replace(bootstrap, low=low, high=high)
    if p_value is None and shifted is None:
        return CANNOT_SHOW, "one run, and no interval over examples"
    worse = f"worse by {claim.margin:g} or more" if claim.margin else "the reverse"
    if is_significant(p_value, shifted):
        return (HELD, "") if above - below + claim.margin > 0 else (NOT_HELD, worse)
    if claim.margin:
        return NOT_HELD, f"may be worse by {claim.margin:g} or more"
    return NOT_HELD, "no significant difference"


def _no_room(claim: Claim, above: float, below: float) -> str:
    """Returns why scores from 0 to 100 leave no room for a difference, "" if they do."""
    if max(above, below) <= _EDGE:
        return "both are at 0"
    if min(above, below) >= 100 - _EDGE:
        return "both are at 100"
    if below >= 100 - _EDGE and not claim.margin:
        return f"{claim.below.name} is at 100"
    return ""


class Runs:
    """Finished runs, read once; tests are drawn once for all claims."""

    def __init__(self, runner: Runner, replicates: Sequence[Replicate]) -> None:
        self._runner, self._replicates = runner, replicates
        self._runs: dict[tuple[Arm, Replicate], Run] = {}
        self._prompted: dict[tuple[tuple[Arm, ...], tuple[Replicate, ...]], Mapping] = {}
        self._draws = Draws()

    def finished(self, arms: Sequence[Arm]) -> tuple[Replicate, ...]:
        """Returns the replicates of which all of these arms have a finished run."""
        return tuple(
            replicate
            for replicate in self._replicates
            if all(self._runner.is_finished(arm, replicate) for arm in arms)
        )

    def of(self, arm: Arm, replicates: Sequence[Replicate]) -> list[Run]:
        """Returns an arm's runs under its name, each with its replicate's number as its seed."""
        for replicate in replicates:
            if (arm, replicate) not in self._runs:
                run = load_run(self._runner.folder(arm, replicate))
                number = self._replicates.index(replicate)  # what pairs runs of two arms
                run = dataclasses.replace(run, name=arm.name, seed=number)
                self._runs[arm, replicate] = run
        return [self._runs[arm, replicate] for replicate in replicates]

    def measure(self, claim: Claim, replicates: Sequence[Replicate]) -> Measured:
        """Returns what a claim compares.

        Raises:
            UserError: The runs do not have what it is about.
        """
        if claim.quantity in SETTINGS:
            return self._measure_gain(claim, replicates)
        if claim.quantity == UNSEEN:
            return Measured(*(theory.accuracies(m.at) for m in claim.models), bounded=False)
        sides, values, columns = [], [], []
        for model, quantity in zip(claim.models, claim.quantities, strict=True):
            of_runs = [side(model, run) for run in self.of(model.arm, replicates)]
            column = find_column(of_runs[0].run, quantity)
            sides.append(of_runs)
            values.append([_value(each, column, model) for each in of_runs])
            columns.append(column)
        bootstrap = None
        if columns[0] == columns[1] and columns[0].metric != results.FORMAT_SHARE:
            mean = results.spread(values[0])[0] - results.spread(values[1])[0]
            bootstrap = self._draws.compare(*sides, columns[0], mean)
        return Measured(*values, bootstrap, bounded=not columns[0].analysis)

    def _measure_gain(self, claim: Claim, replicates: Sequence[Replicate]) -> Measured:
        key = claim.arms, tuple(replicates)
        if key not in self._prompted:
            found = make_promptability([r for arm in claim.arms for r in self.of(arm, replicates)])
            self._prompted[key] = found.cells if found else {}
        gains = []
        for model, quantity in zip(claim.models, claim.quantities, strict=True):
            cell = self._prompted[key].get((model.arm.name, SETTINGS[quantity]))
            if cell is None or cell.gain is None:
                raise UserError(f"The runs of {model.arm.name} have no {quantity}.")
            gains.append(cell.gain)
        bootstrap = difference(*gains).bootstrap
        return Measured(gains[0].runs, gains[1].runs, bootstrap, bounded=False)


def side(model: Model, run: Run) -> Side:
    """Returns a model of a run.

    Raises:
        UserError: The run has no such stage and no such selection.
    """
    if model.at == PRETRAINED:
        return Side.pretrained(run)
    if model.at == "":
        return Side.end(run)
    if model.at in run.selections:
        return Side.end(_member(model, run))
    if model.at not in run.stages:
        has = ", ".join([*run.stages, *run.selections])
        raise UserError(f"{run.directory} has no stage or selection '{model.at}', but {has}.")
    (member,) = [m for m in split_members([run]) if m.name == model.at] or [run]
    return Side(member, model.at, run.selected.get(model.at))


def _member(model: Model, run: Run) -> Run:
    selected = run.selections[model.at]
    weights = [candidate.weight for candidate in selected.candidates]
    weight = selected.weight if model.weight is None else model.weight

    def at(weight: float) -> Run:
        changed = dataclasses.replace(selected, weight=weight)
        split = split_members([dataclasses.replace(run, selections={model.at: changed})])
        return next(member for member in split if member.name == model.at)

    if weight == BEST_OOD:
        column = find_column(run, OOD)
        weight = max(weights, key=lambda each: _value(Side.end(at(each)), column, model))
    if weight not in weights:
        raise UserError(f"{run.directory}: {model.at} has no λ = {weight:g}, but {weights}.")
    return at(weight)


def find_column(run: Run, quantity: str) -> Column:
    """Returns a quantity's column in a run.

    Raises:
        UserError: The run was not evaluated on it.
    """
    target = results.target_column(run)
    found: list[Column] = []
    if quantity == TARGET:
        found = [target] if target else []
    elif quantity in AGGREGATES:
        column = results.held_out_column(run, AGGREGATES[quantity])
        found = [column] if column else []
    elif quantity == OOD:
        rows = [row for row in run.rows if row.role == "ood"]
        metrics = {target.metric} if target else {row.metric for row in rows}
        found = list(dict.fromkeys(Column.of(row) for row in rows if row.metric in metrics))
        if len(found) > 1:
            tasks = ", ".join(column.task for column in found)
            raise UserError(f"{run.directory} has several OOD tasks, {tasks}: name one of them.")
    else:
        task, _, shots = quantity.partition("@")
        found = [
            column
            for row in run.rows
            if row.task == task
            and (column := Column.of(row)).metric != results.FORMAT_SHARE
            and not column.kept
            and (not shots or column.shots == int(shots))
        ]
    if not found:
        raise UserError(f"{run.directory} has no results on {quantity}.")
    return found[0]


def _value(side: Side, column: Column, model: Model) -> float:
    """Returns a result on the test split, of an analysis on the split that it was given."""
    rows = [
        row
        for row in side.run.rows
        if (row.stage, row.step) == (side.stage, side.step)
        and (row.split == "test" or column.analysis)
        and Column.of(row) == column
    ]
    if not rows or not math.isfinite(rows[0].value):
        raise UserError(f"{side.run.directory}: {model.name} has no result on {column.task}.")
    return results.percent(rows[0])
