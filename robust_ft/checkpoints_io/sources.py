"""Opens any path: the entry point to all formats that can be read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_ft import assets, bucket_copies, buckets
from robust_ft.checkpoints_io import (
    added_tokens,
    hf,
    native,
    orbax_params,
    peft,
    safetensors_files,
    stage_record,
    t5x,
)
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.names import misfit
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.errors import UserError, nearest
from robust_ft.files import as_path
from robust_ft.models.model import Model
from robust_ft.models.peft import prompt_values
from robust_ft.vocabulary import Vocabulary, vocabulary_from_directory

# Prompt tuning saves a soft prompt as a bare array.
PROMPT = "encoder/prompt"
FORMATS = ("hf", "t5x", "robust_ft")
# {name of a token id in `Model`: its name in `Checkpoint.token_ids`}
IDS = {
    "pad_id": "pad",
    "eos_id": "eos",
    "start_id": "start",
    "separator_id": "separator",
    "stop_ids": "stop",
}


def read(
    path: str, file_format: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Opens a whole model: a directory of Hugging Face's, t5x's or our own.

    Args:
        path: The directory, or a model's name on the Hugging Face hub.
        file_format: One of FORMATS; detected from the directory's files if not given.
        overrides: Fields of the config, or token ids, that replace the directory's.

    Raises:
        UserError: Nothing is there, or it is broken; the message names file and tensor.
    """
    path = existing(path) if buckets.is_bucket(path) else assets.resolve(path)
    file_format = file_format or detect(path)
    overrides = overrides or {}
    if file_format == "t5x":
        ids = {name: value for name, value in overrides.items() if name in IDS}
        sizes = {name: value for name, value in overrides.items() if name not in IDS}
        return overridden(t5x.read(path, sizes), ids)
    checkpoint = hf.read(path) if file_format == "hf" else native.read(path)
    return overridden(checkpoint, overrides)


def vocabulary(checkpoint: Checkpoint, advice: str) -> Vocabulary:
    """Returns a checkpoint's vocabulary: the one that it carries, or that of its directory.

    Args:
        checkpoint: The checkpoint.
        advice: What to do where there is none, for the error.

    Raises:
        UserError: There is none, as in t5x's checkpoints, or it is broken.
    """
    carried = native.vocabulary(checkpoint)
    if carried is not None:
        return carried
    try:
        return vocabulary_from_directory(checkpoint.source)
    except UserError as error:
        raise UserError(f"{error} {advice}") from None


def detect(path: str) -> str:
    """Returns which of FORMATS a directory is in; "hf" for a path that may be a name on the hub."""
    folder = _path(path)
    if native.is_directory(folder):
        return "robust_ft"
    if hf.is_directory(folder) or not folder.exists():
        return "hf"
    if t5x.is_directory(folder):
        return "t5x"
    _check_no_run(folder, path)
    raise UserError(
        f"'{path}' is no model directory: it has neither {hf.CONFIG} (Hugging Face), "
        f"{native.SETTINGS} (robust_ft) nor {t5x.INDEX} (t5x)."
    )


def weights(path: str) -> dict[str, Tensor]:
    """Returns the parameters in any kind of checkpoint, as {our path: tensor}.

    Args:
        path: A directory or name that `read` opens, a stage's `checkpoint_<step>`, a
            `.safetensors` file with our paths, an adapter's directory, or a soft prompt in a `.npy`
            file. `asset:` paths are resolved. Several, separated by commas, are merged (a model and
            its prompt); the later one wins.

    Raises:
        UserError: Nothing is there, or it is broken.
    """
    if len(paths := split(path)) > 1:
        return {name: tensor for each in paths for name, tensor in weights(each).items()}
    file = _path(path)
    if not file.exists() and (not hf.is_name(path) or file.suffix in (".npy", ".safetensors")):
        siblings = [str(sibling) for sibling in file.parent.glob("*")]
        raise UserError(f"There is no checkpoint at '{path}'." + nearest(str(file), siblings))
    file = _path(existing(path))
    if file.suffix == ".safetensors":
        return safetensors_files.read(file)
    if file.suffix == ".npy":
        return {PROMPT: Tensor.of(prompt_values.read(str(file)), f"'{file}'")}
    if orbax_params.is_directory(file):
        return orbax_params.read(file)
    if peft.is_directory(file):
        return dict(peft.read(str(file)).tensors)
    if native.is_directory(file):
        return native.read_weights(file)
    if hf.is_directory(file):
        return dict(hf.read(str(file), vocabulary=False).tensors)
    if t5x.is_directory(file):
        return t5x.read_weights(file)
    _check_no_run(file, path)
    raise UserError(
        f"'{path}' is no checkpoint: neither a .safetensors or .npy file, nor a directory with "
        f"{hf.CONFIG} (Hugging Face), {native.SETTINGS} (robust_ft), {t5x.INDEX} (t5x), "
        f"{peft.CONFIG} (PEFT) or params (checkpoint_<step> of a run)."
    )


def _check_no_run(folder: Path, path: str) -> None:
    if stage_record.is_run(folder):
        raise UserError(
            f"'{path}' is a run: robust_ft.load('{path}') loads what it ended with, and python -m "
            f"robust_ft.convert --input={path} --output=DIR makes a model directory of it."
        )


def existing(path: str) -> str:
    """Returns the path of what is there, downloaded if it is a name on the Hugging Face hub.

    Raises:
        UserError: Nothing is there.
    """
    path = assets.resolve(path)
    file = _path(path)
    if buckets.is_bucket(path):
        return str(file)
    if file.exists():
        return path
    try:
        return str(hf.find(path))
    except UserError as error:
        names = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"{error}{nearest(file.name, names)}") from None


def _path(path: str) -> Path:
    """Returns where to read what is at a path.

    Runs and their checkpoints are read from buckets as they are, other models are copied.
    """
    file = as_path(assets.resolve(path)).expanduser()
    if buckets.is_bucket(file):
        if stage_record.is_run(file) or orbax_params.is_directory(file):
            return file
        return bucket_copies.local(file)
    return file


def split(path: str) -> list[str]:
    """Returns the paths in a comma-separated list."""
    if "," in path and not Path(path).exists():
        return [each.strip() for each in path.split(",")]
    return [path]


def adapter(path: str) -> Adapter | None:
    """Returns the adapter at a path, None if there is no adapter."""
    folder = _path(path)
    return peft.read(str(folder)) if peft.is_directory(folder) else None


def addition(path: str) -> Adapter:
    """Returns what is laid over a model: an adapter, or the parameters of any other checkpoint.

    Those of a stage's `checkpoint_<step>` come with the tokens that the stage records.
    """
    opened = adapter(path)
    return opened or Adapter(path, (), weights(path), tokens=tokens(path))


def tokens(path: str) -> Tokens | None:
    """Returns what an adapter or a stage's checkpoint was trained with, None if that is unknown."""
    opened = adapter(path)
    if opened is not None:
        return opened.tokens
    record = stage_record.of_checkpoint(_path(path))
    return None if record is None else record.tokens


def is_addition(path: str) -> bool:
    """Returns whether a path holds nothing but parameters of PEFT methods."""
    opened = adapter(path)
    return path.endswith(".npy") or (opened is not None and not opened.changed)


def overlaid(base: Checkpoint, changed: Mapping[str, Tensor], source: str) -> Checkpoint:
    """Returns `base` with some of its parameters replaced.

    Args:
        base: A complete model.
        changed: Parameters of the same model, such as those that a stage has trained.
        source: Where these come from.

    Raises:
        UserError: The model lacks one of them, or has it with another shape.
    """
    if unplaced := sorted(changed.keys() - base.tensors.keys()):
        raise UserError(misfit(source, unplaced, ()))
    for path, tensor in changed.items():
        if tensor.shape != base.tensors[path].shape:
            raise UserError(
                f"{tensor.where} has shape {tensor.shape}, in '{base.source}' it has "
                f"{base.tensors[path].shape}."
            )
    return dataclasses.replace(base, source=source, tensors=dict(base.tensors) | dict(changed))


def overridden(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint with fields of its config, or token ids, replaced.

    A larger `vocab_size` adds tokens: see `added_tokens`. Token ids are named as in `Model`
    (`pad_id`, `separator_id`, ...); None removes a separator.

    Raises:
        UserError: There is no such field, or the tensors do not fit the new config.
    """
    if not fields:
        return checkpoint
    config: Any = checkpoint.config
    known = {field.name for field in dataclasses.fields(config)}
    for name in fields:
        if name not in known and name not in IDS:
            raise UserError(
                f"{type(config).__name__} has no field '{name}', and there is no such token id."
                + nearest(name, known | IDS.keys())
            )
    config = dataclasses.replace(config, **{n: v for n, v in fields.items() if n in known})
    ids = {n: v for n, v in fields.items() if n in IDS}
    model, source = Model(config), checkpoint.source
    tensors = added_tokens.extended_tensors(model, checkpoint.tensors, source)
    native.check(source, config, tensors)
    replaced = dataclasses.replace(checkpoint, config=config, tensors=tensors)
    return _with_ids(replaced, ids) if ids else replaced


def _with_ids(checkpoint: Checkpoint, ids: Mapping[str, Any]) -> Checkpoint:
    token_ids, size = dict(checkpoint.token_ids), checkpoint.config.vocab_size
    for name, value in ids.items():
        listed = value if isinstance(value, list | tuple) else [value]
        if value is None and name == "separator_id":
            listed = []
        if isinstance(value, list | tuple) != (name == "stop_ids") or not all(
            type(token) is int and 0 <= token < size for token in listed
        ):
            kind = "a list of tokens" if name == "stop_ids" else "a token"
            raise UserError(f"{name}={value} is not {kind} of 0 to {size - 1}, the vocabulary's.")
        token_ids[IDS[name]] = list(value) if name == "stop_ids" else value
    # Decoding stops at the end-of-sequence token anyway.
    stop = [token for token in token_ids.get("stop", ()) if token != token_ids.get("eos")]
    token_ids["stop"] = stop
    known = {name: value for name, value in token_ids.items() if value not in (None, [])}
    changed = dataclasses.replace(checkpoint, token_ids=known)
    native.model(changed)  # which checks that a separator has a place
    return changed
