"""Shared by closed-book QA tasks: records with a question and all its answers."""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft.data.raw_files import Row, quoted, text, texts
from robust_ft.errors import UserError


def example(template: Callable[[str], str]) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Returns the function from {"question", "answers"} to a task's example.

    The target is the first answer; every answer is a reference.
    """

    def to_example(record: dict[str, Any]) -> Mapping[str, Any]:
        answers = list(dict.fromkeys(texts(record, "answers")))
        return {
            "inputs": template(text(record, "question")),
            "targets": answers[0],
            "references": answers,
        }

    return to_example


def dpr_topics(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the records of DPR's question files: tab-separated, answers as a Python list."""
    for place, record in quoted(files, delimiter="\t", columns=("question", "answers")):
        try:
            answers = ast.literal_eval(record["answers"])
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{place}: '{record['answers']}' is not a list of answers.") from error
        yield Row(place, {"question": record["question"], "answers": answers})
