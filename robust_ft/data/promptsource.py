"""promptsource's templates: YAML files of jinja texts that turn a record into inputs and targets.

Rendered as promptsource does, in jinja's sandbox, but for two things: what a template draws at
random is a function of a given seed, and a column that is not there is an error, not an empty text.
"""

import functools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import yaml
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from robust_ft.errors import UserError, nearest

SEPARATOR = "|||"
_CHOICES = "answer_choices"
# Stands for the separator in a record's own texts; of Unicode's private use, so in no real one.
_PROTECTED = "\ue0f3\ue0f4\ue0f3"
_GENERATOR = "__generator"


class Prompt(NamedTuple):
    """A record rendered by a template; without answer choices if the template has none."""

    inputs: str
    targets: str
    answer_choices: list[str]


@dataclass(frozen=True)
class Template:
    """One template of a dataset.

    Attributes:
        name: As promptsource has it.
        jinja: The text of inputs and targets, with `|||` between them.
        answer_choices: The text of the answer choices, with `|||` between them; None for none.
    """

    name: str
    jinja: str
    answer_choices: str | None = None

    def apply(self, record: Mapping[str, Any], seed: str) -> Prompt | None:
        """Returns the prompt of a record, None if the template renders no inputs or no targets.

        Args:
            record: Columns as the dataset has them on the Hub.
            seed: Seed of the template's random draws.

        Raises:
            ValueError: A column is missing, or the template fails on the record.
        """
        for column in _columns(self.jinja) | _columns(self.answer_choices or ""):
            if column not in record:
                hint = nearest(column, record)
                raise ValueError(f"template '{self.name}' needs a column '{column}'.{hint}")
        values = {**_protect(record), _GENERATOR: random.Random(seed)}
        try:
            choices = None
            if self.answer_choices is not None:
                choices = _parts(_compiled(self.answer_choices).render(values))
            parts = _parts(_compiled(self.jinja).render({**values, _CHOICES: choices}))
        except Exception as error:  # a template is a program, which can raise anything
            raise ValueError(f"template '{self.name}' fails ({error})") from error
        if len(parts) != 2 or not all(parts):
            return None
        inputs, targets, *texts = map(_restore, [*parts, *(choices or ())])
        return Prompt(inputs, targets, texts)


def load(file: Path) -> dict[str, Template]:
    """Returns the templates of one `templates.yaml` by their names.

    Raises:
        UserError: The file is not one of promptsource's.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        entries = list(content["templates"].values())
        templates = [
            Template(str(entry["name"]), entry["jinja"], entry["answer_choices"])
            for entry in entries
        ]
    except yaml.YAMLError as error:
        raise UserError(f"{file}: it is not YAML ({' '.join(str(error).split())}).") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: it is no file of promptsource's templates ({error!r})."
        ) from error
    return {template.name: template for template in templates}


class _Loader(yaml.SafeLoader):
    """Reads the tags `!Template` and `!TemplateMetadata` as mappings."""


_Loader.add_multi_constructor(
    "!", lambda loader, _, node: loader.construct_mapping(node, deep=True)
)


@jinja2.pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    return context[_GENERATOR].choice(items)


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    counts = Counter(items)
    return [item for item in counts if counts[item] == max(counts.values())] if items else None


_ENVIRONMENT = SandboxedEnvironment()
_ENVIRONMENT.globals["zip"] = zip
# jinja's own `random` draws from Python's global generator.
_ENVIRONMENT.filters |= {"choice": _choice, "random": _choice, "most_frequent": _most_frequent}


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


@functools.cache
def _columns(text: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) - {_CHOICES})


def _parts(rendered: str) -> list[str]:
    return [part.strip() for part in rendered.split(SEPARATOR)]


def _protect(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED)
    if isinstance(value, Mapping):
        return {key: _protect(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_protect(inner) for inner in value]
    return value


def _restore(text: str) -> str:
    return text.replace(_PROTECTED, SEPARATOR)
