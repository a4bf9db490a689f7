"""Reads JSON, and writes files and folders whole or not at all."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from robust_ft import buckets
from robust_ft.errors import UserError

_REQUIRED = object()


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or folder that may be in a bucket (`gs://bucket/run`).

    Raises:
        UserError: It is in a bucket that cannot be reached.
    """
    return buckets.reached(path) if buckets.is_bucket(path) else Path(path)


def check_local(path: str | os.PathLike[str] | None, what: str) -> None:
    """Raises a UserError for a path in a bucket, which would be taken for a local folder.

    Args:
        path: The path, if there is one.
        what: What it is, such as "FileTask.train".
    """
    if (parts := buckets.split(path)) is not None:
        raise UserError(
            f"{what} '{parts[0]}://{parts[1]}' is in a bucket, but robust_ft reads it from a "
            "folder: mount the bucket (gcsfuse, mountpoint-s3) or copy it, and give the folder."
        )


def read_json(path: str | os.PathLike[str], default: Any = _REQUIRED) -> Any:
    """Returns what a JSON file holds.

    Args:
        path: The file.
        default: Returned if there is no such file; without it, that is an error.

    Raises:
        UserError: The file is missing, cannot be read, or is not JSON (it may be cut off).
    """
    try:
        content = as_path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if default is not _REQUIRED:
            return default
        raise UserError(f"There is no file '{path}'.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    return parse_json(content, path)


def read_json_object(path: str | os.PathLike[str], default: Any = _REQUIRED) -> dict[str, Any]:
    """Returns the JSON object that a file holds; see `read_json`."""
    value = read_json(path, default)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is not a JSON object.")
    return value


def parse_json(content: bytes, path: str | os.PathLike[str]) -> Any:
    """Returns what the content of a JSON file says; `path` names the file in errors."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not JSON: it is not text in UTF-8.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"'{path}' is not JSON: {error.msg} in line {error.lineno}.") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, indented by 2."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON Lines file, one object a line."""
    write_atomically(path, "".join(map(json_line, records)))


def json_line(record: Mapping[str, Any]) -> str:
    """Returns a line of a JSON Lines file, with its newline."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file; a reader, or a crash, finds the earlier file or the new one, whole."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may leave the new name, but empty


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or a folder to, which replaces `path` at the end.

    If anything goes wrong, what was written is removed and what was at `path` stays. Processes on
    one or several machines may write the same path at the same time; the last one wins. In a
    bucket, see `buckets.replacing`.
    """
    path = as_path(path).absolute()
    if buckets.is_bucket(path):
        with buckets.replacing(path) as temporary:
            yield temporary
        return
    writer = f"{socket.gethostname()}.{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    earlier = path.with_name(f".{path.name}.{writer}.earlier")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be renamed onto one that holds files
            path.rename(earlier)
        temporary.replace(path)
    finally:
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        for leftover in (temporary, earlier):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
