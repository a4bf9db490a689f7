"""Which parameters train: patterns give a mask, the mask splits the parameters in two.

Only the trainable half is differentiated, optimized and saved. Nothing is masked inside the
optimizer, so a frozen parameter costs no gradient and no optimizer state, and stays bit-identical.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from robust_ft.errors import UserError, nearest
from robust_ft.models.model import Model, ModelConfig
from robust_ft.types import Params


def flatten(params: Params) -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict, sorted by path."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep="/")


# Patterns that are words: what the model's PEFT methods own, and everything else.
PEFT = "peft"
BASE = "base"


def trainable_paths(
    params: Params,
    patterns: Sequence[str],
    peft_owns: Callable[[str], bool] = lambda path: False,
) -> frozenset[str]:
    """Returns the paths of the parameters that at least one pattern names.

    Args:
        params: All parameters of a model, or their shapes.
        patterns: "peft" names the parameters that PEFT methods own, "base" the others; anything
            else is a regex that has to match a path in full.
        peft_owns: Whether a path belongs to a PEFT method (`Model.peft_owns`).

    Raises:
        UserError: There is no pattern, or one is no regular expression or names no parameter.
    """
    if not patterns:
        raise UserError("Nothing would train: there must be at least one trainable pattern.")
    paths = list(flatten(params))
    matched: set[str] = set()
    for pattern in patterns:
        try:
            if pattern in (PEFT, BASE):
                hits = {path for path in paths if peft_owns(path) == (pattern == PEFT)}
            else:
                hits = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as error:
            raise UserError(f"Trainable pattern '{pattern}' is no valid regex: {error}.") from None
        if not hits and pattern == PEFT:
            raise UserError(
                "Nothing would train: the trainable pattern 'peft' names parameters of PEFT "
                "methods, and the model has none; set Model.peft."
            )
        if not hits:
            raise UserError(
                f"Trainable pattern '{pattern}' matches none of the {len(paths)} parameters."
                + nearest(pattern, paths)
            )
        matched |= hits
    return frozenset(matched)


def top_layers(
    config: ModelConfig, count: int, encoder: bool = False, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns patterns of the parameters in a model's top layers, those next to its output.

    Li and Liang, 2021, section 5.2, finetune GPT-2's top two (FT-Top2). Norms and heads behind
    the layers belong to none of them; `more` can add them.

    Args:
        config: The model's config.
        count: How many layers of the decoder.
        encoder: Whether as many of the encoder's layers train too.
        more: Further patterns.

    Raises:
        UserError: There are not so many layers, or no encoder.
    """
    sizes: dict[str, int | None] = {
        "decoder": getattr(config, "num_decoder_layers", getattr(config, "num_layers", None))
    }
    if encoder:
        sizes["encoder"] = getattr(config, "num_encoder_layers", None)
    patterns = []
    for stack, size in sizes.items():
        if size is None:
            raise UserError(f"top_layers.{stack}=True, but a {type(config).__name__} has none.")
        if not 1 <= count <= size:
            raise UserError(
                f"top_layers.count={count} must be from 1 to the {stack}'s {size} layers."
            )
        numbers = "|".join(str(i) for i in range(size - count, size))
        patterns.append(f"{stack}/layers_({numbers})/.*")
    return (*patterns, *more)


def bitfit(config: ModelConfig) -> tuple[str, ...]:
    """Returns the pattern of a model's biases (BitFit, Ben Zaken et al. 2022).

    Models without any, as T5, get their norms' scales instead, and the log says so.
    """
    if any(path.endswith("/bias") for path in flatten(Model(config).shapes())):
        return (".*/bias",)
    name = type(config).__name__.removesuffix("Config")
    logging.info("BitFit: a %s has no biases, so its norms' scales train instead.", name)
    return (".*/scale",)


def split(params: Params, paths: frozenset[str]) -> tuple[Params, Params]:
    """Splits parameters into (those at `paths`, the others), both pruned nested dicts."""
    flat = flatten(params)
    inside = {path: leaf for path, leaf in flat.items() if path in paths}
    outside = {path: leaf for path, leaf in flat.items() if path not in paths}
    return unflatten(inside), unflatten(outside)


def merge(*parts: Params) -> Params:
    """Puts the parts of a split together; no path may come from two parts."""
    merged: dict[str, Any] = {}
    for part in parts:
        flat = flatten(part)
        if both := sorted(merged.keys() & flat.keys()):
            raise ValueError(f"Parameters {both} come from two parts.")
        merged |= flat
    return unflatten(merged)
