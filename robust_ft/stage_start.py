"""How a stage starts: parameters are restored or initialized, and the teacher is loaded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from robust_ft import initial_checkpoint, loading, multihost, trainable
from robust_ft.checkpoints_io import native, sources
from robust_ft.errors import UserError
from robust_ft.few_shot import FewShot
from robust_ft.files import as_path
from robust_ft.models.model import Model
from robust_ft.objectives import Teacher
from robust_ft.outcome import Outcome
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import fit_to_model, load_for_model, load_params, place_params
from robust_ft.stage import PRETRAINED, SCRATCH, STAGE, Stage, stage_key
from robust_ft.stage_checkpoints import checkpoint_folder
from robust_ft.types import Params


def restore(recipe: Recipe, stage: Stage | FewShot, in_memory: Params | None = None) -> Params:
    """Returns all parameters at a stage's start, placed on the mesh.

    The model's parameters that are not `restored` are initialized; those of PEFT methods may depend
    on the restored ones.

    Args:
        recipe: The recipe that the stage belongs to; its earlier stages have finished.
        stage: The stage.
        in_memory: The earlier stage's final parameters, if they are in memory still.
    """
    return place(recipe, stage, restored(recipe, stage, in_memory))


def restored(
    recipe: Recipe, stage: Stage | FewShot, in_memory: Params | None = None
) -> dict[str, Any]:
    """Returns what `Stage.restore` names, by path: a checkpoint's, or an earlier stage's.

    Args:
        recipe: As in `restore`.
        stage: The stage.
        in_memory: As in `restore`.
    """
    if stage.restore == SCRATCH:
        return {}
    if not stage.restore.startswith(STAGE):
        loaded = load_for_model(stage.model, stage.restore, stage.data.vocabulary)
        # A name on the hub has been downloaded by now.
        source = sources.existing(sources.split(stage.restore)[0])
        initial_checkpoint.check(stage.model, source)
        return loaded
    earlier = recipe.stage(stage.restore.removeprefix(STAGE))
    dtype = _param_dtype(stage.model)
    if in_memory is None or _param_dtype(earlier.model) != dtype:
        # Read from files in this stage's dtype: what the earlier stage kept in a narrower one, and
        # did not train, is not rounded.
        wider = dataclasses.replace(earlier, model=_with_param_dtype(earlier.model, dtype))
        in_memory = _finished(recipe, wider)
    return fit_to_model(
        stage.model.shapes(),
        trainable.flatten(in_memory),
        stage.restore,
        # A stage may add or drop PEFT methods, but not change the shape of one.
        may_lack=lambda p: stage.model.peft_owns(p) and not earlier.model.peft_owns(p),
        may_drop=lambda p: earlier.model.peft_owns(p) and not stage.model.peft_owns(p),
    )


def finished(recipe: Recipe, name: str) -> Params:
    """Returns the final parameters of a finished stage: those of its start and the trained ones."""
    return _finished(recipe, recipe.stage(name))


def _finished(recipe: Recipe, stage: Stage) -> Params:
    directory = as_path(recipe.model_dir) / stage.name
    outcome = Outcome.read(directory)
    if outcome is None:
        raise UserError(f"Stage '{stage.name}' has not finished in {recipe.model_dir}.")
    _, frozen = trainable.split(restore(recipe, stage), frozenset(outcome.paths))
    return trainable.merge(outcome.load(directory), frozen)


def at_step(recipe: Recipe, stage: Stage, start: Params, step: int) -> Params:
    """Returns all parameters at a step of which a stage has a checkpoint; at 0, its start.

    Args:
        recipe: The recipe that the stage belongs to.
        stage: The stage.
        start: All parameters at its start, on the mesh (`restore`).
        step: The step.
    """
    if step == 0:
        return start
    folder = checkpoint_folder(as_path(recipe.model_dir) / stage.name, step)
    shardings = trainable.flatten(recipe.partitioner.shardings(stage.model.logical_axes()))
    trained = {
        path: multihost.put(array, shardings[path])
        for path, array in load_params(str(folder)).items()
    }
    _, frozen = trainable.split(start, frozenset(trained))
    return trainable.merge(trainable.unflatten(trained), frozen)


def predictor(recipe: Recipe, name: str, at_start: bool = False) -> Predictor:
    """Returns a predictor with the final parameters of a finished stage, or those at its start."""
    stage = recipe.stage(name)
    params = restore(recipe, stage) if at_start else finished(recipe, name)
    return Predictor(stage.model, params, stage.data.vocabulary, recipe.partitioner)


def teacher(recipe: Recipe, stage: Stage) -> Teacher | None:
    """Returns a stage's teacher, its parameters on the mesh; None if it needs none.

    Parameters of the student that train are no teacher's, although both often start from one
    model: the first step donates them, and the teacher's have another dtype. What stays frozen is
    shared with the pretrained model and not loaded again, see `shared_with_teacher`.

    Args:
        recipe: The recipe that the stage belongs to; its earlier stages have finished.
        stage: The stage.
    """
    if stage.teacher is None or not stage.objective.needs_teacher:
        return None
    shared = shared_with_teacher(recipe, stage)
    model = teacher_model(recipe, stage)
    if model is not None and shared == trainable.flatten(model.shapes()).keys():
        return Teacher(model, {}, shared)
    if stage.teacher == PRETRAINED:
        source = pretrained(recipe, stage, stage.teacher_dtype)
    elif stage.teacher.startswith(STAGE):
        source = predictor(recipe, stage.teacher.removeprefix(STAGE))
    else:
        directory, *more = sources.split(stage.teacher)
        source = loading.load(
            directory,
            vocabulary=stage.data.vocabulary,
            weights=",".join(more) or None,
            partitioner=recipe.partitioner,
        )
    model = _with_param_dtype(source.model, stage.teacher_dtype)
    (_, own), (_, like) = (trainable.split(t, shared) for t in (source.params, model.shapes()))
    own = jax.tree.map(lambda x, like: x.astype(like.dtype), own, like)
    return Teacher(model, own, shared)


def shared_with_teacher(recipe: Recipe, stage: Stage) -> frozenset[str]:
    """Returns the paths of a teacher's parameters that are the stage's own, frozen ones.

    The pretrained model has the parameters that no stage has trained up to this one's end: with
    LoRA or a prompt all of them. They are kept in the student's dtype, unless that is narrower than
    `Stage.teacher_dtype`: then nothing is shared.

    Args:
        recipe: The recipe that the stage belongs to.
        stage: The stage.
    """
    if stage.teacher != PRETRAINED:
        return frozenset()
    if "bfloat16" == _param_dtype(stage.model) != stage.teacher_dtype:
        return frozenset()
    shared = frozenset(trainable.flatten(stage.model.without_peft().shapes()))
    shared -= stage.trainable_paths()
    while stage.restore.startswith(STAGE):
        stage = recipe.stage(stage.restore.removeprefix(STAGE))
        shared -= stage.trainable_paths()
    return shared


def pretrained(recipe: Recipe, stage: Stage, dtype: str | None = None) -> Predictor:
    """Returns the model that the stages up to this one started from, without PEFT methods.

    Args:
        recipe: The recipe that the stage belongs to.
        stage: The stage.
        dtype: The dtype of parameters that are read from a checkpoint; by default the model's.
    """
    first = _first(recipe, stage)
    if dtype is not None and first.restore != SCRATCH:  # initial values depend on the dtype
        first = dataclasses.replace(first, model=_with_param_dtype(first.model, dtype))
    # With all PEFT methods: the checkpoint may hold their parameters, and they change how the
    # others are initialized.
    params = restore(recipe, first)
    owned = frozenset(filter(first.model.peft_owns, trainable.flatten(params)))
    _, base = trainable.split(params, owned)
    bare = first.model.without_peft()
    return Predictor(bare, base, stage.data.vocabulary, recipe.partitioner)


def _first(recipe: Recipe, stage: Stage) -> Stage:
    """Returns the first of the stages that lead to this one: it restores no earlier stage."""
    while stage.restore.startswith(STAGE):
        stage = recipe.stage(stage.restore.removeprefix(STAGE))
    return stage


def teacher_model(recipe: Recipe, stage: Stage) -> Model | None:
    """Returns the model of a stage's teacher, in the dtype of its parameters; reads no weights.

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
        adapters = [sources.adapter(path) for path in more]
        methods = [method for each in adapters if each is not None for method in each.methods]
        model = dataclasses.replace(native.model(sources.read(directory)), peft=tuple(methods))
    return _with_param_dtype(model.exported(), stage.teacher_dtype)


def _param_dtype(model: Model) -> str:
    config: Any = model.config
    return str(config.param_dtype)


def _with_param_dtype(model: Model, dtype: str) -> Model:
    config: Any = model.config
    return dataclasses.replace(model, config=dataclasses.replace(config, param_dtype=dtype))


def origin(recipe: Recipe, stage: Stage) -> str:
    """Returns where the base parameters of a stage's model come from.

    That is a checkpoint's path, "scratch", or the folder of the last stage that trained some.
    """
    if not stage.restore.startswith(STAGE):
        parts = sources.split(stage.restore)
        return ",".join(part for part in parts if not sources.is_addition(part))
    earlier = recipe.stage(stage.restore.removeprefix(STAGE))
    trained = earlier.trainable_paths()
    if all(map(earlier.model.peft_owns, trained)):
        return origin(recipe, earlier)
    return f"{as_path(recipe.model_dir) / earlier.name}"


def place(recipe: Recipe, stage: Stage | FewShot, restored: Mapping[str, Any]) -> Params:
    """Places restored parameters on the mesh and initializes the stage's other parameters.

    Args:
        recipe: Gives the mesh and the seed.
        stage: The stage.
        restored: Arrays by parameter path.
    """
    init_rng = stage_key(recipe.seed, stage.name, "init")
    peft_rng = stage_key(recipe.seed, stage.name, "peft")
    return place_params(stage.model, recipe.partitioner, restored, init_rng, peft_rng)
