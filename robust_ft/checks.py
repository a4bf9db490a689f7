"""Checks a recipe before training starts."""

import math

from robust_ft import few_shot_tasks, initial_checkpoint, stage_anchor
from robust_ft.data import cache, meta_batches
from robust_ft.ensembles.selection import check_vocabularies
from robust_ft.ensembles.weight_interpolation import InterpolationSelection
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation, of_tasks
from robust_ft.few_shot import FewShot
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.stage import SCRATCH, STAGE, Stage
from robust_ft.stage_start import teacher_model
from robust_ft.trainable import flatten
from robust_ft.vocabulary.base import same_vocabulary


def check(recipe: Recipe) -> None:
    """Checks all stages against their models and the mesh.

    Raises:
        UserError: Patterns, tasks, batches, lengths or the teacher do not fit a stage's model or
            the mesh, or the stages of a selection have different vocabularies; or few-shot
            evaluation does not fit its model.
    """
    for stage in recipe.stages:
        _check_start(stage)
        _check_tasks(stage)
        _check_replay(stage)
        _check_mesh(recipe, stage)
        _check_lengths(stage)
        _check_teacher(recipe, stage)
        stage_anchor.check(stage)
    for selection in recipe.selections:
        stages = {stage.name: stage for stage in recipe.stages}
        check_vocabularies(selection, stages)
        if isinstance(selection, InterpolationSelection):
            selection.check(stages)
    if recipe.few_shot is not None:
        _check_few_shot(recipe, recipe.few_shot)


def check_examples(recipe: Recipe) -> None:
    """Checks the examples of meta-batches and few-shot evaluation; builds missing caches.

    Raises:
        UserError: A task has too few, or its answers cannot be ranked.
    """
    for stage in recipe.stages:
        if isinstance(stage.gradient, MetaLearning):
            tasks = cache.ensure(stage.data)
            meta_batches.check_sizes(tasks, stage.batch_size, stage.gradient.batches)
    if recipe.few_shot is not None:
        few_shot_tasks.check(recipe.few_shot, recipe.seed)


def untuned(recipe: Recipe) -> str | None:
    """Returns a sentence if a model is larger than those that the hyperparameters are for."""
    if recipe.tuned_up_to is None:
        return None
    sizes = {
        stage.name: sum(math.prod(leaf.shape) for leaf in flatten(stage.model.shapes()).values())
        for stage in recipe.parts
    }
    name = max(sizes, key=lambda name: sizes[name])
    if sizes[name] <= recipe.tuned_up_to:
        return None
    return (
        f"These hyperparameters are for models of up to {recipe.tuned_up_to:,} parameters, and "
        f"stage '{name}' has one of {sizes[name]:,}: add --gin_file=gin_configs/scale/base.gin "
        "(base_t5.gin for a T5), or set Recipe.tuned_up_to=None if they are your own."
    )


def _check_start(stage: Stage | FewShot) -> None:
    stage.model.check()
    if stage.restore != SCRATCH and not stage.restore.startswith(STAGE):
        initial_checkpoint.check(stage.model, stage.restore)
    stage.trainable_paths()


def _check_few_shot(recipe: Recipe, few_shot: FewShot) -> None:
    _check_start(few_shot)
    if few_shot.restore.startswith(STAGE):
        held = flatten(recipe.stage(few_shot.restore.removeprefix(STAGE)).model.shapes())
        few_shot.check_zero_shot(flatten(few_shot.model.shapes()).keys() - held.keys())
    _check_parameters(recipe, few_shot.model)
    model, bare = few_shot.model, few_shot.model.without(*few_shot.zero_shot_without)
    recipe.partitioner.check_batch("FewShot.examples", few_shot.examples, "Recipe.few_shot")
    model.check_lengths(few_shot.data.inputs_length, few_shot.data.targets_length)
    for evaluation in few_shot.evaluations:
        data, owner = evaluation.data, f"the evaluation on '{evaluation.task}'"
        recipe.partitioner.check_batch("Evaluation.batch_size", evaluation.batch_size, owner)
        for each in (model, bare):
            each.check_lengths(data.inputs_length, data.targets_length)
        if not same_vocabulary(data.vocabulary, few_shot.data.vocabulary):
            raise UserError(
                f"The evaluation on '{evaluation.task}' in FewShot.evaluations has another "
                "vocabulary than FewShot.data; a model has one, so give both the same."
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


def _check_replay(stage: Stage) -> None:
    if stage.replay is None:
        return
    if not same_vocabulary(stage.replay.data.vocabulary, stage.data.vocabulary):
        raise UserError(
            f"Replay.data of stage '{stage.name}' has another vocabulary than Stage.data; a model "
            "has one, so give both the same."
        )
    prompts = [p for p in stage.model.peft if type(p).embed is not Peft.embed]
    trained = stage.trainable_paths()
    if stage.prompts_are_left_out and all(any(p.owns(x) for p in prompts) for x in trained):
        raise UserError(
            f"Stage.replay of stage '{stage.name}' teaches it nothing: only soft prompts train, "
            "which Replay.prompts=False leaves out of replayed rows; set Stage.replay=None."
        )


def _check_packing(stage: Stage, model: Model) -> None:
    prompts = [p.name for p in model.peft if type(p).embed is not Peft.embed]
    if stage.packing and prompts:
        raise UserError(
            f"Stage '{stage.name}' packs examples, but a soft prompt ('{prompts[0]}') needs a row "
            "for each example; set Stage.packing=False."
        )


def _check_mesh(recipe: Recipe, stage: Stage) -> None:
    partitioner = recipe.partitioner
    for evaluation in _evaluations(stage):
        owner = f"the evaluation on '{evaluation.task}'"
        partitioner.check_batch("Evaluation.batch_size", evaluation.batch_size, owner)
    if isinstance(stage.gradient, MetaLearning):
        _check_meta_batch(partitioner, stage)
    else:
        owner, rows = f"stage '{stage.name}'", stage.batch_size
        partitioner.check_batch("Stage.batch_size", rows, owner, stage.microbatches)
    _check_parameters(recipe, stage.model)


def _check_parameters(recipe: Recipe, model: Model) -> None:
    partitioner, config = recipe.partitioner, model.config
    if partitioner.mesh.size == 1:
        return
    # The shapes of parameters tell only heads times head_dim.
    for field in ("num_heads", "num_kv_heads"):
        if (heads := getattr(config, field, None)) is not None:
            partitioner.check_sizes(f"{type(config).__name__}.{field}", ("heads",), (heads,))
    axes = flatten(model.logical_axes())
    for path, leaf in flatten(model.shapes()).items():
        partitioner.check_sizes(f"Parameter '{path}'", axes[path], leaf.shape)


def _check_meta_batch(partitioner: Partitioner, stage: Stage) -> None:
    """Checks the rows of a task's batches, which devices split; its tasks they share."""
    rows, shards = stage.batch_size, partitioner.batch_shards
    if rows % shards == 0:
        return
    below = rows // shards * shards
    near = f"{below} or {below + shards}" if below else f"{shards}"
    fitting = math.gcd(rows, shards)
    parallel = partitioner.model_parallel * shards // fitting
    raise UserError(
        f"Stage.batch_size={rows} of stage '{stage.name}', the rows of one task's batch, does not "
        f"divide over the {shards} devices that split it (a {type(stage.gradient).__name__} takes "
        f"all of them to the same tasks): choose {near}, or let Partitioner.model_parallel="
        f"{parallel} leave {fitting} of them."
    )


def _check_lengths(stage: Stage) -> None:
    used = {(stage.model, stage.rows.inputs_length, stage.rows.targets_length)}
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
    model.check_lengths(stage.rows.inputs_length, stage.rows.targets_length)
