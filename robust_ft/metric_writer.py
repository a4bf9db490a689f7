"""Writes the scalars of one stage: `metrics.jsonl` for programs, event files for TensorBoard.

Event files are written with TensorBoard's record writer and protocol buffers, not with its
`EventFileWriter`: that one imports tensorflow wherever tensorflow is installed.
"""

import itertools
import json
import math
import numbers
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from robust_ft import buckets
from robust_ft.errors import UserError
from robust_ft.files import as_path, json_line, write_json_lines

NOT_FINITE = "not_finite"  # key of the note with the values that null stands for: {"loss": "nan"}
EVALUATIONS = "inference_eval"
_FIELDS = {"step", "split", "task", NOT_FINITE}
_FLUSH_SECONDS = 30.0
_file_numbers = itertools.count()  # two event files opened in one second need different names


class _EventFile:
    """One TensorBoard event file, under a unique name in `directory`.

    Args:
        directory: The folder, created if it is missing.
        purge_from: TensorBoard hides what older files of the folder hold from this step on, so that
            a resumed run does not show steps twice.
    """

    def __init__(self, directory: pathlib.Path, purge_from: int | None = None):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        number = next(_file_numbers)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        path = directory / f"{name}.{os.getpid()}.{number}"
        # Stays open until close(), which closes the file below the records too.
        in_bucket = buckets.is_bucket(path)
        file: Any = buckets.GrowingObject(path) if in_bucket else open(path, "wb")  # noqa: SIM115
        self._records = RecordWriter(file)
        self._new_event = event_pb2.Event
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        if purge_from is not None:
            self.purge(purge_from)
        self.flush()

    def _write(self, **fields: Any) -> None:
        event = self._new_event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def purge(self, step: int) -> None:
        from tensorboard.compat.proto import event_pb2

        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import summary_pb2

        parts = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=parts))

    def flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()


class MetricWriter:
    """Writes metrics of one stage below `directory`; a context manager.

    Files: `metrics.jsonl` with every write; TensorBoard event files in `train/` and, for
    evaluations, `inference_eval/<task>/`; `inference_eval/<task>-metrics.jsonl` with the lines
    of one task. JSON lines are on disk when `write` returns; in a bucket, where files are written
    whole, after `flush`, and at the latest half a minute later. Files are opened at the first
    write, so that a writer that is never used leaves no empty files.

    Args:
        directory: The folder of the stage.
        enabled: Whether anything is created or written; False on every process but the first.
    """

    def __init__(self, directory: str | os.PathLike[str], enabled: bool = True):
        self.directory = as_path(directory)
        self.enabled = enabled
        self._lines: dict[pathlib.Path, buckets.GrowingObject] = {}  # of files in a bucket
        self._flushed = time.monotonic()
        self._events: dict[str, _EventFile] = {}
        self._mended: set[pathlib.Path] = set()
        self._purge_from: int | None = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(
        self,
        step: int,
        scalars: Mapping[str, Any],
        split: str = "train",
        task: str | None = None,
    ) -> None:
        """Writes scalars, which should be on the host: reading a device array waits for its step.

        Args:
            step: The step of the stage, counted from its start.
            scalars: Numbers, or arrays of one element. NaN and infinity are written as null, with a
                note from which `read_metrics` restores them.
            split: The split, recorded in the line.
            task: The evaluated task, with its number of shots; None for training.

        Raises:
            ValueError: A scalar has the name of one of the line's own fields.
        """
        if not self.enabled:
            return
        if taken := sorted(_FIELDS & set(scalars)):
            raise ValueError(f"a metric cannot be named {taken[0]!r}")
        values = {name: _number(value) for name, value in scalars.items()}
        head = {"step": int(step), "split": split}
        self._append("metrics.jsonl", head | ({"task": task} if task else {}) | _json(values))
        if task:
            line = {"step": int(step), "split": split} | _json(values)
            self._append(f"{EVALUATIONS}/{_file_name(task)}-metrics.jsonl", line)
        self._event_file(task).scalars(int(step), values)

    def truncate(self, step: int) -> None:
        """Drops everything after `step`, when a run resumes from its checkpoint.

        The JSONL files are replaced whole, so that a crash leaves either the old or the new
        one. Event files stay; TensorBoard is told to hide their later steps.
        """
        if not self.enabled:
            return
        self._close_lines()
        paths = [self.directory / "metrics.jsonl"]
        paths += sorted((self.directory / EVALUATIONS).glob("*-metrics.jsonl"))
        for path in paths:
            if path.exists():
                write_json_lines(path, (r for r in _parse(path) if r.get("step", 0) <= step))
        self._purge_from = step + 1
        for events in self._events.values():
            events.purge(self._purge_from)

    def flush(self) -> None:
        """Writes to disk, or to the bucket, what is buffered."""
        for lines in self._lines.values():
            lines.flush()
        for events in self._events.values():
            events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes all files; a later write opens new ones."""
        self._close_lines()
        for events in self._events.values():
            events.close()
        self._events.clear()

    def _event_file(self, task: str | None) -> _EventFile:
        folder = f"{EVALUATIONS}/{_file_name(task)}" if task else "train"
        if folder not in self._events:
            self._events[folder] = _EventFile(self.directory / folder, self._purge_from)
        return self._events[folder]

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.directory / name
        if path not in self._mended:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)
            self._mended.add(path)
        if buckets.is_bucket(path):
            self._append_in_bucket(path, json_line(record))
            return
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line(record))

    def _append_in_bucket(self, path: pathlib.Path, line: str) -> None:
        if path not in self._lines:
            content = path.read_bytes() if path.exists() else b""
            self._lines[path] = buckets.GrowingObject(path, content)
        self._lines[path].write(line.encode())
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _close_lines(self) -> None:
        for lines in self._lines.values():
            lines.close()
        self._lines.clear()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`: one dict a line, with NaN and infinity restored.

    A truncated last line, as after a crash or while the run is writing, is left out.

    Raises:
        UserError: The file is missing, or a line in it is not a JSON object.
    """
    return [_restore(record) for record in _parse(as_path(path))]


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"There is no metrics file {path}.") from None
    except OSError as error:
        raise UserError(
            f"The metrics file {path} cannot be read: {error.strerror or error}."
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):  # a whole line; what follows the last newline may be cut off
            raise UserError(f"Line {number} of {path} is not a JSON object.")
    return records


def _mend(path: pathlib.Path) -> None:
    """Drops a last line that a crash truncated, and ends the file with a newline."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        write_json_lines(path, _parse(path))


def _number(value: Any) -> int | float:
    """Returns a Python number for a Python, NumPy or JAX scalar."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)


def _json(values: Mapping[str, int | float]) -> dict[str, Any]:
    notes = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    record: dict[str, Any] = {k: None if k in notes else v for k, v in values.items()}
    return record | ({NOT_FINITE: notes} if notes else {})


def _restore(record: dict[str, Any]) -> dict[str, Any]:
    notes = record.pop(NOT_FINITE, {})
    return record | {name: float(text) for name, text in notes.items()}


def _file_name(task: str) -> str:
    """Returns a seqio name without characters of paths, as in `wmt14:enfr/v003`."""
    return task.replace("/", "_").replace(":", "_")
