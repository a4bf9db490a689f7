"""A task in a user's own CSV, TSV or JSONL files."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robust_ft.errors import UserError, nearest

SPLITS = ("train", "validation", "test")
SUFFIXES = (".csv", ".tsv", ".jsonl")

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """Files of examples and how to read them.

    A file ends in `.csv` (quoted where needed), `.tsv` (never quoted) or `.jsonl` (an object a
    line), optionally followed by `.gz`. The first line of `.csv` and `.tsv` names the columns.

    Attributes:
        name: Name of the task: letters, digits and underscores.
        inputs: The input text, with columns in braces: 'Q: {question} A:'. Doubled braces stand for
            themselves.
        targets: The target text likewise. Where it is one column that holds a list (`.jsonl`), the
            first element is the target, and all elements are references.
        train: File of the training split, None for none.
        validation: File of the validation split.
        test: File of the test split.
        choices: The answer choices of a classification task: all targets that it has.
        metrics: Names for `robust_ft.metrics.get`; the first one averages and selects.
        postprocess: Name for `robust_ft.metrics.get_postprocess`.
        exemplars: Name of the task whose training split has the exemplars of k-shot versions; its
            own by default.
    """

    name: str
    inputs: str
    targets: str
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    choices: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("exact_match",)
    postprocess: str = "promot"
    exemplars: str | None = None

    def __post_init__(self) -> None:
        for field in ("choices", "metrics"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not re.fullmatch(r"\w+", self.name):
            raise UserError(
                f"FileTask.name='{self.name}' may have only letters, digits and underscores."
            )
        if not self.files:
            raise UserError(f"Task '{self.name}' names no file: give train, validation or test.")
        for split, file in self.files.items():
            if suffix(file) not in SUFFIXES:
                raise UserError(
                    f"File '{file}' (task '{self.name}', split '{split}') must end in one of "
                    f"{', '.join(SUFFIXES)}, or one of these and '.gz'."
                )

    @property
    def files(self) -> dict[str, str]:
        """Absolute file names by split; a relative name starts in the working directory."""
        files = {split: getattr(self, split) for split in SPLITS}
        return {split: os.path.abspath(file) for split, file in files.items() if file}

    @property
    def definition(self) -> dict[str, Any]:
        """All that its examples depend on except the files' content, as JSON can hold it."""
        return {**dataclasses.asdict(self), **self.files}

    def example(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs, targets and references of a file's record.

        Raises:
            ValueError: A column is missing, or holds something that is no text.
        """
        column = self.targets.removeprefix("{").removesuffix("}")
        answers = record.get(column) if self.targets == f"{{{column}}}" else None
        if not isinstance(answers, list):
            answers = [_fill(self.targets, record)]
        elif not answers:
            raise ValueError(f"column '{column}' is an empty list")
        references = [_text(f"a target {answer!r}", answer) for answer in answers]
        return {
            "inputs": _fill(self.inputs, record),
            "targets": references[0],
            "references": references,
        }


def suffix(file: str) -> str:
    """Returns a file's suffix apart from `.gz`: one of SUFFIXES if it can be read."""
    return os.path.splitext(file.removesuffix(".gz"))[1]


def _fill(template: str, record: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in record:
            columns = ", ".join(record)
            raise ValueError(f"no column '{name}', only {columns}.{nearest(name, record)}")
        return _text(f"column '{name}'", record[name])

    return _FIELD.sub(value, template)


def _text(what: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{what} is neither a text nor a number but {value!r}")
