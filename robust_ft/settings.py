"""All that a config can name, with settings, their defaults and meanings, as Markdown.

`python -m robust_ft.settings` prints it; mkdocs, which has this file as a hook, puts it into
docs/settings.md.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from robust_ft.gin_config import REGISTERED
from robust_ft.models.peft import METHODS
from robust_ft.ranges import in_words

PLACE = "<!-- robust_ft.settings -->"


class Setting(NamedTuple):
    """A parameter of something that a config can name.

    Attributes:
        name: As in configs.
        default: As text; "" where a config must set it.
        values: The range of a number in words, else "".
        meaning: From the docstring; "" where that says nothing.
    """

    name: str
    default: str
    values: str
    meaning: str


def main() -> None:
    """Prints the page."""
    print(page())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in the place that docs/settings.md has for the tables."""
    return markdown.replace(PLACE, page()) if PLACE in markdown else markdown


def page() -> str:
    """Returns a section for each class and function, with a table of its settings."""
    return "\n\n".join(map(_section, sorted(REGISTERED, key=str.lower)))


def settings(name: str) -> list[Setting]:
    """Returns the settings of what a config knows under a name."""
    target = REGISTERED[name]
    meanings = _meanings(target)
    if name == "Model":
        meanings |= {method: f"As in `@{each.__name__}()`." for method, each in METHODS.items()}
    return [
        Setting(field, _default(parameter), in_words(parameter.annotation), meanings.get(field, ""))
        for field, parameter in inspect.signature(target, eval_str=True).parameters.items()
    ]


def summary(name: str) -> str:
    """Returns what the docstring says first of what a config knows under a name."""
    documented = next(_documented(REGISTERED[name]))
    return _flat((inspect.getdoc(documented) or "").split("\n\n")[0])


def _section(name: str) -> str:
    rows = [
        f"| `{field}` | {f'`{default}`' if default else 'needed'} | {values} | {_cell(meaning)} |"
        for field, default, values, meaning in settings(name)
    ]
    table = (
        ["| setting | default | values | meaning |", "|---|---|---|---|", *rows]
        if rows
        else ["No settings."]
    )
    return "\n".join([f"## {name}", "", summary(name), "", *table])


def _documented(target: Callable[..., Any]) -> Iterator[Any]:
    """Yields what has docstrings about a target's parameters, the nearest first.

    A builder's parameters may be documented by the class that it returns, and a class's by its
    bases.
    """
    start: Any = target
    if inspect.isfunction(target):
        yield target
        start = inspect.get_annotations(target, eval_str=True).get("return")
    if isinstance(start, type):
        yield from (base for base in start.__mro__ if base is not object)


def _meanings(target: Callable[..., Any]) -> dict[str, str]:
    """Returns {parameter: meaning} of the sections Args and Attributes of docstrings."""
    meanings: dict[str, str] = {}
    for documented in _documented(target):
        text = inspect.cleandoc(documented.__doc__ or "")
        for section in re.findall(r"(?m)^(?:Args|Attributes):\n((?:(?: .*)?\n?)*)", text):
            for entry in re.split(r"(?m)^(?=[*\w]+:)", textwrap.dedent(section)):
                name, colon, meaning = entry.partition(":")
                if colon and name.isidentifier():
                    meanings.setdefault(name, _flat(meaning))
    return meanings


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is parameter.empty:
        return ""
    if dataclasses.is_dataclass(value):
        return f"@{type(value).__name__}()"
    return f"@{value.__name__}" if callable(value) else repr(value)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
