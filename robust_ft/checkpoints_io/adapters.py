"""Adapters: what finetuning adds to a base model, and parameters of the base that it changed.

Our directories hold the parameters in `adapter.safetensors` under our paths, the methods' settings,
the token ids and the base's fingerprint in `robust_ft_adapter.json`, and soft prompts again as bare
arrays.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from robust_ft.checkpoints_io import safetensors_files
from robust_ft.checkpoints_io.names import misfit
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json_object, write_json
from robust_ft.fingerprint import fingerprint
from robust_ft.models import peft
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft, Prompt
from robust_ft.trainable import flatten

SETTINGS, WEIGHTS = "robust_ft_adapter.json", "adapter.safetensors"
VERSION = 3
METHODS = {method.__name__: method for method in peft.METHODS.values()}
# Settings that select layers; they need not agree, as the parameters' paths tell the layers, too.
_PATTERNS = ("target", "outputs", "inputs", "sites")


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Attributes:
        fingerprint: Of all parameters that belong to no PEFT method, before training.
        restored_from: Where they came from, for errors.
    """

    fingerprint: str
    restored_from: str


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What finetuning added to a base model, or changed in it.

    Attributes:
        source: What to call it in errors.
        methods: PEFT methods with their settings, as `Peft.exported` gives them.
        tensors: {parameter path: tensor}, all parameters of the methods, and those of the base
            that were trained.
        base: The base, None if it is not known.
        tokens: The token ids and the vocabulary that it was trained with, None if not known.
        peft_config: PEFT's own adapter_config.json if it was read from one, else empty.
    """

    source: str
    methods: tuple[Peft, ...]
    tensors: Mapping[str, Tensor]
    base: Base | None = None
    tokens: Tokens | None = None
    peft_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """Paths of the base's own parameters that it replaces."""
        return [p for p in self.tensors if not any(method.owns(p) for method in self.methods)]

    def only(self, *methods: Peft) -> "Adapter":
        """Returns some of its methods, without what it changed in the base."""
        tensors = {p: t for p, t in self.tensors.items() if any(m.owns(p) for m in methods)}
        return dataclasses.replace(self, methods=methods, tensors=tensors)

    @property
    def kinds(self) -> str:
        """Its kind in words, such as "Lora and Prompt"."""
        kinds = [type(method).__name__ for method in self.methods]
        if self.changed:
            kinds.append("changed parameters of the base")
        return " and ".join(kinds)


def is_directory(path: Path) -> bool:
    """Returns whether a directory is one of ours."""
    return (path / SETTINGS).is_file()


def read(folder: Path) -> Adapter:
    """Opens one of our directories; tensors are read when they are needed.

    Raises:
        UserError: A file is missing or broken, or names an unknown method or setting.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"'{folder}' lacks {WEIGHTS}.")
    tensors = safetensors_files.read(folder / WEIGHTS)
    settings = read_json_object(folder / SETTINGS, default={})
    try:
        if (version := int(settings["version"])) > VERSION:
            raise UserError(f"'{folder / SETTINGS}' was written by a newer robust_ft.")
        # Version 1 had one method, and did not record its base; version 2 recorded no tokens.
        entries = [settings] if version == 1 else settings["methods"]
        kinds = [(entry["method"], dict(entry["settings"])) for entry in entries]
        base = Base(**settings["base"]) if settings.get("base") else None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{folder / SETTINGS}' lacks version, methods or settings.") from None
    methods = tuple(method(kind, fields, folder / SETTINGS) for kind, fields in kinds)
    tokens = Tokens.read(settings.get("tokens"), folder / SETTINGS)
    return Adapter(str(folder), methods, tensors, base, tokens, settings.get("peft", {}))


def write(adapter: Adapter, folder: Path) -> None:
    """Writes our files of an adapter into a directory.

    A soft prompt is also written as `<name>.npy` [length, embed], the format of prompt tuning's own
    code; those of several tasks as `<name>-<task>.npy`.
    """
    settings = {
        "version": VERSION,
        "methods": described(adapter.methods),
        "base": dataclasses.asdict(adapter.base) if adapter.base else None,
        "tokens": dataclasses.asdict(adapter.tokens) if adapter.tokens else None,
        "peft": dict(adapter.peft_config),
    }
    write_json(folder / SETTINGS, settings)
    safetensors_files.write(folder / WEIGHTS, adapter.tensors)
    for each in adapter.methods:
        if isinstance(each, Prompt):
            (tensor,) = (t for path, t in adapter.tensors.items() if each.owns(path))
            prompts = tensor.load().astype(np.float32)
            if not each.tasks:
                np.save(folder / f"{each.name}.npy", prompts)
            for task, prompt in zip(each.tasks, prompts, strict=False):
                np.save(folder / f"{each.name}-{quote(task, safe='')}.npy", prompt)


def described(methods: Iterable[Peft]) -> list[dict[str, Any]]:
    """Returns methods as JSON has them; `method` reads one of them."""
    return [{"method": type(each).__name__, "settings": _settings(each)} for each in methods]


def method(kind: Any, fields: Mapping[str, Any], place: object) -> Any:
    """Returns a PEFT method.

    Args:
        kind: The name of its class.
        fields: Its settings, as JSON has them.
        place: The file, for errors.

    Raises:
        UserError: There is no such method, or a setting is not one of its own.
    """
    if kind not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"'{place}' has the method {kind!r}; known are {known}." + nearest(str(kind), METHODS)
        )
    method_class: Any = METHODS[kind]
    known_fields = {field.name for field in dataclasses.fields(method_class)}
    for name in fields:
        if name not in known_fields:
            raise UserError(
                f"'{place}': {kind} has no setting '{name}'." + nearest(name, known_fields)
            )
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return method_class(**hashable)


def _settings(method: Peft) -> dict[str, Any]:
    """Returns a method's settings without those that are unset by default."""
    return {
        field.name: value
        for field in dataclasses.fields(method)
        if (value := getattr(method, field.name)) != field.default or value not in (None, "", ())
    }


def check(adapter: Adapter, base: Checkpoint) -> None:
    """Raises a UserError unless the tensors are exactly those that the methods add to this base."""
    model = Model(base.config, adapter.methods)
    shapes = flatten(model.shapes())
    tensors = adapter.tensors
    for path in sorted(shapes.keys() & tensors.keys()):
        if tensors[path].shape != shapes[path].shape:
            raise UserError(
                f"{tensors[path].where} belongs to another base: '{path}' has shape "
                f"{tensors[path].shape}, with '{base.source}' it would have {shapes[path].shape}."
            )
    unplaced = tensors.keys() - shapes.keys()
    missing = {path for path in shapes if model.peft_owns(path)} - tensors.keys()
    if unplaced or missing:
        raise UserError(misfit(adapter.source, sorted(unplaced), sorted(missing)))


def check_base(adapter: Adapter, leaves: Iterable[tuple[str, Any]], base: str) -> None:
    """Raises a UserError if the adapter records that it was trained on another base.

    Args:
        adapter: The adapter.
        leaves: (path, array) of the base, without those of PEFT methods.
        base: What to call the base in errors.
    """
    if adapter.base is not None and fingerprint(leaves) != adapter.base.fingerprint:
        raise UserError(
            f"'{adapter.source}' belongs to another base: it was trained on "
            f"'{adapter.base.restored_from}', and the parameters of '{base}' are not the same."
        )


def check_methods(adapter: Adapter, methods: Sequence[Peft]) -> None:
    """Raises a UserError unless a model has an adapter's methods with the same settings.

    Args:
        adapter: The adapter.
        methods: The model's methods.
    """
    own = {each.name: each.exported() for each in methods}
    for each in adapter.methods:
        kind = type(each).__name__
        if each.name not in own:
            raise UserError(
                f"'{adapter.source}' holds a {kind} named '{each.name}', which the model does not "
                f"have; its methods are {', '.join(own) or 'none'}."
            )
        if type(own[each.name]) is not type(each):
            raise UserError(
                f"'{adapter.source}' holds a {kind} named '{each.name}', which is a "
                f"{type(own[each.name]).__name__} in the model."
            )
        trained, current = each.exported(), own[each.name]
        for field in dataclasses.fields(trained):
            before, now = (getattr(settings, field.name) for settings in (trained, current))
            if field.name not in _PATTERNS and before != now:
                raise UserError(
                    f"'{adapter.source}' was trained with {kind}.{field.name}={before!r}, the "
                    f"model has {now!r}."
                )
