"""`summary.json`: every evaluation result of a run, one object each."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from robust_ft.files import read_json, write_json

_KEY = ("stage", "step", "task", "split", "shots", "metric", "lambda")


class Summary:
    """The results of a run, kept in memory and in MODEL_DIR/summary.json.

    A row has stage, step, task, role, split, shots, metric, value and num_examples, and `lambda` if
    it is of an ensemble or a cocktail. A row replaces an earlier one that differs in role, value
    and num_examples only, so repeating is harmless.
    """

    def __init__(self, directory: str | os.PathLike[str], enabled: bool = True):
        self._file = Path(directory) / "summary.json"
        self._enabled = enabled
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._put(read_json(self._file, default=[]))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows and writes the file."""
        self._put(rows)
        self._write()

    def truncate(self, stage: str, step: int) -> None:
        """Forgets what a stage reported after a step, before it resumes from there."""
        kept = [r for r in self.rows if r["stage"] != stage or r["step"] <= step]
        if len(kept) < len(self._rows):
            self._rows.clear()
            self.add(kept)

    def _put(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._rows[tuple(row.get(field) for field in _KEY)] = row

    def _write(self) -> None:
        if self._enabled:
            write_json(self._file, self.rows)
