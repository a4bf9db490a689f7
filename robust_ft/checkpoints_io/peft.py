"""Adapters in PEFT's directories and in our own: what a PEFT method trained, without its base.

PEFT's hold `adapter_config.json` and `adapter_model.safetensors`, ours the same parameters under
our paths in `adapter.safetensors` and the method's settings in `robust_ft_adapter.json`.
`peft_methods` knows what each method's files look like.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robust_ft.checkpoints_io import peft_methods, safetensors_files
from robust_ft.checkpoints_io.names import misfit
from robust_ft.checkpoints_io.peft_methods import Adapter
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor, settings_file
from robust_ft.errors import UserError, nearest
from robust_ft.models.model import Model
from robust_ft.models.peft import Lora
from robust_ft.trainable import flatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS, OUR_WEIGHTS = "robust_ft_adapter.json", "adapter.safetensors"
VERSION = 1


def is_directory(path: Path) -> bool:
    """Returns whether a directory holds an adapter, PEFT's or ours."""
    return (path / CONFIG).is_file() or (path / SETTINGS).is_file()


def read(source: str) -> Adapter:
    """Opens an adapter's directory; tensors are read when they are needed.

    Raises:
        UserError: It is none, its method is not known, a file is missing or broken, or the tensors
            are not those that its settings ask for.
    """
    folder = Path(source).expanduser()
    if not is_directory(folder):
        raise UserError(
            f"'{source}' is no adapter: it has neither {CONFIG} (PEFT) nor {SETTINGS} (robust_ft)."
        )
    ours = (folder / SETTINGS).is_file()
    file = folder / (OUR_WEIGHTS if ours else WEIGHTS)
    if not file.is_file():
        raise UserError(f"'{folder}' lacks {file.name}.")
    settings = settings_file(folder / (SETTINGS if ours else CONFIG))
    tensors = safetensors_files.read(file)
    if not ours:
        return peft_methods.from_peft(str(folder), settings, tensors)
    try:
        kind, fields, version = settings["method"], settings["settings"], settings["version"]
        fields = dict(fields)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"'{folder / SETTINGS}' lacks version, method or settings.") from None
    if version > VERSION:
        raise UserError(f"'{folder / SETTINGS}' was written by a newer robust_ft.")
    method = _method(kind, fields, folder / SETTINGS)
    return Adapter(str(folder), method, tensors, settings.get("peft", {}))


def of_weights(
    source: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None
) -> Adapter:
    """Returns the adapter that parameters, such as a stage's, are.

    Args:
        source: Where they come from.
        tensors: Parameters under our paths, of one method.
        fields: Settings that parameters do not tell, such as LoRA's alpha.

    Raises:
        UserError: They are no adapter's, or a setting is needed, or unknown.
    """
    kind, found = peft_methods.recognized(source, tensors)
    given = dict(fields or {})
    if kind is Lora and "alpha" not in given:
        raise UserError(
            f"'{source}' does not say which alpha its LoRA has; give --config=alpha=NUMBER, the "
            "Lora.alpha that it was trained with."
        )
    return Adapter(source, _method(kind.__name__, found | given, source), tensors)


def write(adapter: Adapter, base: Checkpoint, folder: Path) -> None:
    """Writes PEFT's files of an adapter into a directory.

    Raises:
        UserError: It is no adapter of this base, or PEFT cannot express it.
    """
    check(adapter, base)
    config, tensors = peft_methods.to_peft(adapter, base)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    safetensors_files.write(folder / WEIGHTS, tensors, {"format": "pt"})


def write_ours(adapter: Adapter, folder: Path) -> None:
    """Writes our own files of an adapter into a directory."""
    settings = {
        "version": VERSION,
        "method": type(adapter.method).__name__,
        "settings": dataclasses.asdict(adapter.method),
        "peft": dict(adapter.peft_config),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
    safetensors_files.write(folder / OUR_WEIGHTS, adapter.tensors)


def check(adapter: Adapter, base: Checkpoint) -> None:
    """Raises a UserError unless the tensors are those that the method adds to this base."""
    model = Model(base.config, (adapter.method,))
    shapes = {path: leaf for path, leaf in flatten(model.shapes()).items() if model.peft_owns(path)}
    tensors = adapter.tensors
    for path in sorted(shapes.keys() & tensors.keys()):
        if tensors[path].shape != shapes[path].shape:
            raise UserError(
                f"{tensors[path].where} belongs to another base: '{path}' has shape "
                f"{tensors[path].shape}, with '{base.source}' it would have {shapes[path].shape}."
            )
    unplaced, missing = tensors.keys() - shapes.keys(), shapes.keys() - tensors.keys()
    if unplaced or missing:
        raise UserError(misfit(adapter.source, sorted(unplaced), sorted(missing)))


def merged(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """Returns the base with a LoRA in its kernels, each computed when it is read.

    Raises:
        UserError: It is no adapter of this base, or no LoRA: prompts and prefixes are no weights.
    """
    check(adapter, base)
    method = adapter.method
    if not isinstance(method, Lora):
        raise UserError(
            f"'{adapter.source}' is a {type(method).__name__}, which cannot be merged into a "
            "model's weights; write it with --to=peft or --to=robust_ft."
        )
    tensors = dict(base.tensors)
    for path, a in adapter.tensors.items():
        if path.endswith(ending := f"/{method.name}/a"):
            layer = path.removesuffix(ending)
            b = adapter.tensors[f"{layer}/{method.name}/b"]
            tensors[f"{layer}/kernel"] = _merged(method, tensors[f"{layer}/kernel"], a, b)
    return dataclasses.replace(base, source=adapter.source, tensors=tensors)


def _merged(method: Lora, kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def load() -> np.ndarray:
        return method.merged_kernel(kernel.load(), a.load(), b.load())

    return dataclasses.replace(kernel, read=load)


def _method(kind: Any, fields: Mapping[str, Any], place: object) -> Any:
    if kind not in peft_methods.METHODS:
        known = ", ".join(peft_methods.METHODS)
        raise UserError(f"'{place}' has the method {kind!r}; known are {known}.")
    method: Any = peft_methods.METHODS[kind]
    known_fields = {field.name for field in dataclasses.fields(method)}
    for name in fields:
        if name not in known_fields:
            raise UserError(
                f"'{place}': {kind} has no setting '{name}'." + nearest(name, known_fields)
            )
    return method(**fields)
