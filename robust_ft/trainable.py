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
NOT = "!"  # before a pattern: what it names does not train


def trainable_paths(
    params: Params,
    patterns: Sequence[str],
    peft_owns: Callable[[str], bool] = lambda path: False,
) -> frozenset[str]:
    """Returns the paths of the parameters that patterns name.

    Args:
        params: All parameters of a model, or their shapes.
        patterns: "peft" names the parameters that PEFT methods own, "base" the others; anything
            else is a regex that must match a path in full. A pattern behind "!" leaves out what the
            patterns before it have named.
        peft_owns: Whether a path belongs to a PEFT method (`Model.peft_owns`).

    Raises:
        UserError: There is no pattern, one is no valid regex, or one names no parameter; or nothing
            is left.
    """
    if not patterns:
        raise UserError("Nothing would train: there must be at least one trainable pattern.")
    paths = list(flatten(params))
    trainable: set[str] = set()
    for pattern in patterns:
        matches = _matches(pattern.removeprefix(NOT), paths, peft_owns)
        trainable = trainable - matches if pattern.startswith(NOT) else trainable | matches
    if not trainable:
        raise UserError(f"Nothing would train: the trainable patterns {list(patterns)} leave none.")
    return frozenset(trainable)


def _matches(pattern: str, paths: Sequence[str], peft_owns: Callable[[str], bool]) -> set[str]:
    """Returns the paths that one pattern names, at least one."""
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
    return matches


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
    depths = _depths(model)
    if encoder and "encoder" not in depths:
        kind = type(model.config).__name__
        raise UserError(f"top_layers.encoder=True, but a {kind} has none.")
    patterns = []
    for stack, depth in depths.items():
        if stack == "encoder" and not encoder:
            continue
        if not 1 <= count <= depth:
            raise UserError(
                f"top_layers.count={count} must be from 1 to the {stack}'s {depth} layers."
            )
        numbers = "|".join(str(i) for i in range(depth - count, depth))
        patterns.append(f"{stack}/layers_({numbers})/.*")
    return (*patterns, *more)


def above_bottom_layers(model: Model, count: Count) -> tuple[str, ...]:
    """Returns patterns that name a pretrained model's parameters above its bottom layers.

    What lies below keeps what a model could do (Zheng et al., 2025, arXiv 2501.13453): its bottom
    layers, in an encoder-decoder those of both stacks, and its embeddings of tokens and positions,
    with their norm where there is one. A head that is tied to them is frozen with them. What all
    layers share, T5's relative positions, trains, and so do final norms.

    Args:
        model: The model.
        count: Number of bottom layers of each stack that are frozen; 0 for embeddings alone.

    Raises:
        UserError: A stack has fewer layers than `count`.
    """
    frozen = [NOT + r"(.*/)?(token_embedder|position_embedder|embedding_layer_norm)/.*"]
    for stack, depth in _depths(model).items():
        if not 0 <= count <= depth:
            raise UserError(
                f"above_bottom_layers.count={count} must be from 0 to the {stack}'s {depth} layers."
            )
        if count:
            frozen.append(f"{NOT}{stack}/layers_({'|'.join(map(str, range(count)))})/.*")
    return (BASE, *frozen)


def _depths(model: Model) -> dict[str, int]:
    """Returns the number of layers of the decoder and, where there is one, of the encoder."""
    config = model.config
    depths = {"decoder": getattr(config, "num_decoder_layers", getattr(config, "num_layers", 0))}
    if (encoder := getattr(config, "num_encoder_layers", None)) is not None:
        depths["encoder"] = encoder
    return depths


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
