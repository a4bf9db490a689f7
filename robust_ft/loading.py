"""Loads a model directory as a Predictor, and places parameters on a mesh."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from robust_ft import assets, multihost
from robust_ft.checkpoints_io import hf, native, sources
from robust_ft.checkpoints_io.adapters import Adapter, check_base, check_methods
from robust_ft.checkpoints_io.names import misfit
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError, nearest
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params
from robust_ft.vocabulary import Vocabulary, vocabulary_from_directory


def load(
    directory: str | os.PathLike[str],
    *,
    vocabulary: Vocabulary | str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    peft: Sequence[Peft] = (),
    weights: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    partitioner: Partitioner | None = None,
) -> Predictor:
    """Loads a pretrained or finetuned model: text in, text or scores out.

    Args:
        directory: A model directory of Hugging Face's, t5x's or our own (see `convert`), or a
            model's name on the Hugging Face hub. "asset:mini" is the mini T5.
        vocabulary: The model's vocabulary, or a directory that holds it; by default the one in
            `directory`. t5x checkpoints have none.
        dtype: "float32" or "bfloat16", of parameters and of computation. By default parameters keep
            the dtype that they are saved in, and computation is in float32.
        peft: Methods to plug in, such as `robust_ft.models.peft.Prompt(length=100)`.
        weights: Parameters that replace the directory's: a stage's `checkpoint_<step>`, a
            `.safetensors` file, a soft prompt in a `.npy` file, or an adapter's directory (a run's
            `<stage>/export`, or PEFT's), whose methods are plugged in; several separated by
            commas, of which the later ones win. Parameters of PEFT methods that are in none of
            them start fresh.
        config: Fields of the model's config that replace the directory's; a larger `vocab_size`
            adds tokens.
        seed: The seed of fresh parameters.
        partitioner: How parameters and batches are sharded over devices; by default parameters are
            replicated and batches are sharded.

    Raises:
        UserError: Nothing is there, it is broken, or its parts do not fit together.
    """
    path = _existing(os.fspath(directory))
    checkpoint = sources.read(path, overrides=config)
    tokenizer = _vocabulary(checkpoint, vocabulary)
    additions = sources.split(os.fspath(weights)) if weights is not None else []
    adapters = {addition: sources.adapter(addition) for addition in additions}
    model = _model(checkpoint, tokenizer, dtype, _methods(peft, adapters.values()))
    partitioner = partitioner or Partitioner()
    shapes = flatten(model.shapes())
    shardings = flatten(partitioner.shardings(model.logical_axes()))
    known = _placed(shapes, shardings, checkpoint.tensors, path)
    below = path
    for addition in additions:
        if (adapter := adapters[addition]) is not None:
            check_methods(adapter, model.peft)
            base = [(p, leaf) for p, leaf in known.items() if not model.peft_owns(p)]
            check_base(adapter, base, below)
        known |= _placed(shapes, shardings, sources.weights(addition), addition)
        below += f",{addition}"
    init_rng, peft_rng = jax.random.split(jax.random.key(seed))
    params = place(model, partitioner, known, init_rng, peft_rng)
    return Predictor(model, params, tokenizer, partitioner)


def place(
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


def _existing(directory: str) -> str:
    """Returns the path of a local directory, to which a name on the hub is downloaded."""
    path = assets.resolve(directory)
    folder = Path(path).expanduser()
    if folder.exists():
        return path
    try:
        return str(hf.find(path))
    except UserError as error:
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{error}{nearest(folder.name, names)}") from None


def _methods(peft: Sequence[Peft], adapters: Iterable[Adapter | None]) -> tuple[Peft, ...]:
    """Returns the methods asked for and those of the adapters."""
    methods = list(peft)
    for adapter in adapters:
        names = {method.name for method in methods}
        methods += [m for m in adapter.methods if m.name not in names] if adapter else []
    return tuple(methods)


def _vocabulary(
    checkpoint: Checkpoint, vocabulary: Vocabulary | str | os.PathLike[str] | None
) -> Vocabulary:
    if isinstance(vocabulary, str | os.PathLike):
        return vocabulary_from_directory(os.fspath(vocabulary))
    vocabulary = vocabulary or native.vocabulary(checkpoint)
    if vocabulary is not None:
        return vocabulary
    try:
        return vocabulary_from_directory(checkpoint.source)
    except UserError as error:
        raise UserError(
            f"{error} Give load(..., vocabulary=...): a directory, or an object of "
            "robust_ft.vocabulary."
        ) from None


def _model(
    checkpoint: Checkpoint, vocabulary: Vocabulary, dtype: str | None, peft: tuple[Peft, ...]
) -> Model:
    """Returns the model with the vocabulary's pad and eos ids, and the checkpoint's start id."""
    config: Any = checkpoint.config
    if vocabulary.vocab_size > config.vocab_size:
        raise UserError(
            f"The vocabulary has {vocabulary.vocab_size} tokens, the model in "
            f"'{checkpoint.source}' {config.vocab_size}; give its own vocabulary or, to add tokens "
            f"to the model, load(..., config={{'vocab_size': {vocabulary.vocab_size}}})."
        )
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    return dataclasses.replace(
        native.model(checkpoint),
        config=dataclasses.replace(config, **changes),
        peft=peft,
        pad_id=vocabulary.pad_id,
        eos_id=vocabulary.eos_id,
    )


def _placed(
    shapes: Mapping[str, Any],
    shardings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
) -> dict[str, jax.Array]:
    """Returns the tensors on the mesh; one at a time is in the host's memory."""
    if unplaced := sorted(tensors.keys() - shapes.keys()):
        raise UserError(misfit(source, unplaced, ()))
    placed = {}
    for path, tensor in tensors.items():
        if tensor.shape != shapes[path].shape:
            raise UserError(
                f"{tensor.where} has shape {tensor.shape}, the model asks for {shapes[path].shape}."
            )
        array = tensor.cast(shapes[path].dtype).load()
        placed[path] = multihost.put(array, shardings[path])
    return placed
