"""Hugging Face model directories, read and written tensor by tensor."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from robust_ft.checkpoints_io import families, hf_settings, safetensors_files
from robust_ft.checkpoints_io.names import expand, resolve, with_prefix
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.files import read_json_object, write_json
from robust_ft.vocabulary import (
    Vocabulary,
    vocabulary_files,
    vocabulary_from_directory,
    vocabulary_settings,
)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Files beside the weights that are copied into every output.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    hf_settings.GENERATION,
    "chat_template.jinja",
)


def is_directory(path: Path) -> bool:
    """Returns whether a directory looks like Hugging Face's."""
    return (path / CONFIG).is_file()


def read(source: str, vocabulary: bool = True) -> Checkpoint:
    """Opens a directory, or a name on the hub; tensors are read when they are needed.

    Args:
        source: The directory or the name.
        vocabulary: Whether to read its vocabulary, too.

    Raises:
        UserError: It is no such directory, its architecture is not known, a file is missing or
            broken, or tensors and model do not fit; the message names file and tensor.
    """
    folder = find(source)
    if not is_directory(folder):
        raise UserError(f"'{source}' is no Hugging Face model directory: it has no {CONFIG}.")
    settings = read_json_object(folder / CONFIG, default={})
    name = families.of_model_type(settings.get("model_type"), str(folder / CONFIG))
    family = families.get(name)
    tensors, stripped = with_prefix(read_weights(folder), family.NAMES, family.REDUNDANT)
    try:
        config = family.config_from_hf(settings, tensors)
    except UserError as error:
        raise UserError(f"'{folder}': {error}") from None
    tied = families.optional(name, "tied")
    resolved = resolve(
        family.NAMES,
        config,
        tensors,
        source,
        family.REDUNDANT,
        tied(settings) if tied else None,
    )
    tokenizer = _vocabulary(folder) if vocabulary else None
    ids = hf_settings.token_ids(name, settings, folder, tokenizer, config)
    return Checkpoint(
        source,
        name,
        config,
        resolved.tensors,
        ids,
        vocabulary_settings(tokenizer)[0] if tokenizer else None,
        _companions(folder),
        {"config": settings, "token_ids": ids, "stripped": stripped} | resolved.notes(),
    )


def write(
    checkpoint: Checkpoint, folder: Path, shard_bytes: int = safetensors_files.SHARD_BYTES
) -> None:
    """Writes config.json, the weights and the files that lie beside them into a directory.

    A checkpoint that came from Hugging Face gets its own config.json and names back; what has
    changed since is all that changes in them.
    """
    tensors = _named(checkpoint)
    write_json(folder / CONFIG, hf_settings.config(checkpoint, tensors))
    safetensors_files.write_sharded(folder, tensors, {"format": "pt"}, shard_bytes)
    for file in checkpoint.files:
        (folder / file.name).write_bytes(file.read_bytes())
    hf_settings.edit_generation_config(checkpoint, folder)
    hf_settings.warn_of_a_separator(checkpoint)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory under the names that its files give them.

    Raises:
        UserError: There are no weights, a shard is missing, or a file is broken.
    """
    if (folder / safetensors_files.WEIGHTS).is_file():
        return safetensors_files.read(folder / safetensors_files.WEIGHTS)
    if (folder / INDEX).is_file():
        return safetensors_files.read_sharded(folder / INDEX)
    if (folder / TORCH).is_file():
        return _read_torch(folder / TORCH)
    if (folder / TORCH_INDEX).is_file():
        where = safetensors_files.weight_map(folder / TORCH_INDEX)
        safetensors_files.check_shards(folder / TORCH_INDEX, where)
        shards = [_read_torch(folder / file) for file in sorted(set(where.values()))]
        tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
        if lost := sorted(where.keys() - tensors.keys()):
            raise UserError(f"The shards of '{folder / TORCH_INDEX}' lack {', '.join(lost)}.")
        return tensors
    stray = sorted(file.name for file in folder.glob("*-of-*.safetensors"))
    reason = f"it has {len(stray)} shards but no {INDEX}" if stray else "no weights are in it"
    raise UserError(
        f"'{folder}' cannot be read: {reason}; looked for {safetensors_files.WEIGHTS}, {INDEX}, "
        f"{TORCH} and {TORCH_INDEX}."
    )


def is_name(source: str) -> bool:
    """Returns whether a path may be a model's name on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None


def find(source: str) -> Path:
    """Returns a local directory as it is, and downloads a name of the hub ("google/mt5-small").

    Raises:
        UserError: There is no such directory, and it is no name, or cannot be downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not is_name(source):
        raise UserError(f"There is no directory '{source}'.")
    # Imported here, as only names on the hub need it.
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [CONFIG, INDEX, TORCH_INDEX, *COMPANIONS]
    try:
        local = Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=[*patterns, "model*.safetensors"]
            )
        )
        if not any(local.glob("model*.safetensors")):
            huggingface_hub.snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
        return local
    except errors.RepositoryNotFoundError:
        reason = "the Hugging Face hub has no such model, or it is not public"
    except (OSError, ValueError, errors.HfHubHTTPError, RuntimeError) as error:
        reason = f"the Hugging Face hub cannot be reached ({type(error).__name__})"
    except Exception as error:  # the HTTP library's own errors, which it may replace
        reason = f"the Hugging Face hub cannot be reached ({type(error).__name__})"
    raise UserError(f"There is no directory '{source}', and {reason}.")


def _named(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns the tensors under Hugging Face's names, with the copies that a source had."""
    notes = checkpoint.hugging_face
    stand_ins = notes.get("stand_ins", {})
    named: dict[str, Tensor] = {}
    repeated: dict[str, Tensor] = {}  # names that the source left out, for a tensor that it has
    for path, (theirs, transpose) in expand(
        families.get(checkpoint.family).NAMES, checkpoint.config
    ).items():
        tensor = checkpoint.tensors[path]
        target = repeated if theirs in stand_ins else named
        target[theirs] = tensor.transposed() if transpose else tensor
    for theirs, tensor in repeated.items():
        name = stand_ins[theirs]
        if name not in named:
            named[name] = tensor
        elif named[name].digest() != tensor.digest():
            named[theirs] = tensor  # trained since, so no longer equal
    for copy, original in notes.get("duplicates", {}).items():
        if original in named:
            named.setdefault(copy, named[original])
    stripped = notes.get("stripped", "")
    return {name.removeprefix(stripped): tensor for name, tensor in named.items()}


def _vocabulary(folder: Path) -> Vocabulary | None:
    """Returns the vocabulary, None if there is none: weights can be converted without one."""
    try:
        return vocabulary_from_directory(folder)
    except UserError as error:
        logging.warning("The model is converted without a vocabulary: %s", error)
        return None


def _companions(folder: Path) -> tuple[Path, ...]:
    names = sorted({*vocabulary_files(folder), *COMPANIONS})
    return tuple(folder / name for name in names if (folder / name).is_file())


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"'{file}' can only be read with PyTorch, which is not installed; install it, or "
            "convert the model to safetensors where it is."
        ) from None
    try:
        # Memory-mapped, so that tensors are read when they are needed. Never unpickles objects.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"'{file}' is no readable file of PyTorch weights: {str(error).splitlines()[0]}"
        ) from None
    return {name: _torch_tensor(file, name, value) for name, value in state.items()}


def _torch_tensor(file: Path, name: str, value: Any) -> Tensor:
    import torch

    def load() -> np.ndarray:
        if value.dtype == torch.bfloat16:  # PyTorch hands NumPy only types that NumPy has
            bits: np.ndarray = value.contiguous().view(torch.int16).numpy()
            return bits.view(dtype)
        array: np.ndarray = value.numpy()
        return array

    code = str(value.dtype).removeprefix("torch.")
    where = f"'{name}' in '{file}'"
    if code not in safetensors_files.TYPES.values():
        raise UserError(f"{where} has the type {code}, which is not known.")
    dtype = np.dtype(code) if code != "bfloat16" else safetensors_files.BFLOAT16
    return Tensor(tuple(value.shape), dtype, load, where)
