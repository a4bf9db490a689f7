"""What a recipe takes from the checkpoint that it starts from: sizes, token ids, vocabulary."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from robust_ft import assets
from robust_ft.checkpoints_io import hf, native, orbax_params, sources
from robust_ft.checkpoints_io.tensors import Checkpoint
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.models.config import COMPUTE_FIELDS, ModelConfig
from robust_ft.models.model import Model
from robust_ft.stage import SCRATCH
from robust_ft.vocabulary import Vocabulary


def read(restore: str, fields: Mapping[str, Any]) -> Checkpoint:
    """Opens the model in a checkpoint.

    Args:
        restore: As `Stage.restore`; of several paths, the model is the first.
        fields: Of a T5Config; a t5x checkpoint, which does not determine all of them, takes its
            sizes from them.

    Raises:
        UserError: There is none, it is broken, or it holds parameters without a config.
    """
    if restore == SCRATCH:
        raise UserError(
            f"Stage.restore='{SCRATCH}' draws a model at random, so Model.config must say which; "
            "files in gin_configs/models/ do."
        )
    path = sources.split(restore)[0]
    folder = as_path(assets.resolve(path)).expanduser()
    bare = folder.is_file() or orbax_params.is_directory(folder)
    if bare or sources.adapter(path) is not None:
        raise UserError(
            f"'{path}' holds parameters, but neither a config nor a vocabulary; name the model "
            f"that they belong to before it: Stage.restore='MODEL,{path}'."
        )
    path = sources.existing(path)
    if sources.detect(path) != "t5x":
        return sources.read(path)
    sizes = {f: v for f, v in fields.items() if not is_free(f) and f != "vocab_size"}
    return sources.read(path, overrides=sizes)


def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Returns the vocabulary of a checkpoint.

    Raises:
        UserError: It has none, as t5x's, or it is broken.
    """
    return sources.vocabulary(checkpoint, "Set TaskData.vocabulary to the model's.")


def model(checkpoint: Checkpoint, config: ModelConfig, vocabulary: Vocabulary) -> Model:
    """Returns a checkpoint's model with a config of the same family, and pad and eos of its data.

    Raises:
        UserError: The config is not the checkpoint's, or the model has fewer tokens than the
            vocabulary.
    """
    _check_same(_differing_sizes(config, checkpoint), checkpoint.source)
    if vocabulary.vocab_size > config.vocab_size:
        name = type(config).__name__
        raise UserError(
            f"TaskData.vocabulary has {vocabulary.vocab_size} tokens, and the model in "
            f"'{checkpoint.source}' {config.vocab_size}; give its own vocabulary, or set "
            f"{name}.vocab_size={vocabulary.vocab_size} to add tokens to the model."
        )
    return dataclasses.replace(
        native.model(checkpoint),
        config=config,
        pad_id=vocabulary.pad_id,
        eos_id=vocabulary.eos_id,
    )


def is_free(field: str) -> bool:
    """Returns whether a field of a config is the user's: no checkpoint determines its value."""
    return field in COMPUTE_FIELDS or field.endswith("dropout_rate")


def check(model: Model, restore: str) -> None:
    """Checks a model that is described in a config against the checkpoint that it starts from.

    Shapes alone would let pass what changes numbers and no shape: a RoPE's base, an epsilon, an
    activation. A larger vocabulary adds tokens. Nothing is checked where there is no config to
    compare with: t5x checkpoints, files of parameters, and models that are not there (yet), such as
    names on the hub.

    Raises:
        UserError: Something differs; the message has the field and both values.
    """
    path = sources.split(restore)[0]
    folder = as_path(assets.resolve(path)).expanduser()
    if not (native.is_directory(folder) or hf.is_directory(folder)):
        return
    checkpoint = sources.read(path)
    if type(model.config) is not type(checkpoint.config):
        raise UserError(
            f"The model is a {type(model.config).__name__}, the checkpoint '{path}' a "
            f"{type(checkpoint.config).__name__}."
        )
    _check_same(_differing_sizes(model.config, checkpoint), path)
    _check_same(_differing_ids(model, checkpoint), path)


def _check_same(differences: Iterable[tuple[str, Any, Any]], path: str) -> None:
    for field, stated, theirs in differences:
        name = field.removeprefix("Model.")
        other = f", or write a copy that has yours: convert --config={name}=ID" * (name != field)
        raise UserError(
            f"{field}={stated!r}, but the checkpoint '{path}' has {theirs!r}; leave it out to take "
            f"the checkpoint's{other}."
        )


def _differing_sizes(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """Yields (field, the config's value, the checkpoint's) of what changes numbers."""
    for field, theirs in vars(checkpoint.config).items():
        stated = getattr(config, field)
        if is_free(field) or field == "max_length":  # the latter is for information
            continue
        if stated != theirs and not (field == "vocab_size" and stated > theirs):
            yield f"{type(config).__name__}.{field}", stated, theirs


def _differing_ids(model: Model, checkpoint: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    # Padding is told by masks, so its id changes nothing.
    for key in ("eos", "start", "separator"):
        theirs = checkpoint.token_ids.get(key)
        stated = getattr(model, f"{key}_id")
        if theirs is not None and stated != theirs:
            yield f"Model.{key}_id", stated, theirs
    stop = tuple(checkpoint.token_ids.get("stop", ()))
    if not set(stop) <= set(model.eos_ids):
        yield "Model.stop_ids", model.stop_ids, stop
