"""Trainable and frozen parameters: patterns name what trains, and split the parameters in two.

Only trainable parameters are differentiated, optimized and saved. Nothing is masked inside the
optimizer, so a frozen parameter costs no gradient and no optimizer state, and stays bit-identical.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util

from robust_ft.errors import UserError, nearest
from robust_ft.models.model import Model
from robust_ft.ranges import Count
from robust_ft.types import Params


def flatten(params: Params) -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict, sorted by path."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of {path: leaf}."""
    nested: dict[str, Any] = traverse_util.unflatten_dict(flat, sep="/")
    return nested


# Words in place of regexes: the parameters of the model's PEFT methods, and all others.
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
            else is a regex that must match a path in full.
        peft_owns: Whether a path belongs to a PEFT method (`Model.peft_owns`).

    Raises:
        UserError: There is no pattern, one is no valid regex, or one names no parameter.
    """
    if not patterns:
        raise UserError("Nothing would train: there must be at least one trainable pattern.")
    paths = list(flatten(params))
    trainable: set[str] = set()
    for pattern in patterns:
        try:
            if pattern in (PEFT, BASE):
                matches = {path for path in paths if peft_owns(path) == (pattern == PEFT)}
            else:
                matches = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as error:
            raise UserError(f"Trainable pattern '{pattern}' is no valid regex: {error}.") from None
        if not matches and pattern == PEFT:
            raise UserError(
                "Nothing would train: the trainable pattern 'peft' names parameters of PEFT "
                "methods, and the model has none; set Model.peft."
            )
        if not matches:
            raise UserError(
                f"Trainable pattern '{pattern}' matches none of the {len(paths)} parameters."
                + nearest(pattern, paths)
            )
        trainable |= matches
    return frozenset(trainable)


def top_layers(
    model: Model, count: Count, encoder: bool = False, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns patterns that name the parameters of a model's top layers.

    Li and Liang, 2021, section 5.2, finetune GPT-2's top two (FT-Top2). The final norm and the head
    belong to no layer; `more` can add them.

    Args:
        model: The model.
        count: Number of top layers of the decoder.
        encoder: Whether as many top layers of the encoder train too.
        more: Further patterns.

    Raises:
        UserError: There are fewer layers than `count`, or there is no encoder.
    """
    config = model.config
    depths: dict[str, int | None] = {
        "decoder": getattr(config, "num_decoder_layers", getattr(config, "num_layers", None))
    }
    if encoder:
        depths["encoder"] = getattr(config, "num_encoder_layers", None)
    patterns = []
    for stack, depth in depths.items():
        if depth is None:
            raise UserError(f"top_layers.{stack}=True, but a {type(config).__name__} has none.")
        if not 1 <= count <= depth:
            raise UserError(
                f"top_layers.count={count} must be from 1 to the {stack}'s {depth} layers."
            )
        numbers = "|".join(str(i) for i in range(depth - count, depth))
        patterns.append(f"{stack}/layers_({numbers})/.*")
    return (*patterns, *more)


def bitfit(model: Model) -> tuple[str, ...]:
    """Returns the pattern that names a model's biases (BitFit, Ben Zaken et al., 2022).

    Models without biases, such as T5, train the scales of their norms instead, which is logged.

    Args:
        model: The model.
    """
    if any(path.endswith("/bias") for path in flatten(model.without_peft().shapes())):
        return (".*/bias",)
    name = type(model.config).__name__.removesuffix("Config")
    logging.info("BitFit: a %s has no biases, so its norms' scales train instead.", name)
    return (".*/scale",)


def split(params: Params, paths: frozenset[str]) -> tuple[Params, Params]:
    """Splits parameters into (those at `paths`, the others), both pruned nested dicts."""
    flat = flatten(params)
    inside = {path: leaf for path, leaf in flat.items() if path in paths}
    outside = {path: leaf for path, leaf in flat.items() if path not in paths}
    return unflatten(inside), unflatten(outside)


def merge(*trees: Params) -> Params:
    """Merges the results of `split`; no path may be in two of them."""
    merged: dict[str, Any] = {}
    for params in trees:
        flat = flatten(params)
        if duplicates := sorted(merged.keys() & flat.keys()):
            raise ValueError(f"Parameters {duplicates} are in two trees.")
        merged |= flat
    return unflatten(merged)
