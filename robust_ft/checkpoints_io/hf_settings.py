"""What config.json and generation_config.json say beside sizes, and what is written into them."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_ft.checkpoints_io import config_json, families, native
from robust_ft.checkpoints_io.config_json import BOS, DECODER_START, EOS, PAD
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.files import read_json_object, write_json
from robust_ft.models.config import COMPUTE_FIELDS, ModelConfig
from robust_ft.vocabulary import Vocabulary

GENERATION = "generation_config.json"
TIED = "tie_word_embeddings"
_HEAD = "decoder/logits_dense/kernel"


def token_ids(
    family: str,
    settings: Mapping[str, Any],
    folder: Path,
    vocabulary: Vocabulary | None,
    config: ModelConfig,
) -> dict[str, Any]:
    """Returns a directory's `Checkpoint.token_ids`.

    Targets are padded and ended with the vocabulary's ids: config.json often lacks them, or has
    several. Decoding stops at all ids of generation_config.json or, without any, of config.json.
    """
    generation = read_json_object(folder / GENERATION, default={})
    listed = {
        key: config_json.ids(generation, key, GENERATION) for key in (PAD, BOS, EOS, DECODER_START)
    }
    lacking = {k: v for k, v in listed.items() if v and not config_json.ids(settings, k)}
    ids: dict[str, Any] = dict(families.get(family).token_ids(dict(settings) | lacking))
    if vocabulary is not None:
        special = {"pad": vocabulary.pad_id, "eos": vocabulary.eos_id}
        ids |= {name: token for name, token in special.items() if token is not None}
    for name in ("pad", "start"):
        # Such as a padding token that was added to the tokenizer alone.
        if ids.get(name, 0) >= config.vocab_size and "eos" in ids:
            ids[name] = ids["eos"]
    ends = listed[EOS] or config_json.ids(settings, EOS)
    if stop := [end for end in ends if end != ids.get("eos")]:
        ids["stop"] = stop
    return ids


def config(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns a checkpoint's config.json: the source's own, with what has changed since.

    Args:
        checkpoint: The checkpoint.
        tensors: What is written, under Hugging Face's names.

    Raises:
        UserError: Hugging Face has no such model.
    """
    family = families.get(checkpoint.family)
    original = checkpoint.hugging_face.get("config")
    if original is None:
        settings = family.config_to_hf(checkpoint.config)
        changed = _changed_ids(checkpoint)
        return settings | {key: value for key, value in changed.items() if key in settings}
    settings = dict(original)
    before = _as_computed(family.config_from_hf(original, tensors), checkpoint.config)
    if before != checkpoint.config:
        was, now = family.config_to_hf(before), family.config_to_hf(checkpoint.config)
        settings |= {key: value for key, value in now.items() if value != was.get(key)}
        after = _as_computed(family.config_from_hf(settings, tensors), checkpoint.config)
        if after != checkpoint.config:
            raise UserError(
                f"The config.json of '{checkpoint.source}' cannot say the changed model: it would "
                f"be read as {after}, not as {checkpoint.config}."
            )
    settings |= _head(checkpoint, settings, tensors)
    return settings | _changed_ids(checkpoint)


def edit_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Sets the ids that have changed in the generation_config.json of an output, if it has one."""
    changed, file = _changed_ids(checkpoint), folder / GENERATION
    if changed and file.is_file():
        write_json(file, read_json_object(file) | changed)


def warn_of_a_separator(checkpoint: Checkpoint) -> None:
    """Says what whoever serves the model has to do, as no file of Hugging Face's can."""
    separator = checkpoint.token_ids.get("separator")
    if separator is None:
        return
    vocabulary = native.vocabulary(checkpoint)
    text = vocabulary.decode([separator]) if vocabulary else ""
    logging.warning(
        "The model reads a separator between input and target, which Hugging Face's files cannot "
        "say: put token %d%s behind each prompt.",
        separator,
        f" ({text!r})" if text else "",
    )


def _as_computed(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """Returns a config with the fields of another that are no part of a config.json."""
    fields = {name: getattr(other, name) for name in COMPUTE_FIELDS if name != "dropout_rate"}
    return dataclasses.replace(config, **fields)


def _changed_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the entries for ids that are not those of the source; all ids without a source."""
    ids, notes = checkpoint.token_ids, checkpoint.hugging_face
    # Directories of earlier versions do not say which ids their source had.
    before = notes.get("token_ids", ids if "config" in notes else {})
    start = BOS if checkpoint.config.decoder_only else DECODER_START
    changed = {
        key: ids[name]
        for name, key in (("pad", PAD), ("start", start))
        if name in ids and ids[name] != before.get(name)
    }
    ends, ends_before = (
        [each["eos"], *each.get("stop", ())] if "eos" in each else [] for each in (ids, before)
    )
    if ends != ends_before:
        changed[EOS] = ends if len(ends) > 1 else ends[0]
    return changed


def _head(
    checkpoint: Checkpoint, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Returns the flags of the head where those of the source contradict what is written."""
    family = families.get(checkpoint.family)
    own = _HEAD in checkpoint.tensors and "lm_head.weight" in tensors
    flags: dict[str, Any] = {}
    if settings.get(TIED, family.TIED_BY_DEFAULT) == own:
        flags[TIED] = not own
    if scaling := families.optional(checkpoint.family, "scaling"):
        flags |= scaling(dict(settings) | flags, checkpoint.config)
    return flags
