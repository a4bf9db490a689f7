"""A task's functions as names, so that a cache knows them without its module.

accuracy                               a function of this library
my_tasks:f1                            one of a module, also a method ('my_tasks:Scorer.f1')
my_tasks:at_least(threshold=0.5)       with the arguments of a `functools.partial`
"""

import ast
import functools
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PLAIN = (str, bytes, bool, int, float, type(None))


class Unnamed(ValueError):
    """A function that no name leads to; the message says which, and why."""


def name_of(
    function: Callable[..., Any],
    known: Mapping[str, Callable[..., Any]],
    modules: Sequence[str] = (),
) -> str:
    """Returns the name of a function, from which `parse` and an import lead back to it.

    Args:
        function: A function, method or callable object, or a `functools.partial` of one.
        known: Functions that have names without a module.
        modules: Modules that are searched for it beside its own: a function that another one has
            made is known by the variable that holds it.

    Raises:
        Unnamed: No module holds it under a name, or an argument of the partial is not plain.
    """
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        args, keywords = (*function.args, *args), {**function.keywords, **keywords}
        function = function.func
    path = _path(function, known, modules)
    named = [(str(number), value) for number, value in enumerate(args, start=1)]
    for name, value in [*named, *keywords.items()]:
        if not _is_plain(value):
            raise Unnamed(
                f"{path} has an argument {name} of type {type(value).__name__}, which no file can "
                "hold; give numbers, texts, or lists and dicts of them"
            )
    arguments = [repr(value) for value in args]
    arguments += [f"{name}={value!r}" for name, value in keywords.items()]
    return f"{path}({', '.join(arguments)})" if arguments else path


def parse(name: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Returns a name without its arguments, and the positional and the named arguments.

    Raises:
        ValueError: The arguments are not written as in Python, or not plain.
    """
    path, bracket, rest = name.partition("(")
    if not bracket:
        return name, (), {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("it goes on behind the arguments")
        args = tuple(ast.literal_eval(node) for node in call.args)
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except SyntaxError as error:
        raise ValueError(error.msg) from error
    return path, args, keywords


def at(module: types.ModuleType, path: str) -> Any:
    """Returns what a dotted path leads to in a module, None if nothing."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _path(
    function: Callable[..., Any],
    known: Mapping[str, Callable[..., Any]],
    modules: Sequence[str],
) -> str:
    for name, other in known.items():
        if other is function:
            return name
    home = getattr(function, "__module__", None)
    own = getattr(function, "__qualname__", "")
    for module in dict.fromkeys([home, *modules]):
        if module not in sys.modules:
            continue
        if own and _same(at(sys.modules[module], own), function):
            return f"{module}:{own}"
        for name, value in vars(sys.modules[module]).items():
            if _same(value, function):
                return f"{module}:{name}"
    raise Unnamed(
        f"{_described(function)} is not found under a name in a module, so that a cache cannot "
        "record it; define it with `def` at the top of a module"
    )


def _same(found: Any, function: Callable[..., Any]) -> bool:
    # Each access to a method makes a new object.
    is_method = isinstance(function, types.MethodType) and isinstance(found, types.MethodType)
    return found is function or (is_method and found == function)


def _described(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", "")
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
    if name.endswith("<lambda>"):
        return f"the lambda{place}"
    if "<locals>" in name:
        return f"the local function {name}{place}"
    if name:
        return f"{getattr(function, '__module__', '')}:{name}{place}"
    kind = type(function)
    return f"the object of the class {kind.__module__}.{kind.__qualname__}"


def _is_plain(value: Any) -> bool:
    # By exact type: a subclass of str may be more than its text.
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, [*value, *value.values()]))
    return type(value) in _PLAIN and (type(value) is not float or math.isfinite(value))
