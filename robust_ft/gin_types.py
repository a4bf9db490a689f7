"""Checks values in configs against the annotations of functions and dataclasses.

gin passes on any value; without this check, `TRAIN_STEPS = 'ten'` would fail deep in the program.
"""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from robust_ft.errors import UserError

_PLAIN = (bool, int, float, str, bytes, list, tuple, dict, types.NoneType)
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def typed(name: str, target: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `target` after checking the types of keyword arguments.

    Args:
        name: The name in configs, for error messages.
        target: A function or class with annotated parameters.
    """
    parameters = inspect.signature(target, eval_str=True).parameters
    hints = {name: parameter.annotation for name, parameter in parameters.items()}

    @functools.wraps(target)
    def build(*args: Any, **values: Any) -> Any:
        for field, value in values.items():
            hint = hints.get(field, Any)
            if not fits(value, hint):
                raise UserError(f"{name}.{field}={value!r} must be {_type_name(hint)}.")
        return target(*args, **values)

    # For gin, which looks for parameters here and not behind `__wrapped__`.
    build.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
    return build


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value fits an annotation.

    A list fits a tuple, and an integer a float. A protocol, which configs fill with objects,
    refuses plain values only.
    """
    hint = _plain(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, choice) for choice in inner)
    if hint in (float, int):
        number = isinstance(value, (int, float) if hint is float else int)
        return number and not isinstance(value, bool)
    if origin is tuple and inner[-1] is not Ellipsis:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(inner)
            and all(map(fits, value, inner))
        )
    if _is_list(hint):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return not isinstance(value, _PLAIN)


def _is_list(hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    return origin is collections.abc.Sequence or (origin is tuple and inner[-1] is Ellipsis)


def _plain(hint: Any) -> Any:
    """Returns an annotation without the range of its numbers."""
    return hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint


def _type_name(hint: Any) -> str:
    hint = _plain(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(choice) for choice in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    if _is_list(hint) and (plural := _PLURALS.get(_plain(typing.get_args(hint)[0]))):
        return f"a list of {plural}"
    if typing.get_origin(hint) is None and isinstance(hint, type):
        return _NAMES.get(hint, f"of type {hint.__name__}")
    return "of type " + str(hint).replace("collections.abc.", "")
