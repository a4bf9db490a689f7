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

from robust_ft.errors import UserError
from robust_ft.files import json_line, write_json_lines

NOT_FINITE = "not_finite"  # key of the note that tells a null's real value: {"loss": "nan"}
EVALUATIONS = "inference_eval"
_FIELDS = {"step", "split", "task", NOT_FINITE}
_FLUSH_SECONDS = 30.0
_file_numbers = itertools.count()  # two event files opened in one second need different names


class _EventFile:
    """One TensorBoard event file, opened in `directory` under a name of its own.

    Args:
        directory: created if it is missing.
        purge_from: steps from here on that older files of the folder hold are hidden; without
            it, a run that resumes from a checkpoint would show the same steps twice.
    """

    def __init__(self, directory: pathlib.Path, purge_from: int | None = None):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        number = next(_file_numbers)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        # Stays open until close(), which closes the file below the records too.
        file = open(directory / f"{name}.{os.getpid()}.{number}", "wb")  # noqa: SIM115
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

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._write(step=step, summary=text_pb(name, text))

    def flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()


class MetricWriter:
    """Writes metrics of one stage below `directory`; a context manager.

    Files: `metrics.jsonl` with every write; TensorBoard event files in `train/` and, for
    evaluations, `inference_eval/<task>/`; `inference_eval/<task>-metrics.jsonl` with the lines
    of one task. JSON lines are on disk when `write` returns. Files are opened at the first
    write, so that a writer that is never used leaves no empty files.

    Args:
        directory: the folder of the stage.
        enabled: False on every process but the first; nothing is then created or written.
    """

    def __init__(self, directory: str | os.PathLike[str], enabled: bool = True):
        self.directory = pathlib.Path(directory)
        self.enabled = enabled
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
        """Writes scalars that are on the host already (a device array would be waited for).

        Args:
            step: the step of the stage, counted from its start.
            scalars: numbers, or arrays of one element. Not-a-number and infinity become null
                with a note beside it, which `read_metrics` turns back.
            split: recorded in the line.
            task: an evaluation of this task (with shots where names should differ by them);
                None for training.

        Raises:
            ValueError: a scalar is named as one of the line's own fields.
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

    def write_text(self, step: int, name: str, text: str, task: str | None = None) -> None:
        """Writes a text (Markdown) for TensorBoard's text page; not into `metrics.jsonl`."""
        if self.enabled:
            self._event_file(task).text(int(step), name, text)

    def truncate(self, step: int) -> None:
        """Drops what was written after `step`, when a run resumes from its checkpoint.

        The JSONL files are replaced whole, so that a crash leaves either the old or the new
        one. Event files stay; TensorBoard is told to hide their later steps.
        """
        if not self.enabled:
            return
        paths = [self.directory / "metrics.jsonl"]
        paths += sorted((self.directory / EVALUATIONS).glob("*-metrics.jsonl"))
        for path in paths:
            if path.exists():
                write_json_lines(path, (r for r in _parse(path) if r.get("step", 0) <= step))
        self._purge_from = step + 1
        for events in self._events.values():
            events.purge(self._purge_from)

    def flush(self) -> None:
        """Brings buffered events to disk."""
        for events in self._events.values():
            events.flush()

    def close(self) -> None:
        """Closes all files; a later write opens new ones."""
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
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line(record))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; one dict a line, with not-a-number and infinities restored.

    A last line that is cut off, as after a crash or while the run is still writing, is left out.

    Raises:
        UserError: the file is missing, or a line in it is not a JSON object.
    """
    return [_restore(record) for record in _parse(pathlib.Path(path))]


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"There is no metrics file {path}.") from None
    except OSError as error:
        raise UserError(f"The metrics file {path} cannot be read: {error.strerror}.") from None
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
    """Ends the file with a newline; a last line that a crash cut off is dropped."""
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
    """Seqio names may hold characters that would make folders, as in `wmt14:enfr/v003`."""
    return task.replace("/", "_").replace(":", "_")
