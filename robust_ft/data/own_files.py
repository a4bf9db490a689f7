"""Registers the tasks that a config describes (`FileTask`) with seqio."""

import glob
from typing import Any

import seqio

from robust_ft import metrics
from robust_ft.data import derived, raw_files, seqio_tasks
from robust_ft.data.file_task import FileTask, suffix
from robust_ft.errors import UserError

_READERS: dict[str, raw_files.Reader] = {
    ".csv": raw_files.quoted,
    ".tsv": raw_files.tab_separated,
    ".jsonl": raw_files.json_lines,
}
_registered: dict[str, dict[str, Any]] = {}


def register(task: FileTask) -> None:
    """Registers a task with seqio, in place of a different `FileTask` of the same name.

    Raises:
        UserError: The name is taken by a task that is no `FileTask`, or there is no such metric.
    """
    if _registered.get(task.name) == task.definition:
        return
    if task.name in _registered:
        derived.forget(task.name)
    elif task.name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise UserError(f"FileTask.name='{task.name}' is the name of another task; choose one.")
    splits: seqio_tasks.Splits = {
        split: [seqio_tasks.Files((glob.escape(file),), _READERS[suffix(file)])]
        for split, file in task.files.items()
    }
    seqio_tasks.add(
        task.name,
        splits,
        task.example,
        metric_fns=[metrics.get(name) for name in task.metrics],
        postprocess_fn=metrics.get_postprocess(task.postprocess),
        references=True,
        choices=task.choices,
        exemplars=task.exemplars,
    )
    _registered[task.name] = task.definition
