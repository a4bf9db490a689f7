"""The answer choices of a row of a user's file, and which of them is right."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ft.data import templates
from robust_ft.errors import nearest

ANSWERS = ("text", "index", "number", "letter")


def of_row(texts: Sequence[str], record: Mapping[str, Any]) -> Sequence[str | float]:
    """Returns the choices of a row: texts, or the numbers that it has in their place.

    Args:
        texts: Templates of the choices, or the single one of a column that holds a list.
        record: The row.

    Raises:
        ValueError: There are not two choices, or one is empty.
    """
    choices = [templates.found(text, record) for text in texts]
    if len(choices) == 1:
        [found] = choices
        if not isinstance(found, list):
            raise ValueError(
                f"FileTask.choices='{texts[0]}' is no list of choices but {templates.short(found)};"
                " where each choice is a column, as in .csv files, name them all"
            )
        choices = found
    for number, choice in enumerate(choices, 1):
        if templates.text(f"choice {number}", choice) == "":
            raise ValueError(f"choice {number} is an empty text")
    if len(choices) < 2:
        raise ValueError(f"there must be at least two choices, not {len(choices)}")
    return choices


def right_answers(
    targets: str,
    answer: str,
    choices: Sequence[str | float],
    record: Mapping[str, Any],
    are_own: bool = False,
) -> list[str]:
    """Returns the target of a row and, after it, all other right answers.

    Args:
        targets: The template.
        answer: What it gives of the right choice, one of ANSWERS.
        choices: The choices, none for a task without.
        record: The row.
        are_own: Whether the choices are the row's own. A number is then none of texts, even if one
            of them says the same: it may be an index.

    Raises:
        ValueError: There is no target, or it is none of the choices.
    """
    found = templates.found(targets, record)
    [column, *_] = templates.columns(targets)
    answers, what = (found, "a target in ") if isinstance(found, list) else ([found], "")
    if not answers:
        raise ValueError(f"column '{column}' is an empty list")
    texts = [templates.text(f"{what}column '{column}'", each) for each in answers]
    known = list(map(str, choices))
    if answer != "text":
        return [known[_position(answer, text, len(known))] for text in texts]
    are_texts = are_own and not any(isinstance(choice, int) for choice in choices)
    is_number = isinstance(answers[0], int) and are_texts
    if choices and (texts[0] not in known or is_number):
        hint = "" if is_number else nearest(texts[0], known)
        hint = hint or _other_answer(texts[0])
        raise ValueError(f"target '{texts[0]}' is none of {', '.join(known)}.{hint}")
    return texts


def _position(answer: str, text: str, count: int) -> int:
    """Returns the index of the choice that a text means."""
    said = text.strip()
    if answer == "index":
        said = {"False": "0", "True": "1"}.get(said, said)
    if answer == "letter":
        position = ord(said.upper()) - ord("A") if re.fullmatch(r"[A-Za-z]", said) else -1
        known = f"a letter from A to {chr(ord('A') + count - 1)}"
    else:
        first = 0 if answer == "index" else 1
        whole = re.fullmatch(r"(\d+)(\.0)?", said)
        position = int(whole[1]) - first if whole else -1
        known = f"a number from {first} to {count - 1 + first}"
    if not 0 <= position < count:
        raise ValueError(
            f"the answer '{text}' is not {known}, of {count} choices (FileTask.answer='{answer}')"
        )
    return position


def _other_answer(text: str) -> str:
    """Returns which `FileTask.answer` a target that is no choice may need, "" for none."""
    if re.fullmatch(r"[A-Za-z]", text):
        return " If it is the letter of a choice, set FileTask.answer='letter'."
    if re.fullmatch(r"True|False|\d+(\.0)?", text):
        return (
            " If it counts the choices, set FileTask.answer='index' (from 0) or 'number' (from 1)."
        )
    return ""
