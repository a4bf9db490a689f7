"""`<stage>/overlap.json`: evaluated examples that are among a stage's training examples.

`overlap_replay.json`: those among the examples that are replayed.
"""

import dataclasses
import os

from robust_ft import console, multihost
from robust_ft.data import overlap
from robust_ft.data.cache import TaskData
from robust_ft.evaluate import of_tasks
from robust_ft.files import as_path, write_json
from robust_ft.stage import Stage

FILE, REPLAY_FILE = ("overlap.json", "overlap_replay.json")
_SHOWN = 5  # sentences


def write(stage: Stage, directory: str | os.PathLike[str]) -> None:
    """Counts them before a stage trains, says so once, and keeps the counts for the report.

    On the first process alone; a stage that goes on has the file already.
    """
    _write(stage.data, stage, directory, FILE)
    if stage.replay is not None:
        _write(stage.replay.data, stage, directory, REPLAY_FILE)


def _write(train: TaskData, stage: Stage, directory: str | os.PathLike[str], name: str) -> None:
    file = as_path(directory) / name
    evaluations = of_tasks((*stage.evaluations, *stage.final_evaluations))
    if not multihost.is_first() or file.exists() or not evaluations:
        return
    evaluated = dict.fromkeys(overlap.Evaluated(each.task_data, each.limit) for each in evaluations)
    counted = overlap.count(train, tuple(evaluated))
    said = list(overlap.sentences(counted))
    for sentence in said[:_SHOWN]:
        console.print_line(f"[{stage.name}] {sentence}.", style="yellow")
    if len(said) > _SHOWN:
        console.print_line(f"[{stage.name}] and {len(said) - _SHOWN} more splits: see {file}.")
    write_json(file, dataclasses.asdict(counted))
