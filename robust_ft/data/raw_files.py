"""Readers of official raw files, as they are published.

Every reader yields `Row`s. A row's place is `<file>, line <n>`, for messages about its record.
"""

import csv
import gzip
import itertools
import json
import zlib
from collections import Counter
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


def located(place: str, error: Exception) -> UserError:
    """Returns the error of a record with its place, as one sentence."""
    message = f"no field {error}" if isinstance(error, KeyError) else str(error)
    message = " ".join(message.split("\n"))
    return UserError(f"{place}: {message}{'' if message.endswith(('.', '?')) else '.'}")


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (place, line without its end) of a UTF-8 text file, of a gzipped one if named `.gz`.

    Raises:
        UserError: The file cannot be read, is cut off, or a line is not UTF-8.
    """
    for number, line in enumerate(_raw_lines(file), 1):
        place = f"{file}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {error.start + 1} of the line is 0x{line[error.start]:02X}"
            raise UserError(f"{place}: it is not UTF-8 ({where}).") from error
        if number == 1:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        yield place, text.rstrip("\r\n")


def _raw_lines(file: Path) -> Iterator[bytes]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            for line in stream:
                yield line
                number += 1
    except EOFError as error:
        raise UserError(
            f"{file}, behind line {number}: the .gz file is cut off; get it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}, line {number + 1}: it is no whole gzip file ({error})."
        ) from error
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror or error}).") from error


def json_lines(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the JSON objects of files with one a line; empty lines are skipped.

    Raises:
        UserError: A line is not a JSON object.
    """
    for file in files:
        for place, line in lines(file):
            if not line.strip():
                continue
            yield _object(place, _parsed(place, line))


def json_file(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the objects of JSON files: of a list, of an object's one list, or one a line.

    Raises:
        UserError: A file is none of these.
    """
    for file in files:
        first = [(place, line) for place, line in itertools.islice(_filled_lines(file), 2)]
        if len(first) == 2 and _is_object(first[0][1]):
            yield from json_lines([file])
            continue
        content = "\n".join(line for _, line in lines(file))
        if not content.strip():
            return
        value = _parsed(str(file), content)
        if isinstance(value, dict):
            lists = [name for name, inner in value.items() if _is_list_of_objects(inner)]
            if not lists and len(first) == 1:
                yield Row(first[0][0], value)
                continue
            if len(lists) != 1:
                found = ", ".join(lists) or f"none ({', '.join(value)})"
                raise UserError(f"{file}: it must hold one list of objects, and has {found}.")
            value = value[lists[0]]
        if not isinstance(value, list):
            raise UserError(f"{file}: it is neither a JSON list nor JSON objects.")
        for number, record in enumerate(value, 1):
            yield _object(f"{file}, item {number}", record)


def _filled_lines(file: Path) -> Iterator[tuple[str, str]]:
    return ((place, line) for place, line in lines(file) if line.strip())


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _object(place: str, record: Any) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{place}: it is not a JSON object.")
    return Row(place, record)


def _parsed(place: str, text: str) -> Any:
    """Returns the value of JSON text that starts at a place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            [twice, *_] = _repeated(name for name, _ in pairs)
            raise UserError(f"{place}: an object has '{twice}' twice.")
        return record

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = "" if ", line " in place else f", line {error.lineno}"
        raise UserError(
            f"{place}{line}: it is not JSON ({error.msg}, column {error.colno})."
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: its JSON is nested too deeply.") from error


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


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
                names = _header(place, fields)
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
                names = _header(place, fields)
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


def header(file: Path, delimiter: str, is_quoted: bool = True) -> tuple[str, ...]:
    """Returns the column names in the first line of a file, none if the file is empty.

    Raises:
        UserError: As `quoted`.
    """
    if not is_quoted:
        return next((_header(place, line.split(delimiter)) for place, line in lines(file)), ())
    rows = csv.reader((f"{line}\n" for _, line in lines(file)), delimiter=delimiter, strict=True)
    try:
        return _header(f"{file}, line 1", next(filter(None, rows), []))
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: {error}.") from error


def _header(place: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns column names, which may leave out some but repeat none."""
    for name in _repeated(filter(None, names)):
        raise UserError(f"{place}: two columns are called '{name}'.")
    return tuple(names)


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
