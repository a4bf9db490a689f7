"""The results of an analysis of a finished run: `MODEL_DIR/<analysis>.json`.

They are rows as in `summary.json`, and what they were made with. Reports take them in.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_ft.errors import UserError
from robust_ft.files import as_path, read_json_object, write_json
from robust_ft.summary import ANALYSIS, Row

if TYPE_CHECKING:
    from robust_ft.evaluator import Result

DRIFT, ALIGNMENT, NEIGHBORS = NAMES = ("drift", "alignment", "neighbors")
# What a run is. A run that is made anew under other settings has no part in its earlier results.
_OF_RUN = ("name", "seed", "stages", "settings", "changes")

Settings = Mapping[str, Any]
Key = tuple[str, int, str, str]  # stage, step, task, split


class AnalysisResults:
    """The results of one analysis of a run, in memory and in its file.

    Args:
        directory: MODEL_DIR.
        name: One of NAMES.
        settings: What the results depend on beside the run, as JSON has it.
        enabled: Whether to write.

    Raises:
        UserError: The file has results of other settings, or cannot be understood.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        name: str,
        settings: Settings,
        enabled: bool = True,
    ):
        self._file = as_path(directory) / f"{name}.json"
        self._enabled = enabled
        run = _identity(directory)
        self._head = {"run": run, "settings": dict(settings)}
        found = _Content.read(self._file, run) or _Content({}, [], [])
        if found.rows and found.settings != settings:
            raise UserError(
                f"'{self._file}' has results of other settings: "
                f"{_differences(found.settings, settings)}; set the same, or delete the file to "
                "compute all anew."
            )
        self.rows = found.rows
        self._outputs = found.outputs
        self._keys = {_key(row) for row in found.rows}

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def add(self, result: "Result", stage: str, step: int) -> None:
        """Adds a result and writes the file, which has its earlier content or the new one."""
        rows = result.rows(stage, step)
        self.rows += rows
        self._outputs += [{"stage": stage, "step": step, **line} for line in result.predictions]
        self._keys |= {_key(row) for row in rows}
        if self._enabled:
            content = {"rows": [row.to_json() for row in self.rows], "outputs": self._outputs}
            write_json(self._file, {**self._head, **content})


def with_analyses(directory: str | os.PathLike[str], rows: Sequence[Row]) -> list[Row]:
    """Returns a run's rows with those that analyses of the finished run have added.

    What was computed of the finished run counts; a value from while it trained is added where it is
    of the same number of examples, so that no curve is of two samples.

    Args:
        directory: MODEL_DIR.
        rows: The rows of its `summary.json`.
    """
    contents = [
        _Content.read(as_path(directory) / f"{n}.json", _identity(directory)) for n in NAMES
    ]
    added = [row for content in contents if content for row in content.rows]
    if not added:
        return list(rows)
    keys = {_key(row) for row in added}
    sizes = {(row.task, row.split): row.num_examples for row in added}
    kept = [
        row
        for row in rows
        if row.role != ANALYSIS
        or (
            _key(row) not in keys
            and sizes.get((row.task, row.split), row.num_examples) == row.num_examples
        )
    ]
    return [*kept, *added]


def outputs(directory: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    """Returns what an analysis has listed beside its rows, each with its "stage" and "step"."""
    content = _Content.read(as_path(directory) / f"{name}.json", _identity(directory))
    return content.outputs if content else []


@dataclasses.dataclass(frozen=True)
class _Content:
    settings: dict[str, Any]
    rows: list[Row]
    outputs: list[dict[str, Any]]

    @classmethod
    def read(cls, file: Path, run: str) -> "_Content | None":
        """Reads a file, None if there is none, or if it is of another run."""
        fields = read_json_object(file, default={})
        if not fields or fields.get("run") != run:
            return None
        try:
            return cls(
                fields["settings"], list(map(Row.from_json, fields["rows"])), fields["outputs"]
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"'{file}' cannot be understood; delete it to compute the analysis anew."
            ) from None


def _identity(directory: str | os.PathLike[str]) -> str:
    """Returns a hash of what a run was made with."""
    about = read_json_object(as_path(directory) / "run.json", default={})
    text = json.dumps([about.get(field) for field in _OF_RUN], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _key(row: Row) -> Key:
    return row.stage, row.step, row.task, row.split


def _differences(recorded: Settings, now: Settings) -> str:
    names = [n for n in {**recorded, **now} if recorded.get(n) != now.get(n)]
    return ", ".join(f"{n} is {recorded.get(n)!r}, now {now.get(n)!r}" for n in names)
