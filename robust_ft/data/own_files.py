"""Registers the tasks that a config describes (`FileTask`) with seqio, and reads their files."""

import contextlib
import functools
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seqio

from robust_ft import metrics
from robust_ft.data import derived, raw_files, saved_dataset, seqio_tasks, tables
from robust_ft.data.file_task import FileTask, suffix
from robust_ft.data.raw_files import Row
from robust_ft.errors import UserError, nearest

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
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
    splits: seqio_tasks.Splits = {split: [_origin(task, split)] for split in task.files}
    names, postprocess = task.scoring
    seqio_tasks.add(
        task.name,
        splits,
        task.example,
        metric_fns=[metrics.get(name) for name in names],
        postprocess_fn=metrics.get_postprocess(postprocess),
        references=True,
        choices=() if task.has_own_choices else task.choices,
        exemplars=task.exemplars,
        answer_choices=task.is_ranked,
    )
    _registered[task.name] = task.definition


def _origin(task: FileTask, split: str) -> seqio_tasks.Files:
    file = Path(task.files[split])
    if suffix(file.name) == "" or file.is_dir():
        name = "train" if split in task.shares else split
        read = functools.partial(_rows, task, split, saved_dataset.read)
        return _SavedDataset((str(file),), read, name)
    read = functools.partial(_rows, task, split, _reader(task, suffix(file.name)))
    return seqio_tasks.Files((glob.escape(str(file)),), read)


@dataclass(frozen=True)
class _SavedDataset(seqio_tasks.Files):
    """The files of one split of a dataset that `save_to_disk` has written.

    Attributes:
        split: Its name in the dataset.
    """

    split: str

    def find(self) -> list[Path] | None:
        """Returns the files that hold the split, None if there is no such folder."""
        [folder] = self.paths
        return saved_dataset.find(Path(folder), self.split) if Path(folder).exists() else None


def _reader(task: FileTask, kind: str) -> raw_files.Reader:
    if kind in (".csv", ".tsv"):
        return functools.partial(_separated, task)
    return {".jsonl": raw_files.json_lines, ".json": raw_files.json_file}.get(kind, tables.read)


def _rows(
    task: FileTask, split: str, read: raw_files.Reader, files: Sequence[Path]
) -> Iterator[Row]:
    """Yields the rows of a split out of those of its files.

    Raises:
        UserError: A file is not what its name says, lacks a column, or leaves a split empty.
    """
    file = task.files[split]
    parts = ["train", *task.shares] if split in ("train", *task.shares) else [split]
    counts = dict.fromkeys(parts, 0)
    for row in read(files):
        try:
            part = task.split_of(row.record) if len(parts) > 1 else split
        except ValueError as error:
            raise raw_files.located(row.place, error) from error
        counts[part] += 1
        if part == split:
            yield row
    total = sum(counts.values())
    if not total:
        raise UserError(f"{file}: it has no rows (task '{task.name}', split '{split}').")
    for part, count in counts.items():
        if not count:
            shares = " and ".join(f"FileTask.{name}={share}" for name, share in task.shares.items())
            raise UserError(
                f"{shares} (task '{task.name}') of the {total} rows in {file} leaves the split "
                f"'{part}' without any; give it a file, or another share."
            )


def _separated(task: FileTask, files: Sequence[Path]) -> Iterator[Row]:
    """Yields the rows of a `.csv` or `.tsv` file whose header has all columns of the task."""
    [file] = files
    usual = "\t" if suffix(file.name) == ".tsv" else ","
    delimiter = task.delimiter or usual
    is_quoted = (usual, delimiter) != ("\t", "\t")
    names = raw_files.header(file, delimiter, is_quoted)
    for field, name in task.columns if names else ():
        if name in names:
            continue
        if other := _delimiter_with(name, file):
            raise UserError(
                f"{file}, line 1: its columns are separated by {_DELIMITERS[other]}; set "
                f"FileTask.delimiter={other!r}."
            )
        only = f"one column, '{names[0]}'" if len(names) == 1 else ", ".join(names)
        raise UserError(
            f"{file}, line 1: there is no column '{name}' (FileTask.{field}), only {only}, where "
            f"{_DELIMITERS.get(delimiter, repr(delimiter))} separates columns."
            f"{nearest(name, names)}"
        )
    yield from raw_files.quoted(files, delimiter) if is_quoted else raw_files.tab_separated(files)


def _delimiter_with(name: str, file: Path) -> str | None:
    """Returns a delimiter with which a header has the column, None if there is none."""
    for delimiter in _DELIMITERS:
        with contextlib.suppress(UserError):
            if name in raw_files.header(file, delimiter):
                return delimiter
    return None
