"""A task in a user's own files."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robust_ft.data import choices, templates
from robust_ft.errors import UserError, nearest
from robust_ft.files import check_local
from robust_ft.ranges import Integer, check_ranges

SPLITS = ("train", "validation", "test")
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")  # of which each may be gzipped
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """Files of examples and how to read them.

    A file ends in `.csv` (quoted where needed), `.tsv` (never quoted), `.jsonl` (an object a line)
    or `.json` (a list of objects, an object that holds one such list, or an object a line), each
    optionally followed by `.gz`, or in `.parquet`, `.arrow` or `.feather`. The first line of `.csv`
    and `.tsv` names the columns. A folder is a dataset of the library `datasets` saved to disk; of
    one with splits, the split of the same name is read.

    In place of a file, `validation` and `test` may be a share of the training file, such as 0.1.
    Which split a row is in depends on `split_seed` and on the values of the columns in `inputs`
    alone: it is the same on every machine and in every order, rows added later move no other row,
    and rows with the same inputs are in the same split.

    Attributes:
        name: Name of the task: letters, digits and underscores.
        inputs: The input text, with columns in braces: 'Q: {question} A:'. Doubled braces stand for
            themselves; '{answers.text}' and '{options[0]}' are what is inside of a column. Numbers
            and booleans are written as Python writes them ('True').
        targets: The target text likewise. Where it is one column that holds a list, the first
            element is the target, and all elements are references.
        train: File of the training split, None for none.
        validation: File of the validation split, or the share of the training file that is cut off
            for it.
        test: File of the test split, or a share likewise.
        choices: The answer choices of a classification task: all targets that it has. With columns
            they are each row's own: '{options}', a column that holds a list, or several texts,
            ['{A}', '{B}', '{C}', '{D}'].
        answer: How `targets` says which choice is right: 'text' (the choice itself), 'index' (its
            number from 0; False and True are 0 and 1), 'number' (from 1) or 'letter' (from A).
        rank: Whether evaluation ranks the choices by their likelihood in place of decoding; by
            default if they are each row's own.
        delimiter: What separates the columns of `.csv` and `.tsv` files: by default a comma and a
            tab. A `.tsv` file with another one may be quoted like `.csv`.
        split_seed: Another one cuts other rows off the training file.
        metrics: Names for `robust_ft.metrics.get`; the first one averages and selects. By default
            'exact_match', of ranked choices 'accuracy'.
        postprocess: Name for `robust_ft.metrics.get_postprocess`. By default 'promot', of ranked
            choices 'identity'.
        exemplars: Name of the task whose training split has the exemplars of k-shot versions; its
            own by default.
    """

    name: str
    inputs: str
    targets: str
    train: str | None = None
    validation: str | float | None = None
    test: str | float | None = None
    choices: tuple[str, ...] | str = ()
    answer: str = "text"
    rank: bool | None = None
    delimiter: str | None = None
    split_seed: Integer = 0
    metrics: tuple[str, ...] | None = None
    postprocess: str | None = None
    exemplars: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choices, str) and not templates.columns(self.choices):
            raise UserError(
                f"FileTask.choices='{self.choices}' (task '{self.name}') names no column; choices "
                "that all rows have are a list, as in ['yes', 'no']."
            )
        options = (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)
        object.__setattr__(self, "choices", options)
        if self.metrics is not None:
            object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.delimiter == r"\t":  # as a shell hands it on
            object.__setattr__(self, "delimiter", "\t")
        self._check_splits()
        self._check_texts()

    def _check_splits(self) -> None:
        check_ranges(self, f" of task '{self.name}'")
        if not re.fullmatch(r"\w+", self.name):
            raise UserError(
                f"FileTask.name='{self.name}' may have only letters, digits and underscores."
            )
        for split, share in self.shares.items():
            if isinstance(share, bool) or not 0 < share < 1:
                raise UserError(
                    f"FileTask.{split}={share} (task '{self.name}') is no file, and as a share of "
                    "the training file must be above 0 and below 1."
                )
            if not self.train:
                raise UserError(
                    f"FileTask.{split}={share} (task '{self.name}') is a share of the training "
                    "file, but FileTask.train names none."
                )
        if sum(self.shares.values()) >= 1:
            raise UserError(
                f"FileTask.validation={self.validation} and FileTask.test={self.test} (task "
                f"'{self.name}') leave nothing to train on."
            )
        if not self.files:
            raise UserError(f"Task '{self.name}' names no file: give train, validation or test.")
        for split in SPLITS:
            if isinstance(file := getattr(self, split), str):
                check_local(file, f"FileTask.{split}")
        for split, file in self.files.items():
            if suffix(file) not in ("", *TEXT_SUFFIXES, *TABLE_SUFFIXES) and not os.path.isdir(
                file
            ):
                raise UserError(
                    f"File '{file}' (task '{self.name}', split '{split}') must end in one of "
                    f"{', '.join(TEXT_SUFFIXES)}, or one of these and '.gz', or in one of "
                    f"{', '.join(TABLE_SUFFIXES)}, or be a folder that `save_to_disk` has written."
                )

    def _check_texts(self) -> None:
        if not templates.columns(self.targets):
            raise UserError(
                f"FileTask.targets='{self.targets}' (task '{self.name}') names no column: all "
                f"targets would be the same; columns stand in braces, as in '{{answer}}'."
            )
        if self.answer not in choices.ANSWERS:
            raise UserError(
                f"FileTask.answer='{self.answer}' (task '{self.name}') is none of "
                f"{', '.join(choices.ANSWERS)}.{nearest(self.answer, choices.ANSWERS)}"
            )
        needs_choices = self.rank or self.answer != "text"
        if needs_choices and len(self.choices) < (1 if self.has_own_choices else 2):
            setting = "rank=True" if self.rank else f"answer='{self.answer}'"
            raise UserError(f"FileTask.{setting} (task '{self.name}') needs FileTask.choices.")
        if self.delimiter is None:
            return
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise UserError(
                f"FileTask.delimiter={self.delimiter!r} (task '{self.name}') must be one "
                r"character, such as ',', ';' or '\t'."
            )
        if not {suffix(file) for file in self.files.values()} & {".csv", ".tsv"}:
            raise UserError(
                f"FileTask.delimiter={self.delimiter!r} (task '{self.name}') is for .csv and .tsv "
                f"files, and there are none among {', '.join(self.files.values())}."
            )

    @functools.cached_property
    def has_own_choices(self) -> bool:
        """Whether each row has choices of its own."""
        return any(map(templates.columns, self.choices))

    @functools.cached_property
    def is_ranked(self) -> bool:
        """Whether evaluation ranks the choices."""
        return self.has_own_choices if self.rank is None else self.rank

    @property
    def scoring(self) -> tuple[tuple[str, ...], str]:
        """The names of its metrics and of its postprocessor, given or by default."""
        metric, postprocess = (
            ("accuracy", "identity") if self.is_ranked else ("exact_match", "promot")
        )
        metrics = (metric,) if self.metrics is None else self.metrics
        return metrics, postprocess if self.postprocess is None else self.postprocess

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """The splits that are cut off the training file, each with its share."""
        values = {split: getattr(self, split) for split in SPLITS}
        return {s: value for s, value in values.items() if isinstance(value, int | float)}

    @property
    def files(self) -> dict[str, str]:
        """Absolute names of the files that splits are read from, of a share the training file.

        A relative name starts in the working directory.
        """
        files = {split: getattr(self, split) for split in SPLITS}
        files |= dict.fromkeys(self.shares, self.train)
        return {split: os.path.abspath(file) for split, file in files.items() if file}

    @property
    def definition(self) -> dict[str, Any]:
        """All that its examples depend on except the files' content, as JSON can hold it."""
        return {**dataclasses.asdict(self), **self.files, **self.shares}

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(field, column) of each column in its texts, such as ("inputs", "question")."""
        texts = [("inputs", self.inputs), ("targets", self.targets)]
        texts += [("choices", choice) for choice in self.choices if self.has_own_choices]
        return [(field, name) for field, text in texts for name in templates.columns(text)]

    def split_of(self, record: Mapping[str, Any]) -> str:
        """Returns which split a row of the training file belongs to: "train" without shares.

        Raises:
            ValueError: A column is missing, or holds something that is no text.
        """
        if not self.shares:
            return "train"
        names = templates.columns(self.inputs) or templates.columns(self.targets)
        values = [templates.fill(f"{{{name}}}", record) for name in sorted(names)]
        digest = hashlib.sha256(json.dumps([self.split_seed, *values]).encode()).digest()
        drawn = int.from_bytes(digest[:8], "little") / 2**64
        for split, share in self.shares.items():
            if drawn < share:
                return split
            drawn -= share
        return "train"

    def example(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs, targets and references of a row, and the choices if it is ranked.

        Raises:
            ValueError: A column is missing, or holds something that is no text; or the target is
                none of the choices.
        """
        if self.inputs and self.inputs in record:
            raise ValueError(
                f"FileTask.inputs='{self.inputs}' is the name of a column, which stands in braces: "
                f"'{{{self.inputs}}}'"
            )
        own = self.has_own_choices
        options = choices.of_row(self.choices, record) if own else tuple(self.choices)
        is_list = isinstance(templates.found(self.targets, record), list)
        references = choices.right_answers(self.targets, self.answer, options, record, own)
        example = {
            "inputs": templates.fill(self.inputs, record),
            "targets": references[0],
            "references": references if is_list else [],
        }
        if self.is_ranked:
            example["answer_choices"] = list(map(str, options))
        return example


def suffix(file: str) -> str:
    """Returns a file's suffix, of a text file apart from `.gz`."""
    inner = os.path.splitext(file.removesuffix(".gz"))[1]
    return inner if inner in TEXT_SUFFIXES else os.path.splitext(file)[1]
