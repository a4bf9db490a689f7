"""Loads a model directory, or a finished run, as a Predictor."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from robust_ft import multihost
from robust_ft.checkpoints_io import native, sources, stage_record, tokens
from robust_ft.checkpoints_io.adapters import Adapter, check_base, check_methods
from robust_ft.checkpoints_io.names import misfit
from robust_ft.checkpoints_io.stage_record import StageRecord
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.finished_run import FinishedStage
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import Predictor
from robust_ft.restore import place_params
from robust_ft.trainable import flatten
from robust_ft.vocabulary import Vocabulary, vocabulary_from_directory

_VOCABULARY = "Give load(..., vocabulary=...): a directory, or an object of robust_ft.vocabulary."


def load(
    directory: str | os.PathLike[str],
    *,
    stage: str | None = None,
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
        directory: The MODEL_DIR of a finished run: what it ended with, PEFT methods included
            (`Predictor.without` detaches them). Or a model directory of Hugging Face's, t5x's or
            our own (see `convert`), or a model's name on the Hugging Face hub. "asset:mini" is the
            mini T5.
        stage: An earlier stage of a run.
        vocabulary: The model's vocabulary, or a directory that holds it; by default the one in
            `directory`, or the one that a run or an export was trained with. t5x checkpoints have
            none.
        dtype: "float32" or "bfloat16", of parameters and of computation. By default parameters keep
            the dtype that they are saved in, and computation is in float32; both are a run's own.
        peft: Methods to plug in, such as `robust_ft.models.peft.Prompt(length=100)`.
        weights: Parameters that replace the directory's: a stage's `checkpoint_<step>`, a
            `.safetensors` file, a soft prompt in a `.npy` file, or an adapter's directory (a run's
            `<stage>/export`, or PEFT's), whose methods are plugged in; several separated by
            commas, of which the later ones win. The token ids and the vocabulary that an export
            records are applied. Parameters of PEFT methods that are in none of them start fresh.
        config: Fields of the model's config that replace the directory's; a larger `vocab_size`
            adds tokens.
        seed: The seed of fresh parameters.
        partitioner: How parameters and batches are sharded over devices; by default parameters are
            replicated and batches are sharded.

    Raises:
        UserError: Nothing is there, it is broken, or its parts do not fit together.
    """
    path = sources.existing(os.fspath(directory))
    checkpoint, additions = _opened(path, stage, config)
    given = sources.split(os.fspath(weights)) if weights is not None else []
    additions += [sources.addition(each) for each in given]
    checkpoint, model, tokenizer = _model(checkpoint, vocabulary, dtype, peft, additions)
    partitioner = partitioner or Partitioner()
    shapes = flatten(model.shapes())
    shardings = flatten(partitioner.shardings(model.logical_axes()))
    known = _placed(shapes, shardings, checkpoint.tensors, path)
    below = path
    for addition in additions:
        check_methods(addition, model.peft)
        base = [(p, leaf) for p, leaf in known.items() if not model.peft_owns(p)]
        check_base(addition, base, below)
        known |= _placed(shapes, shardings, addition.tensors, addition.source)
        below += f",{addition.source}"
    for each in given:
        _check_whole(each, known)
    init_rng, peft_rng = jax.random.split(jax.random.key(seed))
    params = place_params(model, partitioner, known, init_rng, peft_rng)
    return Predictor(model, params, tokenizer, partitioner)


def _opened(
    path: str, stage: str | None, config: Mapping[str, Any] | None
) -> tuple[Checkpoint, list[Adapter]]:
    """Returns a base, and what a run laid over it."""
    folder = as_path(path).expanduser()
    if stage_record.is_run(folder):
        finished = FinishedStage.read(path, stage)
        return sources.overridden(finished.base_checkpoint(), config or {}), [finished.adapter]
    if stage_record.is_run(folder.absolute().parent) and StageRecord.read(folder) is not None:
        raise UserError(
            f"'{path}' is a stage of a run; call "
            f"robust_ft.load('{folder.parent}', stage='{folder.name}')."
        )
    if stage is not None:
        raise UserError(f"'{path}' is no run, so it has no stage '{stage}'.")
    return sources.read(path, overrides=config), []


def _check_whole(source: str, known: Mapping[str, Any]) -> None:
    """Raises a UserError if a stage's checkpoint was trained with methods that are missing.

    As in ProMoT's second stage, whose checkpoint does not hold the prompt that it trained under.
    """
    record = stage_record.of_checkpoint(as_path(source).expanduser())
    for method in record.methods if record else ():
        if not any(map(method.owns, known)):
            stage = as_path(source).expanduser().parent
            raise UserError(
                f"'{source}' was trained with the {type(method).__name__} '{method.name}', which "
                f"it does not hold; call robust_ft.load('{stage.parent}', stage='{stage.name}'), "
                f"and .without('{method.name}') for the model without it."
            )


def _methods(peft: Sequence[Peft], adapters: Iterable[Adapter]) -> tuple[Peft, ...]:
    """Returns the methods asked for and those of the adapters."""
    methods = list(peft)
    for adapter in adapters:
        names = {method.name for method in methods}
        methods += [method for method in adapter.methods if method.name not in names]
    return tuple(methods)


def _model(
    checkpoint: Checkpoint,
    given: Vocabulary | str | os.PathLike[str] | None,
    dtype: str | None,
    peft: Sequence[Peft],
    additions: Sequence[Adapter],
) -> tuple[Checkpoint, Model, Vocabulary]:
    """Returns the base, the model and its vocabulary.

    Token ids and vocabulary are those that the additions were trained with, or else the base's; the
    vocabulary tells padding and EOS, and the base the others.
    """
    if isinstance(given, str | os.PathLike):
        given = vocabulary_from_directory(os.fspath(given))
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "param_dtype": dtype}
    trained = tokens.agreed((addition.source, addition.tokens) for addition in additions)
    if trained is not None:
        source, used = trained
        checkpoint, vocabulary = used.applied(checkpoint, source, given)
    else:
        vocabulary = given or sources.vocabulary(checkpoint, _VOCABULARY)
        _check_size(checkpoint, vocabulary)
        ids = {"pad": vocabulary.pad_id, "eos": vocabulary.eos_id}
        checkpoint = dataclasses.replace(checkpoint, token_ids={**checkpoint.token_ids, **ids})
    model = native.model(checkpoint)
    config: Any = checkpoint.config
    model = dataclasses.replace(
        model, config=dataclasses.replace(config, **changes), peft=_methods(peft, additions)
    )
    return checkpoint, model, vocabulary


def _check_size(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    size = checkpoint.config.vocab_size
    if vocabulary.vocab_size > size:
        raise UserError(
            f"The vocabulary has {vocabulary.vocab_size} tokens, the model in "
            f"'{checkpoint.source}' {size}; give its own vocabulary or, to add tokens "
            f"to the model, load(..., config={{'vocab_size': {vocabulary.vocab_size}}})."
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
