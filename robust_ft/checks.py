"""Checks a recipe before training starts, and claims its MODEL_DIR."""

import math
from pathlib import Path

from robust_ft import initial_checkpoint, multihost
from robust_ft.ensembles.selection import check_vocabularies
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation, of_tasks
from robust_ft.evaluator import TARGET
from robust_ft.files import read_json, write_json
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.recipe import Recipe
from robust_ft.stage import SCRATCH, STAGE, Stage
from robust_ft.stage_start import teacher_model
from robust_ft.trainable import flatten
from robust_ft.vocabulary.base import same_vocabulary


def claim(recipe: Recipe) -> None:
    """Checks the recipe, then creates its MODEL_DIR with `run.json`, or checks the one there is.

    Raises:
        UserError: The recipe has a mistake (see `check`), or MODEL_DIR belongs to another recipe or
            seed, or cannot be written. Nothing in it has been changed.
    """
    check(recipe)
    file = Path(recipe.model_dir) / "run.json"
    evaluations = of_tasks(recipe.stages[-1].final_evaluations)
    targets = [e.data.task for e in evaluations if e.role == TARGET]
    facts = {
        "name": recipe.name,
        "seed": recipe.seed,
        "target": targets[0] if targets else None,
        "stages": [stage.name for stage in recipe.stages],
        "selections": [selection.name for selection in recipe.selections],
    }
    try:
        owner = read_json(file, default=facts)
        for field in ("name", "seed"):
            if owner.get(field) != facts[field]:
                raise UserError(
                    f"Recipe.model_dir={recipe.model_dir} belongs to a run with {field} "
                    f"{owner.get(field)!r}, not {facts[field]!r}; choose another."
                )
        if multihost.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, facts)
        multihost.barrier()
        if not file.exists():
            raise UserError(
                f"Recipe.model_dir={recipe.model_dir} is not one folder for all processes; put it "
                "on a file system that they share."
            )
    except OSError as error:
        raise UserError(
            f"Recipe.model_dir={recipe.model_dir} cannot be written: {error.strerror}."
        ) from None


def check(recipe: Recipe) -> None:
    """Checks all stages against their models and the mesh.

    Raises:
        UserError: Patterns, tasks, batches, lengths or the teacher do not fit a stage's model or
            the mesh, or the stages of a selection have different vocabularies.
    """
    for stage in recipe.stages:
        stage.model.check()
        if stage.restore != SCRATCH and not stage.restore.startswith(STAGE):
            initial_checkpoint.check(stage.model, stage.restore)
        stage.trainable_paths()
        _check_tasks(stage)
        _check_mesh(recipe, stage)
        _check_lengths(stage)
        _check_teacher(recipe, stage)
    for selection in recipe.selections:
        check_vocabularies(selection, {stage.name: stage for stage in recipe.stages})


def untuned(recipe: Recipe) -> str | None:
    """Returns a sentence if a model is larger than those that the hyperparameters are for."""
    if recipe.tuned_up_to is None:
        return None
    sizes = {
        stage.name: sum(math.prod(leaf.shape) for leaf in flatten(stage.model.shapes()).values())
        for stage in recipe.stages
    }
    name = max(sizes, key=lambda name: sizes[name])
    if sizes[name] <= recipe.tuned_up_to:
        return None
    return (
        f"These hyperparameters are for models of up to {recipe.tuned_up_to:,} parameters, and "
        f"stage '{name}' has one of {sizes[name]:,}: add --gin_file=gin_configs/scale/base.gin "
        "(base_t5.gin for a T5), or set Recipe.tuned_up_to=None if they are your own."
    )


def _evaluations(stage: Stage) -> list[Evaluation]:
    return of_tasks((*stage.evaluations, *stage.final_evaluations))


def _check_tasks(stage: Stage) -> None:
    for evaluation in _evaluations(stage):
        model = stage.model.without(*evaluation.detached(stage.model))
        if model.tasks:
            model.task_index(evaluation.task)
        if not same_vocabulary(evaluation.data.vocabulary, stage.data.vocabulary):
            raise UserError(
                f"The evaluation on '{evaluation.task}' of stage '{stage.name}' has another "
                "vocabulary than Stage.data; a model has one, so give both the same."
            )
    _check_packing(stage, stage.model)


def _check_packing(stage: Stage, model: Model) -> None:
    prompts = [p.name for p in model.peft if type(p).embed is not Peft.embed]
    if stage.packing and prompts:
        raise UserError(
            f"Stage '{stage.name}' packs examples, but a soft prompt ('{prompts[0]}') needs a row "
            "for each example; set Stage.packing=False."
        )


def _check_mesh(recipe: Recipe, stage: Stage) -> None:
    partitioner, config = recipe.partitioner, stage.model.config
    for evaluation in _evaluations(stage):
        owner = f"the evaluation on '{evaluation.task}'"
        partitioner.check_batch("Evaluation.batch_size", evaluation.batch_size, owner)
    owner = f"stage '{stage.name}'"
    partitioner.check_batch("Stage.batch_size", stage.batch_size, owner, stage.microbatches)
    if partitioner.mesh.size == 1:
        return
    # The shapes of parameters tell only heads times head_dim.
    for field in ("num_heads", "num_kv_heads"):
        if (heads := getattr(config, field, None)) is not None:
            partitioner.check_sizes(f"{type(config).__name__}.{field}", ("heads",), (heads,))
    axes = flatten(stage.model.logical_axes())
    for path, leaf in flatten(stage.model.shapes()).items():
        partitioner.check_sizes(f"Parameter '{path}'", axes[path], leaf.shape)


def _check_lengths(stage: Stage) -> None:
    used = {(stage.model, stage.data.inputs_length, stage.data.targets_length)}
    for evaluation in _evaluations(stage):
        model = stage.model.without(*evaluation.detached(stage.model))
        used.add((model, evaluation.data.inputs_length, evaluation.decoder.max_decode_len))
    for model, inputs, targets in used:
        model.check_lengths(inputs, targets)


def _check_teacher(recipe: Recipe, stage: Stage) -> None:
    model = teacher_model(recipe, stage)
    if model is None:
        return
    teacher = f"The teacher '{stage.teacher}' of stage '{stage.name}'"
    sizes = model.config.vocab_size, stage.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{teacher} has {sizes[0]} tokens and its student {sizes[1]}; choose a teacher with "
            "the student's vocabulary."
        )
    if model.tasks and model.tasks != stage.model.tasks:
        raise UserError(
            f"{teacher} has prompts for the tasks {', '.join(model.tasks)}, but its student has "
            "not; choose a teacher with one prompt for all."
        )
    _check_packing(stage, model)
    model.check_lengths(stage.data.inputs_length, stage.data.targets_length)
