"""`summary.json`: every evaluation result of a run, one JSON object each."""

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

from robust_ft.errors import UserError
from robust_ft.files import as_path, read_json, write_json

FEW_SHOT = "few_shot"  # the stage of few-shot tuning's rows, and its folder in MODEL_DIR
ANALYSIS = "analysis"  # the role of what is no task's score
KEPT = "kept"  # the role of a held-out task that is evaluated with methods that it is else without


@dataclasses.dataclass(frozen=True)
class Row:
    """The value of one metric at one step of a stage.

    Attributes:
        stage: Name of the stage, or of the selection.
        step: Number of steps done; -1 outside training.
        task: Name of the task without the number of shots, "held_out" for the mean over the
            held-out tasks, or name of the analysis.
        role: "target", "ood", "held_out", "kept" (a held-out task once more, with the PEFT methods
            that its other row is without) or "analysis"; "" in files of versions that did not
            record it.
        split: The split that was evaluated.
        shots: Number of exemplars in the input.
        metric: Name of the metric.
        value: 0..100 for the metrics of tasks, 0..1 for `format_share`.
        num_examples: Number of examples evaluated.
        weight: The lambda of an ensemble or a cocktail, "lambda" in the file; None for others.
        without: Names of the PEFT methods that the model was evaluated without; only in the file
            where there are any.
    """

    stage: str
    step: int
    task: str
    role: str
    split: str
    shots: int
    metric: str
    value: float
    num_examples: int
    weight: float | None = None
    without: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the row's JSON object."""
        fields = dataclasses.asdict(self)
        weight, without = fields.pop("weight"), fields.pop("without")
        if weight is not None:
            fields["lambda"] = weight
        if without:
            fields["without"] = list(without)
        return fields

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Row":
        """Returns the row of a JSON object.

        Raises:
            KeyError: It lacks a field.
            ValueError, TypeError: A field has the wrong type.
        """
        value, weight = entry["value"], entry.get("lambda")
        if value is None:
            value = math.nan
        return cls(
            stage=str(entry["stage"]),
            step=int(entry["step"]),
            task=str(entry["task"]),
            role=str(entry.get("role", "")),
            split=str(entry["split"]),
            shots=int(entry["shots"]),
            metric=str(entry["metric"]),
            value=value if isinstance(value, int) else float(value),
            num_examples=int(entry.get("num_examples") or 0),
            weight=None if weight is None else float(weight),
            without=tuple(map(str, entry.get("without", ()))),
        )


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a `summary.json`.

    Raises:
        UserError: The file is missing, or does not hold a list of rows.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} does not hold a list of results.")
    rows = []
    for number, entry in enumerate(entries, start=1):
        try:
            rows.append(Row.from_json(entry))
        except KeyError as error:
            raise UserError(f"Result {number} in {path} has no {error}.") from None
        except (TypeError, ValueError):
            raise UserError(f"Result {number} in {path} cannot be understood: {entry}.") from None
    return rows


class Summary:
    """The results of a run, in memory and in MODEL_DIR/summary.json.

    A row replaces an earlier one that differs in role, value, num_examples and without only, so
    adding a result twice is harmless. A row of the role "kept" stands beside the others.
    """

    def __init__(self, directory: str | os.PathLike[str], enabled: bool = True):
        self._file = as_path(directory) / "summary.json"
        self._enabled = enabled
        self._rows: dict[tuple[Any, ...], Row] = {}
        if self._file.exists():
            self._put(read_rows(self._file))

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows and writes the file."""
        self._put(rows)
        if self._enabled:
            write_json(self._file, [row.to_json() for row in self.rows])

    def truncate(self, stage: str, step: int) -> None:
        """Drops a stage's rows after a step, before it resumes from there."""
        kept = [row for row in self.rows if row.stage != stage or row.step <= step]
        if len(kept) < len(self._rows):
            self._rows.clear()
            self.add(kept)

    def _put(self, rows: Iterable[Row]) -> None:
        for row in rows:
            key = (row.stage, row.step, row.task, row.split, row.shots, row.metric, row.weight)
            self._rows[*key, row.role == KEPT] = row
