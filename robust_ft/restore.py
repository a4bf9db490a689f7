"""Parameters that a model starts from: read, checked against the model, placed on the mesh."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from robust_ft import assets, multihost
from robust_ft.checkpoints_io import adapters, added_tokens, orbax_params, sources
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.models.model import Model
from robust_ft.partitioning import Partitioner
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params
from robust_ft.vocabulary import Vocabulary


def load_params(path: str) -> dict[str, np.ndarray]:
    """Reads parameters into memory.

    Args:
        path: What `sources.weights` reads: a model directory, a stage's `checkpoint_<step>`, an
            adapter, a `.safetensors` file, a soft prompt in a `.npy` file; several, separated by
            commas.

    Returns:
        {parameter path: array}.

    Raises:
        UserError: There is nothing at this path, or it can't be read.
    """
    checkpoint = as_path(assets.resolve(path))
    if orbax_params.is_directory(checkpoint):
        return orbax_params.load(checkpoint)
    return {name: tensor.load() for name, tensor in sources.weights(path).items()}


def load_for_model(
    model: Model, path: str, vocabulary: Vocabulary | None = None
) -> dict[str, np.ndarray]:
    """Reads parameters that a model can start from, and checks them against it.

    Only parameters of PEFT methods may be missing; they start fresh. A vocabulary larger than the
    checkpoint's fits: see `added_tokens`.

    Args:
        model: The model.
        path: As in `load_params`. Of several paths, each overwrites the ones before it; an adapter
            that records its base must follow exactly that base.
        vocabulary: The model's, if it is known.

    Returns:
        {parameter path: array} in the model's dtypes.

    Raises:
        UserError: They do not fit the model, an adapter belongs to another base, or some were
            trained with other token ids or another vocabulary.
    """
    loaded: dict[str, np.ndarray] = {}
    before: list[str] = []
    for source in sources.split(path):
        if (tokens := sources.tokens(source)) is not None:
            tokens.check_model(model, source)
            if vocabulary is not None:
                tokens.check_vocabulary(vocabulary, source, "this recipe")
        if (adapter := sources.adapter(source)) is not None:
            adapters.check_methods(adapter, model.peft)
            base = [(name, array) for name, array in loaded.items() if not model.peft_owns(name)]
            if base:
                adapters.check_base(adapter, base, ",".join(before))
        loaded = added_tokens.extended(model, loaded | load_params(source), source)
        before.append(source)
    return fit_to_model(model.shapes(), loaded, path, may_lack=model.peft_owns)


def place_params(
    model: Model,
    partitioner: Partitioner,
    known: Mapping[str, Any],
    init_rng: jax.Array,
    peft_rng: jax.Array,
) -> Params:
    """Places known parameters on the mesh and initializes the model's other ones there.

    Args:
        model: The model.
        partitioner: The mesh and its rules.
        known: {parameter path: array}; those that the model does not have are left out.
        init_rng: The key that all parameters are drawn with.
        peft_rng: The key for parameters of PEFT methods whose values depend on others, such as a
            prompt that starts as embeddings of the vocabulary.

    Returns:
        All parameters of the model, sharded.
    """
    model.check()
    shardings = flatten(partitioner.shardings(model.logical_axes()))
    placed = {
        path: multihost.put(known[path], shardings[path])
        for path in shardings.keys() & known.keys()
    }
    fresh = sorted(shardings.keys() - placed.keys())
    if fresh:
        # Jitted, so that dead-code elimination leaves only the fresh ones of all initial values.
        @functools.partial(jax.jit, out_shardings={path: shardings[path] for path in fresh})
        def draw(placed: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            params = flatten(model.init(init_rng)) | dict(placed)
            params = flatten(model.initialize_peft(peft_rng, unflatten(params)))
            return {path: params[path] for path in fresh}

        placed |= draw(placed)
    return unflatten(placed)


def fit_to_model(
    shapes: Params,
    loaded: Mapping[str, Any],
    source: str,
    may_lack: Callable[[str], bool],
    may_drop: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """Checks loaded parameters and the model against each other, and casts to the model's dtypes.

    Args:
        shapes: The model's parameters as shapes and dtypes.
        loaded: {parameter path: array}.
        source: What to call the checkpoint in errors.
        may_lack: Whether the checkpoint may lack a parameter of the model, which starts fresh then.
        may_drop: Whether the model may have no place for a parameter of the checkpoint.

    Returns:
        {parameter path: array} of the parameters that both have.

    Raises:
        UserError: A parameter of the model is missing, has another shape, or the checkpoint has
            one that the model has no place for.
    """
    expected = flatten(shapes)
    missing = sorted(p for p in expected if p not in loaded and not may_lack(p))
    unexpected = sorted(p for p in loaded if p not in expected and not may_drop(p))
    if missing or unexpected:
        raise UserError(
            f"'{source}' does not fit the model: {len(missing)} parameters of the model are "
            f"missing ({_first_few(missing)}), {len(unexpected)} have no place in it "
            f"({_first_few(unexpected)})."
        )
    restored = {path: array for path, array in loaded.items() if path in expected}
    for path, array in restored.items():
        if array.shape != expected[path].shape:
            raise UserError(
                f"'{source}' has {path} with shape {array.shape}, the model {expected[path].shape}."
            )
    fresh = sorted(expected.keys() - restored.keys())
    logging.info("Restored %d parameters from '%s'.", len(restored), source)
    if fresh:
        logging.info("Not in '%s', so they start fresh: %s.", source, ", ".join(fresh))
    return {
        path: array.astype(expected[path].dtype, copy=False) for path, array in restored.items()
    }


def _first_few(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
