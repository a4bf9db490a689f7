"""Splits a run with ensembles or cocktails into one run for each of its models."""

import dataclasses
from collections.abc import Sequence

from robust_ft.report.runs import Run, sample_files
from robust_ft.summary import Row


def split_members(runs: Sequence[Run]) -> list[Run]:
    """Returns runs in which each stage and each selection is a run of its own.

    Students that were trained for a selection are points of its grid, not runs.

    Args:
        runs: The runs as read. If several recipes have selections, the new names begin with the
            recipe's.
    """
    several = len({run.name for run in runs if run.selections}) > 1
    members: list[Run] = []
    for run in runs:
        if not run.selections:
            members.append(run)
            continue
        prefix = f"{run.name}: " if several else ""
        candidates = [c for selection in run.selections.values() for c in selection.candidates]
        students = {candidate.folder for candidate in candidates if candidate.weight}
        names = [stage for stage in run.stages if stage not in students]
        members += [_stage(run, name, prefix + name) for name in names]
        members += [_selection(run, name, prefix + name) for name in run.selections]
    return members


def _stage(run: Run, stage: str, name: str) -> Run:
    own = [row for row in run.rows if row.stage == stage]
    return dataclasses.replace(
        run,
        name=name,
        stages=(stage,),
        rows=(*own, *_pretrained(run, stage)),
        samples=tuple(file for file in run.samples if file.stage == stage),
        selected={stage: run.selected[stage]} if stage in run.selected else {},
        selections={},
    )


def _selection(run: Run, selection: str, name: str) -> Run:
    selected = run.selections[selection]
    weighted = [row for row in run.rows if row.stage == selection]
    grid = {c.weight: [r for r in weighted if r.weight == c.weight] for c in selected.candidates}
    files = sample_files(run.directory, selected.selected.folder)
    return dataclasses.replace(
        run,
        name=name,
        stages=(selection,),
        rows=(*grid[selected.weight], *_pretrained(run, selection)),
        train={},
        samples=tuple(dataclasses.replace(file, stage=selection) for file in files),
        selected={selection: selected.selected.step},
        selections={},
        weight=selected.weight,
        grid=grid,
    )


def _pretrained(run: Run, stage: str) -> list[Row]:
    """Returns the test results before the run's first step, as rows of the stage."""
    first = run.stages[0]
    if stage == first:
        return []
    rows = [row for row in run.rows if row.stage == first and row.step == 0]
    return [dataclasses.replace(row, stage=stage) for row in rows if row.split == "test"]
