"""Texts with columns in braces, 'Q: {question} A:', filled from a record of a user's file."""

import decimal
import math
import re
from collections.abc import Mapping
from typing import Any

from robust_ft.errors import nearest

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_LONG = 60  # characters of a value that a message shows


def columns(template: str) -> tuple[str, ...]:
    """Returns the names in braces, each once, in the order of the template."""
    return tuple(dict.fromkeys(name for name in _FIELD.findall(template) if name))


def only_column(template: str) -> str | None:
    """Returns the name of the column that is all of a template, None for any other template."""
    names = columns(template)
    return names[0] if names and template == f"{{{names[0]}}}" else None


def fill(template: str, record: Mapping[str, Any]) -> str:
    """Returns the template with the record's texts in place of its columns.

    Raises:
        ValueError: A column is missing, or holds something that is no text.
    """

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        return match[0][0] if name is None else text(f"column '{name}'", value(name, record))

    return _FIELD.sub(replacement, template)


def value(name: str, record: Mapping[str, Any]) -> Any:
    """Returns what a record has in a column, or inside of it.

    As in `str.format`, 'answers.text' is the field `text` of the column `answers`, and 'choices[0]'
    the first element of a list; a field of a list of objects is the list of their fields. A column
    that has such a name itself comes first.

    Raises:
        ValueError: There is no such column, or no such thing inside of it.
    """
    if name in record:
        return record[name]
    root = column(name)
    if root not in record:
        hint = nearest(name, record)
        raise ValueError(f"no column '{name}', only {', '.join(record) or 'none'}.{hint}")
    found = record[root]
    for key, index in _STEP.findall(name[len(root) :]):
        inside = _inside(found, key, index)
        if inside is _NOTHING:
            raise ValueError(f"column '{root}' has no '{name[len(root) :]}': it is {short(found)}")
        found = inside
    return found


def column(name: str) -> str:
    """Returns the column of a name that goes inside of it: 'answers' of 'answers.text[0]'."""
    match = re.fullmatch(rf"(.+?)(?:{_STEP.pattern})+", name)
    return match[1] if match else name


_NOTHING = object()


def _inside(found: Any, key: str, index: str) -> Any:
    if index:
        is_there = isinstance(found, list) and int(index) < len(found)
        return found[int(index)] if is_there else _NOTHING
    if isinstance(found, list) and all(isinstance(each, Mapping) and key in each for each in found):
        return [each[key] for each in found]
    return found.get(key, _NOTHING) if isinstance(found, Mapping) else _NOTHING


def text(what: str, found: Any) -> str:
    """Returns the text of a value: numbers and booleans as Python and pandas write them.

    Args:
        what: What it is, for the message.
        found: A text, a number, True or False.

    Raises:
        ValueError: It is something else, or nothing.
    """
    if isinstance(found, str):
        try:
            found.encode()
        except UnicodeEncodeError as error:  # a JSON escape such as "\ud83d" alone
            raise ValueError(
                f"{what} has half a character, {found[error.start]!r}, at place {error.start + 1}"
            ) from error
        return found
    if found is None or (isinstance(found, float) and math.isnan(found)):
        raise ValueError(f"{what} is empty ({'null' if found is None else 'NaN'})")
    if isinstance(found, int | float | decimal.Decimal):
        return str(found)
    raise ValueError(f"{what} is neither a text nor a number but {short(found)}")


def short(found: Any) -> str:
    """Returns a value for a message, cut if it is long."""
    shown = repr(found)
    return shown if len(shown) <= _LONG else f"{shown[: _LONG - 4]} ..."
