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


def fill(template: str, record: Mapping[str, Any]) -> str:
    """Returns the template with the record's texts in place of its columns.

    Raises:
        ValueError: A column is missing, or holds something that is no text.
    """

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        return match[0][0] if name is None else text(f"column '{name}'", value(name, record))

    return _FIELD.sub(replacement, template)


def found(template: str, record: Mapping[str, Any]) -> Any:
    """Returns the value of the column that is all of a template; else the filled template.

    Raises:
        ValueError: As `fill`.
    """
    name = next(iter(columns(template)), None)
    return value(name, record) if template == f"{{{name}}}" and name else fill(template, record)


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
    inner = record[root]
    for key, index in _STEP.findall(name[len(root) :]):
        outer, inner = inner, _inside(inner, key, index)
        if inner is _NOTHING:
            raise ValueError(f"column '{root}' has no '{name[len(root) :]}': it is {short(outer)}")
    return inner


def column(name: str) -> str:
    """Returns the column of a name that goes inside of it: 'answers' of 'answers.text[0]'."""
    match = re.fullmatch(rf"(.+?)(?:{_STEP.pattern})+", name)
    return match[1] if match else name


_NOTHING = object()


def _inside(outer: Any, key: str, index: str) -> Any:
    if index:
        is_there = isinstance(outer, list) and int(index) < len(outer)
        return outer[int(index)] if is_there else _NOTHING
    if isinstance(outer, list) and all(isinstance(each, Mapping) and key in each for each in outer):
        return [each[key] for each in outer]
    return outer.get(key, _NOTHING) if isinstance(outer, Mapping) else _NOTHING


def text(what: str, given: Any) -> str:
    """Returns the text of a value: numbers and booleans as Python and pandas write them.

    Args:
        what: What it is, for the message.
        given: A text, a number, True or False.

    Raises:
        ValueError: It is something else, or nothing.
    """
    if isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError as error:  # a JSON escape such as "\ud83d" alone
            raise ValueError(
                f"{what} has half a character, {given[error.start]!r}, at place {error.start + 1}"
            ) from error
        return given
    if given is None or (isinstance(given, float) and math.isnan(given)):
        raise ValueError(f"{what} is empty ({'null' if given is None else 'NaN'})")
    if isinstance(given, int | float | decimal.Decimal):
        return str(given)
    raise ValueError(f"{what} is neither a text nor a number but {short(given)}")


def short(given: Any) -> str:
    """Returns a value for a message, cut if it is long."""
    shown = repr(given)
    return shown if len(shown) <= _LONG else f"{shown[: _LONG - 4]} ..."
