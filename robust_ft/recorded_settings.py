"""Flattens a recipe into settings: all that its results depend on, one value a field.

    {"seed": 0, "stages": ["model"], "stages.model.optimizer": "AdamW",
     "stages.model.optimizer.learning_rate.peak": 0.001, ...}

Fields are attributes. The elements of a list have their names, evaluations "task:split", all else a
number. An object's own value is its class, a list's the keys of its elements; so an object of
another class, or an element more, is a difference of its own.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ft.data.cache import TaskData
from robust_ft.data.file_task import SPLITS, FileTask
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import Evaluator
from robust_ft.few_shot import FewShot
from robust_ft.models.config import ModelConfig
from robust_ft.models.peft import Prompt
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage
from robust_ft.vocabulary import Vocabulary

# As JSON has it; a list holds plain values.
Setting = str | int | float | bool | list[Any] | None

# What cannot change results beyond rounding: where things are and how they are computed. The mesh
# is among it, so that a slice of another size can go on with a run. Examples are identified by
# their content, whatever module or file they come from.
LEFT_OUT: Mapping[type, Sequence[str]] = {
    Recipe: ("model_dir", "partitioner", "compile_effort", "tuned_up_to"),
    Stage: ("log_period", "final_kept"),
    FewShot: ("side_by_side",),
    TaskData: ("cache_dir", "module"),
    ModelConfig: ("attention", "remat"),
}
# Fields that name files: their content counts, not their place.
PLACES: Mapping[type, Sequence[str]] = {
    Stage: ("restore", "teacher"),
    FewShot: ("restore",),
    Prompt: ("file",),
}


@dataclasses.dataclass
class Flattened:
    """A recipe in pieces.

    Attributes:
        settings: {field: value}, without those of `places`.
        defaults: The fields that have their class's default.
        places: {field: what it names}, see `PLACES`.
        data: {what is read: whether an evaluation reads it}.
    """

    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    defaults: set[str] = dataclasses.field(default_factory=set)
    places: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[TaskData, bool] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, path: str = "") -> "Flattened":
        """Flattens a recipe, or another object whose fields are to begin with `path`."""
        flattened = cls()
        flattened._add(path, value, False)
        return flattened

    def _add(self, path: str, value: Any, is_default: bool) -> None:
        if is_default:
            self.defaults.add(path)
        if isinstance(value, TaskData):
            self.data.setdefault(value, False)
        if isinstance(value, set | frozenset):
            value = sorted(value, key=repr)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if all(map(_is_plain, value)):
                self.settings[path] = [_plain(each) for each in value]
                return
            value = dict(zip(_keys(value), value, strict=True))
        if _is_plain(value):
            self.settings[path] = _plain(value)
            return
        if isinstance(value, Evaluation):
            value = dataclasses.replace(value, data=value.task_data)  # with its shots
            self.data[value.data] = True
        self._add_inside(path, value, is_default)

    def _add_inside(self, path: str, value: Any, is_default: bool) -> None:
        """Adds an object's class, or a mapping's keys, and what is in it."""
        marker, parts = _opened(value)
        if path:
            self.settings[path] = marker
        own, places = (_of_class(table, value) for table in (LEFT_OUT, PLACES))
        if isinstance(value, Evaluation):
            # The task's name says its shots. Where samples are drawn, each batch draws its own.
            own |= {"shots"} | ({"batch_size"} if value.decoder.temperature == 0 else set())
        if isinstance(value, FewShot):  # the task of its data is a placeholder
            drawn = {each.task: value.training_data(each) for each in value.evaluations}
            parts = [(name, drawn if name == "data" else part) for name, part in parts]
        if isinstance(value, FileTask):  # a share of the training file is a setting, a file is not
            parts = [
                (name, "file" if name in SPLITS and isinstance(part, str) else part)
                for name, part in parts
            ]
        defaults = _defaults(value)
        for name, part in parts:
            field = f"{path}.{name}" if path else name
            if name in own:
                continue
            if name in places:
                self.places[field] = part
                continue
            unchanged = name in defaults and _same(defaults[name], part)
            self._add(field, part, is_default or unchanged)


def _of_class(table: Mapping[type, Sequence[str]], value: Any) -> set[str]:
    return {name for kind, names in table.items() if isinstance(value, kind) for name in names}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | np.generic)


def _plain(value: Any) -> Setting:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # which JSON has no word for
    return value  # type: ignore[no-any-return]


def _keys(elements: Sequence[Any]) -> list[str]:
    keys: list[str] = []
    for number, element in enumerate(elements):
        key = str(number)
        if isinstance(element, Evaluator):
            key = f"{element.task}:{element.split}"
        elif isinstance(name := getattr(element, "name", None), str):
            key = name
        again = sum(other.split("#")[0] == key for other in keys)
        keys.append(f"{key}#{again + 1}" if again else key)
    return keys


def _opened(value: Any) -> tuple[Setting, list[tuple[str, Any]]]:
    """Returns what stands for an object itself, and its parts by name."""
    if isinstance(value, Mapping):
        return [str(key) for key in value], [(str(key), part) for key, part in value.items()]
    if isinstance(value, Vocabulary):
        return f"{_class_name(value)} {value.fingerprint[:16]}", []
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
        return _class_name(value), [(name, getattr(value, name)) for name in fields]
    if isinstance(value, functools.partial):
        parts = [(str(i), each) for i, each in enumerate(value.args)]
        parts += sorted(value.keywords.items())
        marker, inner = _opened(value.func)
        return _called(marker, parts), [*inner, *parts]
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)} {_digest(array.tobytes())}", []
    if callable(value) and hasattr(value, "__qualname__"):
        return _function_name(value), list(_closure(value))
    if isinstance(value, enum.Enum | os.PathLike | np.dtype | bytes) or not hasattr(
        value, "__dict__"
    ):
        return f"{_class_name(value)} {value}", []
    parts = sorted((name, part) for name, part in vars(value).items() if name[0] != "_")
    return _called(_class_name(value), parts), parts


def _called(name: Setting, parts: Sequence[tuple[str, Any]]) -> str:
    return f"{name}({', '.join(part for part, _ in parts)})"


def _class_name(value: Any) -> str:
    kind = type(value)
    if kind.__module__.split(".")[0] == "robust_ft":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _function_name(function: Callable[..., Any]) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if "<lambda>" in name and code is not None:  # all lambdas of a function have one name
        name += f" {_digest(repr((code.co_code, code.co_names, code.co_consts)).encode())}"
    return name


def _closure(function: Any) -> Iterator[tuple[str, Any]]:
    """Yields the variables of outer functions that a function reads."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        if cell.cell_contents is not function:
            yield name, cell.cell_contents


def _defaults(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return {}
    defaults = {}
    for field in dataclasses.fields(value):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, TypeError):  # arrays
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def digest(*parts: Any) -> str:
    """Returns a hash, 16 hexadecimal digits, of what JSON can hold."""
    return _digest(json.dumps(parts, sort_keys=True).encode())
