"""Tasks in what a Python program holds: pairs of texts, or rows such as a pandas DataFrame's."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from robust_ft import files
from robust_ft.data import cache, templates
from robust_ft.data.file_task import SPLITS, FileTask
from robust_ft.data.raw_files import located
from robust_ft.errors import UserError, nearest

Pairs = Iterable[tuple[str, str]]
Records = list[dict[str, Any]]


def pairs_task(
    name: str,
    train: Pairs = (),
    validation: Pairs | float = (),
    test: Pairs | float = (),
    *,
    cache_dir: str | None = None,
    **settings: Any,
) -> FileTask:
    """Returns a task whose examples are (input, target) pairs.

    ```python
    task = robust_ft.pairs_task("sums", train=[("2 + 2 =", "4"), ("3 + 4 =", "7")])
    data = robust_ft.TaskData(
        task="sums", file_tasks=(task,), inputs_length=16, targets_length=4, vocabulary=vocabulary
    )
    ```

    Args:
        name: The task's name: letters, digits and underscores.
        train: Pairs of the training split.
        validation: Pairs of the validation split, or its share of the training pairs, such as 0.1.
        test: Pairs of the test split, or a share.
        cache_dir: Folder of all caches, in which the pairs are kept as files; see `TaskData`.
        **settings: Other fields of `FileTask`, such as `metrics` and `choices`.

    Raises:
        UserError: There is no pair at all, or the name or a setting is wrong.
    """

    def records(pairs: Pairs | float) -> Records | float:
        if isinstance(pairs, int | float):
            return pairs
        return [{"input": source, "target": target} for source, target in pairs]

    splits = dict(zip(SPLITS, map(records, (train, validation, test)), strict=True))
    settings = {"inputs": "{input}", "targets": "{target}", **settings}
    return _task(name, splits, "pairs", cache_dir, settings)


def rows_task(
    name: str,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    *,
    inputs: str,
    targets: str,
    cache_dir: str | None = None,
    **settings: Any,
) -> FileTask:
    """Returns a task whose examples are rows with columns, as `FileTask` reads them from files.

    ```python
    frame = pandas.read_excel("exam.xlsx")
    task = robust_ft.rows_task(
        "exam", train=frame, validation=0.1, inputs="{question}", targets="{answer}"
    )
    ```

    Args:
        name: The task's name: letters, digits and underscores.
        train: Rows of the training split, None for none: a pandas or polars DataFrame, an Arrow
            table, a `datasets.Dataset`, or any iterable of dicts.
        validation: Rows of the validation split, or its share of the training rows, such as 0.1.
        test: Rows of the test split, or a share.
        inputs: The input text, with columns in braces; see `FileTask`.
        targets: The target text likewise.
        cache_dir: Folder of all caches; see `TaskData`. The columns that the task uses are kept
            there in a file that is named by its content: equal rows are one file, and whoever
            removes the cache removes it.
        **settings: Other fields of `FileTask`, such as `choices`, `answer` and `metrics`.

    Raises:
        UserError: There is no row at all, a row lacks a column or has something else than a text in
            it, or a setting is wrong.
    """
    settings |= {"inputs": inputs, "targets": targets}
    # Without its rows, the task says which columns it needs.
    needed = FileTask(name=name, train="rows.jsonl", **settings).columns
    names = list(dict.fromkeys(name for _, name in needed))
    given = dict(zip(SPLITS, (train, validation, test), strict=True))
    splits = {
        split: rows
        if isinstance(rows, int | float)
        else _records(rows, names, f"'{name}', {split}")
        for split, rows in given.items()
    }
    return _task(name, splits, "rows", cache_dir, settings)


def _task(
    name: str,
    splits: Mapping[str, Records | float],
    folder: str,
    cache_dir: str | None,
    settings: Mapping[str, Any],
) -> FileTask:
    """Returns the task of these records, which are written if all of them are right."""
    values: dict[str, Any] = {}
    texts: dict[Path, str] = {}
    for split, records in splits.items():
        if isinstance(records, int | float):
            values[split] = records
        elif records:
            text = "".join(map(files.json_line, records))
            key = hashlib.sha256(text.encode()).hexdigest()
            file = cache.root(cache_dir) / folder / f"{key[:16]}.jsonl"
            values[split], texts[file] = str(file), text
    task = FileTask(name=name, **values, **settings)
    for split, records in splits.items():
        for number, record in enumerate(records if isinstance(records, list) else (), 1):
            try:
                task.example(record)
            except ValueError as error:
                raise located(f"Task '{name}', {split}, row {number}", error) from error
    for file, text in texts.items():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(file, text)
    return task


def _records(rows: Any, names: Sequence[str], where: str) -> Records:
    """Returns what rows have in the named columns, as JSON would give it back."""
    records = []
    for number, row in enumerate(_dicts(rows, where), 1):
        place = f"{where}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: it is not a dict but {templates.short(row)}.")
        record = {}
        for name in names:
            column = name if name in row else templates.column(name)
            if column not in row:
                known = list(map(str, row))
                hint = nearest(name, known)
                raise UserError(f"{place}: no column '{name}', only {', '.join(known)}.{hint}")
            try:
                record[column] = json.loads(json.dumps(row[column], default=_plain))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{place}: column '{column}' is not plain data ({error})."
                ) from error
        records.append(record)
    return records


def _dicts(rows: Any, where: str) -> Iterable[Any]:
    """Yields rows as dicts by column, with None for what is missing."""
    if isinstance(rows, str | os.PathLike):
        raise UserError(f"{where}: '{rows}' is a name; robust_ft.FileTask reads files.")
    if isinstance(rows, Mapping):
        raise UserError(
            f"{where}: a dict of {', '.join(map(str, rows))} is no rows; give a list of dicts or a "
            "table."
        )
    columns = getattr(rows, "column_names", getattr(rows, "columns", ()))
    for name in columns:
        if list(columns).count(name) > 1:
            raise UserError(f"{where}: two columns are called '{name}'.")
    if hasattr(rows, "notna"):  # a pandas DataFrame, whose NaN, NA and NaT all are "missing"
        found: Iterable[Any] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    elif hasattr(rows, "__arrow_c_stream__"):
        found = pa.table(rows).to_pylist()
    else:
        found = () if rows is None else rows
    return found


def _plain(value: Any) -> Any:
    """Returns a numpy array or number as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
