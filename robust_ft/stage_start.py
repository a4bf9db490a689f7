"""How a stage starts: its parameters restored, fresh ones drawn, its teacher loaded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from robust_ft import loading, trainable
from robust_ft.checkpoints_io import native, sources
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives import Teacher
from robust_ft.outcome import Outcome
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import fit_to_model, load_for_model
from robust_ft.stage import PRETRAINED, SCRATCH, STAGE, Stage, stage_key
from robust_ft.types import Params


def restore(recipe: Recipe, stage: Stage, handed_on: Params | None = None) -> Params:
    """Returns all parameters at a stage's start, placed on the mesh.

    In this order: 1. what the source holds: a checkpoint's parameters, or an earlier stage's, that
    is its own start with what it trained in place; 2. fresh values for the model's other
    parameters, those of PEFT methods possibly depending on what was restored.

    Args:
        recipe: The recipe that the stage belongs to; its earlier stages have finished.
        stage: The stage.
        handed_on: The earlier stage's parameters if they are in memory still.
    """
    if stage.restore == SCRATCH:
        return place(recipe, stage, {})
    if not stage.restore.startswith(STAGE):
        return place(recipe, stage, load_for_model(stage.model, stage.restore))
    earlier = recipe.stage(stage.restore.removeprefix(STAGE))
    configs: list[Any] = [stage.model.config, earlier.model.config]
    dtype, before = (config.param_dtype for config in configs)
    if handed_on is None or before != dtype:
        # What did not train comes from where the earlier stage had it, not rounded by its type.
        handed_on = _finished(
            recipe, dataclasses.replace(earlier, model=_kept_in(dtype, earlier.model))
        )
    known = fit_to_model(
        stage.model.shapes(),
        trainable.flatten(handed_on),
        stage.restore,
        # PEFT methods come and go between stages, but none changes.
        may_lack=lambda p: stage.model.peft_owns(p) and not earlier.model.peft_owns(p),
        may_drop=lambda p: earlier.model.peft_owns(p) and not stage.model.peft_owns(p),
    )
    return place(recipe, stage, known)


def finished(recipe: Recipe, name: str) -> Params:
    """Returns all parameters that a finished stage ended with: its start and what it trained."""
    return _finished(recipe, recipe.stage(name))


def _finished(recipe: Recipe, stage: Stage) -> Params:
    directory = Path(recipe.model_dir) / stage.name
    outcome = Outcome.read(directory)
    if outcome is None:
        raise UserError(f"Stage '{stage.name}' has not finished in {recipe.model_dir}.")
    _, frozen = trainable.split(restore(recipe, stage), frozenset(outcome.paths))
    return trainable.merge(outcome.load(directory), frozen)


def predictor(recipe: Recipe, name: str) -> Predictor:
    """Returns a predictor with what a finished stage ended with."""
    stage = recipe.stage(name)
    params = finished(recipe, name)
    return Predictor(stage.model, params, stage.data.vocabulary, recipe.partitioner)


def teacher(recipe: Recipe, stage: Stage) -> Teacher | None:
    """Returns a stage's teacher with all parameters on the mesh, or None if it needs none.

    Nothing is shared with the student, although both often start from one model: the student's
    parameters change with the first step, which donates their arrays, and the teacher's are kept
    in another type.

    Args:
        recipe: The recipe that the stage belongs to; its earlier stages have finished.
        stage: The stage.
    """
    if stage.teacher is None or not stage.objective.needs_teacher:
        return None
    if stage.teacher == PRETRAINED:
        model, params = _pretrained(recipe, stage)
    elif stage.teacher.startswith(STAGE):
        exported = predictor(recipe, stage.teacher.removeprefix(STAGE))
        model, params = exported.model, exported.params
    else:
        directory, *more = sources.split(stage.teacher)
        loaded = loading.load(
            directory,
            vocabulary=stage.data.vocabulary,
            weights=",".join(more) or None,
            partitioner=recipe.partitioner,
        )
        model, params = loaded.model, loaded.params
    model = _kept_in(stage.teacher_dtype, model)
    return Teacher(model, jax.tree.map(lambda x, as_: x.astype(as_.dtype), params, model.shapes()))


def _pretrained(recipe: Recipe, stage: Stage) -> tuple[Model, Params]:
    """Returns the model that the stages up to this one began with, without PEFT methods."""
    first = _first(recipe, stage)
    if first.restore != SCRATCH:  # values that are drawn depend on the type, values read do not
        first = dataclasses.replace(first, model=_kept_in(stage.teacher_dtype, first.model))
    # The checkpoint may hold PEFT parameters too, and they take part when values are drawn.
    params = restore(recipe, first)
    owned = filter(first.model.peft_owns, trainable.flatten(params))
    _, params = trainable.split(params, frozenset(owned))
    return first.model.without_peft(), params


def _first(recipe: Recipe, stage: Stage) -> Stage:
    """Returns the stage that read, or drew, the parameters that this one goes on from."""
    while stage.restore.startswith(STAGE):
        stage = recipe.stage(stage.restore.removeprefix(STAGE))
    return stage


def teacher_model(recipe: Recipe, stage: Stage) -> Model | None:
    """Returns the model of a stage's teacher, whose shapes and types are those of its parameters.

    Raises:
        UserError: The teacher is a directory, and there is none or it is broken.
    """
    if stage.teacher is None:
        return None
    if stage.teacher == PRETRAINED:
        model = _first(recipe, stage).model.without_peft()
    elif stage.teacher.startswith(STAGE):
        model = recipe.stage(stage.teacher.removeprefix(STAGE)).model
    else:
        directory, *more = sources.split(stage.teacher)
        found = [sources.adapter(path) for path in more]
        methods = [method for each in found if each is not None for method in each.methods]
        model = dataclasses.replace(native.model(sources.read(directory)), peft=tuple(methods))
    return _kept_in(stage.teacher_dtype, model.exported())


def _kept_in(dtype: str, model: Model) -> Model:
    config: Any = model.config
    return dataclasses.replace(model, config=dataclasses.replace(config, param_dtype=dtype))


def origin(recipe: Recipe, stage: Stage) -> str:
    """Returns where the base of a stage's model comes from, before any PEFT method.

    That is a checkpoint's path, "scratch", or the earlier stage that trained some of it last.
    """
    if not stage.restore.startswith(STAGE):
        parts = sources.split(stage.restore)
        return ",".join(part for part in parts if not sources.is_addition(part))
    earlier = recipe.stage(stage.restore.removeprefix(STAGE))
    trained = earlier.trainable_paths()
    if all(map(earlier.model.peft_owns, trained)):
        return origin(recipe, earlier)
    return f"{Path(recipe.model_dir) / earlier.name}"


def place(recipe: Recipe, stage: Stage, known: Mapping[str, Any]) -> Params:
    """Places those known parameters that the stage's model has, and draws its other ones.

    Args:
        recipe: Gives the mesh and the seed.
        stage: The stage.
        known: Values by parameter path.
    """
    init_rng = stage_key(recipe.seed, stage.name, "init")
    peft_rng = stage_key(recipe.seed, stage.name, "peft")
    return loading.place(stage.model, recipe.partitioner, known, init_rng, peft_rng)
