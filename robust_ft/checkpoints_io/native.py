"""Our own model directories: weights under our paths, robust_ft.json and vocabulary files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import robust_ft.vocabulary
from robust_ft.checkpoints_io import families, safetensors_files
from robust_ft.checkpoints_io.names import misfit, parameter_shapes
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json_object, write_json
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.vocabulary import Vocabulary

SETTINGS = "robust_ft.json"
INDEX = "model.safetensors.index.json"
VERSION = 1


def is_directory(path: Path) -> bool:
    """Returns whether a directory is one of ours."""
    return (path / SETTINGS).is_file()


def read(source: str) -> Checkpoint:
    """Opens a directory; tensors are read when they are needed.

    Raises:
        UserError: It is not ours, a file is missing or broken, or weights and config do not match.
    """
    folder = Path(source).expanduser()
    if not is_directory(folder):
        raise UserError(f"'{source}' is no model directory of robust_ft: it has no {SETTINGS}.")
    settings = read_json_object(folder / SETTINGS, default={})
    try:
        if settings["version"] > VERSION:
            raise UserError(f"'{folder / SETTINGS}' was written by a newer robust_ft.")
        name, fields, files = settings["family"], settings["config"], settings["files"]
    except (KeyError, TypeError):
        raise UserError(f"'{folder / SETTINGS}' lacks version, family, config or files.") from None
    config = read_config(families.get(name).CONFIG, fields, folder / SETTINGS)
    if lost := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"'{folder}' lacks {', '.join(lost)}, which its {SETTINGS} names.")
    tensors = read_weights(folder)
    check(source, config, tensors)
    return Checkpoint(
        source,
        name,
        config,
        tensors,
        settings.get("token_ids", {}),
        settings.get("vocabulary"),
        tuple(folder / file for file in files),
        settings.get("hugging_face", {}),
    )


def write(
    checkpoint: Checkpoint, folder: Path, shard_bytes: int = safetensors_files.SHARD_BYTES
) -> None:
    """Writes weights, settings and vocabulary files into a directory."""
    config: Any = checkpoint.config
    settings = {
        "version": VERSION,
        "family": checkpoint.family,
        "config": dataclasses.asdict(config),
        "token_ids": dict(checkpoint.token_ids),
        "vocabulary": checkpoint.vocabulary,
        "files": [file.name for file in checkpoint.files],
        "hugging_face": dict(checkpoint.hugging_face),
    }
    write_json(folder / SETTINGS, settings)
    safetensors_files.write_sharded(folder, checkpoint.tensors, None, shard_bytes)
    for file in checkpoint.files:
        (folder / file.name).write_bytes(file.read_bytes())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory under our paths.

    Raises:
        UserError: There are none, or a file is missing or broken.
    """
    if (folder / safetensors_files.WEIGHTS).is_file():
        return safetensors_files.read(folder / safetensors_files.WEIGHTS)
    if (folder / INDEX).is_file():
        return safetensors_files.read_sharded(folder / INDEX)
    raise UserError(f"'{folder}' has neither {safetensors_files.WEIGHTS} nor {INDEX}.")


def check(source: str, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises a UserError unless these are exactly the parameters of the config's model."""
    shapes = parameter_shapes(config)
    unplaced, missing = tensors.keys() - shapes.keys(), shapes.keys() - tensors.keys()
    if unplaced or missing:
        raise UserError(misfit(source, sorted(unplaced), sorted(missing)))
    for path, tensor in tensors.items():
        if tensor.shape != shapes[path].shape:
            raise UserError(
                f"{tensor.where} has shape {tensor.shape}, the config asks for "
                f"{shapes[path].shape}."
            )


def model(checkpoint: Checkpoint) -> Model:
    """Returns a checkpoint's model, with its token ids."""
    return with_ids(checkpoint.config, checkpoint.token_ids)


def with_ids(config: ModelConfig, token_ids: Mapping[str, Any]) -> Model:
    """Returns the model of a config with these `Checkpoint.token_ids`."""
    ids: Any = dict(token_ids)
    stop_ids = tuple(ids.pop("stop", ()))
    named = {f"{name}_id": value for name, value in ids.items()}
    return Model(config, stop_ids=stop_ids, **named)


def token_ids(model: Model) -> dict[str, Any]:
    """Returns a model's ids, as in `Checkpoint.token_ids`."""
    ids: dict[str, Any] = {"pad": model.pad_id, "eos": model.eos_id, "start": model.start_id}
    if model.separator_id is not None:
        ids["separator"] = model.separator_id
    if model.stop_ids:
        ids["stop"] = list(model.stop_ids)
    return ids


def vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """Returns a checkpoint's vocabulary, None if it carries none.

    Raises:
        UserError: Its kind is not known.
    """
    if checkpoint.vocabulary is None:
        return None
    fields = dict(checkpoint.vocabulary)
    kind = fields.pop("kind", None)
    known: dict[str, Any] = {
        name: value
        for name, value in vars(robust_ft.vocabulary).items()
        if dataclasses.is_dataclass(value) and name.endswith("Vocabulary")
    }
    if kind not in known:
        raise UserError(
            f"'{checkpoint.source}' has a vocabulary of kind {kind!r}; known are "
            f"{', '.join(sorted(known))}." + nearest(str(kind), known)
        )
    paths = {file.name: str(file) for file in checkpoint.files}
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
        elif name.endswith("path") and value is not None:
            fields[name] = paths.get(value, value)
    try:
        vocabulary: Vocabulary = known[kind](**fields)
    except TypeError as error:
        raise UserError(f"The vocabulary of '{checkpoint.source}': {error}.") from None
    return vocabulary


def read_config(config_class: Any, fields: Mapping[str, Any], file: Path) -> ModelConfig:
    """Returns a config from its fields, as a JSON file has them.

    Raises:
        UserError: There is no such field.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    # Earlier versions told padding by an id.
    fields = {name: value for name, value in fields.items() if name != "pad_id"}
    for name in fields:
        if name not in known:
            raise UserError(
                f"'{file}' sets {config_class.__name__}.{name}, which does not exist."
                + nearest(name, known)
            )
    # JSON has no tuples, and a config must be hashable.
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    config: ModelConfig = config_class(**hashable)
    return config
