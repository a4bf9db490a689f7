"""Readers of official raw files, as they are published.

Every reader yields `Row`s. A row's place is `<file>, line <n>`, for messages about its record.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json

_BYTE_ORDER_MARK = "\ufeff"


class Row(NamedTuple):
    """One record of a raw file: its fields, and its place in the file."""

    place: str
    record: dict[str, Any]


Reader = Callable[[Sequence[Path]], Iterable[Row]]


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (place, line without its end) of a UTF-8 text file, of a gzipped one if named `.gz`.

    Raises:
        UserError: A line is not UTF-8.
    """
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            place = f"{file}, line {number}"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: it is not UTF-8 ({error.reason}).") from error
            if number == 1:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            yield place, text.rstrip("\r\n")


def json_lines(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the JSON objects of files with one a line; empty lines are skipped.

    Raises:
        UserError: A line is not a JSON object.
    """
    for file in files:
        for place, line in lines(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place}: it is not JSON ({error.msg}, column {error.colno})."
                ) from error
            if not isinstance(record, dict):
                raise UserError(f"{place}: it is not a JSON object.")
            yield Row(place, record)


def json_list(files: Sequence[Path], key: str | None = None) -> Iterator[Row]:
    """Yields the objects of a file that is one JSON list, or has one under `key`.

    Places are `<file>, item <n>`, counted from 1.

    Raises:
        UserError: The file is not such JSON.
    """
    for file in files:
        content = read_json(file)
        if key is not None:
            content = content.get(key) if isinstance(content, dict) else None
        if not isinstance(content, list):
            raise UserError(f"{file}: it is not a JSON list{f' under {key!r}' if key else ''}.")
        for number, record in enumerate(content, 1):
            place = f"{file}, item {number}"
            if not isinstance(record, dict):
                raise UserError(f"{place}: it is not a JSON object.")
            yield Row(place, record)


def tab_separated(files: Sequence[Path], columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yields the rows of tab-separated files without quoting, as GLUE has them.

    Args:
        files: The files.
        columns: Their names; by default the first line of each file holds them.

    Raises:
        UserError: A row has more or fewer fields than there are columns.
    """
    for file in files:
        names = tuple(columns)
        for place, line in lines(file):
            fields = line.split("\t")
            if not names:
                names = tuple(fields)
            elif line.strip():
                yield _row(place, names, fields)


def quoted(
    files: Sequence[Path], delimiter: str = ",", columns: Sequence[str] = ()
) -> Iterator[Row]:
    """Yields the rows of comma- or otherwise separated files whose fields may be quoted.

    A quoted field may hold the delimiter, doubled quotes and line breaks.

    Args:
        files: The files.
        delimiter: One character.
        columns: Their names; by default the first row of each file holds them.

    Raises:
        UserError: A row has more or fewer fields than there are columns, or quotes do not match.
    """
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default cuts at 128 KiB
    for file in files:
        names = tuple(columns)
        reader = csv.reader(
            (f"{line}\n" for _, line in lines(file)), delimiter=delimiter, strict=True
        )
        while True:
            place = f"{file}, line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise UserError(f"{place}: {error}.") from error
            if not names:
                names = tuple(fields)
            elif fields:
                yield _row(place, names, fields)


def aligned(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Row]:
    """Yields the lines of several files side by side, one file a column; none may be shorter.

    Raises:
        UserError: The files have unequal numbers of lines.
    """
    streams = [lines(file) for file in files]
    while True:
        group = [next(stream, None) for stream in streams]
        row = [pair for pair in group if pair is not None]
        if not row:
            return
        place = row[0][0]
        if len(row) < len(group):
            ended = files[group.index(None)]
            raise UserError(f"{place}: it has no counterpart, {ended} ends before it.")
        yield Row(place, dict(zip(columns, (text for _, text in row), strict=True)))


def _row(place: str, names: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(names):
        raise UserError(
            f"{place}: it has {len(fields)} fields, but there are {len(names)} columns "
            f"({', '.join(names)})."
        )
    return Row(place, dict(zip(names, fields, strict=True)))


def text(record: Mapping[str, Any], name: str) -> str:
    """Returns a field that must be a string.

    Raises:
        ValueError: There is no such field, or it is something else.
    """
    if name not in record:
        raise ValueError(f"no field '{name}'.{nearest(name, record)}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' is not a string but {value!r}")
    return value


def texts(record: Mapping[str, Any], name: str) -> list[str]:
    """Returns a field that must be a list of strings, not an empty one.

    Raises:
        ValueError: There is no such field, or it is something else.
    """
    value = record.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"field '{name}' is not a list of strings but {value!r}")
    return value


def one_of(record: Mapping[str, Any], name: str, choices: Mapping[str, str]) -> str:
    """Returns what `choices` has for a field that must be one of its keys.

    Raises:
        ValueError: There is no such field, or it is something else.
    """
    value = text(record, name)
    if value not in choices:
        hint = nearest(value, choices)
        raise ValueError(f"{name} '{value}' is none of {', '.join(choices)}.{hint}")
    return choices[value]
