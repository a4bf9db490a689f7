"""Analyses of finished runs: their values as a table, and what their pictures show.

Pure functions on rows, but for `write_analysis`; `analysis_figure` draws.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robust_ft import analysis_results, buckets, console, task_names
from robust_ft.errors import UserError
from robust_ft.files import as_path, write_atomically, write_json
from robust_ft.metrics.format_share import format_share
from robust_ft.report import groups, members, results, table
from robust_ft.report.results import FORMAT_SHARE, HELD_OUT, NORM_AVG, Column
from robust_ft.report.runs import Run, load_runs
from robust_ft.summary import ANALYSIS, Row

FORMAT = "format"
# The analyses, and how the tasks of their rows begin.
TASKS = {
    analysis_results.DRIFT: "drift",
    analysis_results.ALIGNMENT: "gradient_alignment",
    analysis_results.NEIGHBORS: "prompt_neighbors",
}


def write_analysis(
    name: str,
    model_dirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    target_format: str | None = None,
) -> tuple[pathlib.Path, ...]:
    """Writes `<name>.png` and `<name>.md` of what runs have recorded, and prints the table.

    Args:
        name: "drift", "alignment", "neighbors" or "format", which also writes its numbers as
            `format.json`.
        model_dirs: Folders of finished runs, or of the seeds of `run_seeds`.
        output: Folder of the files, created if it is missing; may be a run folder itself.
        target_format: For "format", a regex for outputs in the target's format; by default what the
            runs were evaluated with.

    Raises:
        UserError: A folder is not a finished run, or none has such results.
    """
    from robust_ft.report import analysis_figure

    for path in (*model_dirs, output):
        buckets.check(path, "The folder of an analysis")
    loaded = members.split_members(groups.by_settings(load_runs(model_dirs)).runs)
    if name == FORMAT and target_format is not None:
        loaded = [with_format(run, target_format) for run in loaded]
    columns = columns_of(loaded, name)
    rows = table_rows(loaded, columns) if columns else []
    if not rows:
        raise UserError(f"{', '.join(map(str, model_dirs))}: {_MISSING[name]}")
    folder = as_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    picture, text = folder / f"{name}.png", folder / f"{name}.md"
    analysis_figure.save(name, loaded, picture)
    heads = ["", "stage", "step", "split", *(_head(column, name) for column in columns)]
    write_atomically(text, f"{table.markdown_table([heads, *rows])}\n\n{NOTES[name]}\n")
    console.print_table(name, heads, rows, NOTES[name])
    if name != FORMAT:
        return picture, text
    numbers = folder / f"{name}.json"
    points = [dataclasses.asdict(point) for run in loaded for point in format_points(run)]
    write_json(numbers, {"target_format": target_format, "checkpoints": points})
    return picture, text, numbers


_OF_MODELS = "python -m robust_ft.analysis {} MODEL_DIR computes it."
_MISSING = {name: f"no run has this analysis; {_OF_MODELS.format(name)}" for name in TASKS} | {
    FORMAT: "no run recorded a share of held-out outputs in the target's format; give "
    "--target_format=REGEX, such as 'True|False'."
}
NOTES = {
    analysis_results.DRIFT: "KL(pretrained || model) in nats a target token.",
    analysis_results.ALIGNMENT: "Cosine of a task's gradient and its format gradient (shuffled "
    "targets), and the format gradient's norm over the other's.",
    analysis_results.NEIGHBORS: "Mean cosine of a vector's nearest token; % of vectors whose "
    "nearest token is another vector's, too; % of labels found among the neighbours.",
    FORMAT: "The share counts held-out outputs in the target's format; Norm. Avg. is the plain "
    "mean over the held-out tasks.",
}


def columns_of(runs: Sequence[Run], name: str) -> list[Column]:
    """Returns what an analysis has measured of the whole model."""
    if name == FORMAT:
        quantities = ("target", NORM_AVG, FORMAT_SHARE)
        found = [results.quantity_column(run, each) for each in quantities for run in runs]
        columns = list(dict.fromkeys(column for column in found if column is not None))
        return columns if any(column.metric == FORMAT_SHARE for column in columns) else []
    of_runs = [Column.of(row) for run in runs for row in run.rows if row.role == ANALYSIS]
    named = [column for column in of_runs if column.task.startswith(TASKS[name])]
    return list(dict.fromkeys(column for column in named if not column.is_of_part))


def table_rows(runs: Sequence[Run], columns: Sequence[Column]) -> list[list[str]]:
    """Returns a row for each method, stage, step and split that has a value; means over seeds."""
    rows = []
    for name, group in results.methods(runs).items():
        values: dict[tuple[str, int, str], dict[Column, list[float]]] = {}
        for run in group:
            for row in run.rows:
                if (column := Column.of(row)) in columns:
                    of_place = values.setdefault((row.stage, row.step, row.split), {})
                    of_place.setdefault(column, []).append(results.percent(row))
        stages = [stage for run in group for stage in run.stages]
        order = sorted(values, key=lambda p: (stages.index(p[0]), p[1], p[2] == "test"))
        for place in order:
            stage, step, split = place
            cells = [_text(column, values[place].get(column)) for column in columns]
            rows.append([name, stage, str(step), split, *cells])
    return rows


def _head(column: Column, name: str) -> str:
    """Returns the head of a column in the table of its analysis, which need not name that."""
    prefix = TASKS.get(name, "").replace("_", " ")
    return table.head(column).removeprefix(prefix).removeprefix(": ").strip().replace("_", " ")


def _text(column: Column, values: Sequence[float] | None) -> str:
    if not values:
        return "–"
    mean, sd = results.spread(values)
    digits = 3 if column.analysis else 1
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's scores on the validation split; all in percent, None where not measured."""

    method: str
    seed: int
    stage: str
    step: int
    target: float | None
    norm_avg: float | None
    format_share: float | None


def format_points(run: Run) -> list[Checkpoint]:
    """Returns the checkpoints of a run with the share of outputs in the target's format."""
    points = []
    for stage in run.stages:
        found = {
            quantity: results.points_of(run, stage, results.quantity_column(run, quantity))
            for quantity in ("target", NORM_AVG, FORMAT_SHARE)
        }
        for step in sorted(set().union(*found.values())):
            scores = [values.get(step) for values in found.values()]
            points.append(Checkpoint(run.name, run.seed, stage, step, *scores))
    return points


def with_format(run: Run, pattern: str) -> Run:
    """Returns a run with the shares of another format, of the predictions that it recorded.

    These went through the tasks' postprocessors, so that what a format is of are answers.

    Raises:
        UserError: The run has recorded no held-out predictions, or they are no text.
    """
    files: dict[str, Row] = {}
    for row in run.rows:
        if row.role == HELD_OUT and row.task != HELD_OUT:
            name = task_names.with_shots(row.task, row.shots)
            files[name + ("" if row.split == "validation" else f"-{row.split}")] = row
    shares: dict[tuple[str, int, str, int], list[float]] = {}
    for file in run.samples:
        if (of_task := files.get(file.name)) is None:
            continue
        outputs = [line.get("prediction") for line in file.read()]
        if not all(isinstance(output, str) for output in outputs):
            raise UserError(f"'{file.path}' has predictions that are no text, so of no format.")
        place = (file.stage, file.step, of_task.split, of_task.shots)
        shares.setdefault(place, []).append(format_share(list(map(str, outputs)), pattern))
    if not shares:
        raise UserError(f"'{run.directory}' has recorded no outputs on held-out tasks.")
    means = [
        Row(stage, step, HELD_OUT, HELD_OUT, split, shots, FORMAT_SHARE, float(np.mean(found)), 0)
        for (stage, step, split, shots), found in shares.items()
    ]
    kept = [row for row in run.rows if (row.task, row.metric) != (HELD_OUT, FORMAT_SHARE)]
    return dataclasses.replace(run, rows=(*kept, *means))


class Forgotten(NamedTuple):
    """A checkpoint's drift, and what it has lost on held-out tasks since it was pretrained.

    `without` names the methods that the held-out tasks were evaluated without.
    """

    method: str
    drift: float
    lost: float
    selected: bool
    without: tuple[str, ...]


def forgotten(runs: Sequence[Run], role: str) -> list[Forgotten]:
    """Returns drift on the tasks of a role against the held-out loss of score, on validation data.

    Args:
        runs: The runs.
        role: "target", "ood" or "held_out".
    """
    column = Column(TASKS[analysis_results.DRIFT], 0, role, analysis=True)
    points = []
    for run in runs:
        score = results.held_out_column(run, NORM_AVG)
        before = results.points_of(run, run.stages[0], score).get(0)
        if score is None or before is None:
            continue
        for stage in run.stages:
            drifts, scores = (results.points_of(run, stage, c) for c in (column, score))
            for step in sorted(drifts.keys() & scores.keys() - {0}):
                without = next(
                    row.without
                    for row in run.rows
                    if (row.stage, row.step, Column.of(row)) == (stage, step, score)
                )
                is_selected = run.selected.get(stage) == step
                lost = before - scores[step]
                points.append(Forgotten(run.name, drifts[step], lost, is_selected, without))
    return points


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's correlation, ties having their mean rank; NaN if one side is constant."""
    from scipy.stats import rankdata  # a second of importing

    ranks = [rankdata(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(centred[0] @ centred[1]) / scale if scale else math.nan


class Vector(NamedTuple):
    """A vector of a soft prompt, with the nearest tokens and their cosines, the nearest first."""

    name: str
    neighbors: tuple[tuple[str, float], ...]


def prompt_vectors(run: Run) -> tuple[str, int, list[Vector]]:
    """Returns the vectors of the last prompt that a run selected: stage, step, vectors.

    There are none if the neighbours were not listed, or by a version that listed them as text.
    """
    listed = analysis_results.outputs(run.directory, analysis_results.NEIGHBORS)
    for stage in reversed(run.stages):
        step = run.selected.get(stage, 0)
        lines = [line for line in listed if (line["stage"], line["step"]) == (stage, step)]
        if not lines:
            files = [f for f in run.samples if (f.stage, f.step) == (stage, step)]
            named = [f for f in files if f.name.startswith(TASKS[analysis_results.NEIGHBORS])]
            lines = [line for file in named for line in file.read() if "neighbors" in line]
        if lines:
            vectors = [
                Vector(line["input"], tuple((str(t), float(c)) for t, c in line["neighbors"]))
                for line in lines
            ]
            return stage, step, vectors
    return "", 0, []
