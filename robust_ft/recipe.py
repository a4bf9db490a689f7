"""Recipes: stages one after the other, each starting where an earlier one ended."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from robust_ft import console, model_info, multihost, pretrained, trainable
from robust_ft.checkpoint import Outcome, read_onto, restore_onto, write_json
from robust_ft.checkpoints_io import native, sources
from robust_ft.choices import STAGE, CocktailChoice, EnsembleChoice, check_vocabularies
from robust_ft.errors import UserError, nearest
from robust_ft.evaluate import TARGET
from robust_ft.mixture_weight import FILE as CHOICE
from robust_ft.mixture_weight import Choice
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.objectives import Cocktail, Teacher
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import BasePredictor, Predictor
from robust_ft.summary import Summary
from robust_ft.trainer import Run, Stage, fit, stage_key
from robust_ft.types import Params

SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A finetuning method as data.

    Attributes:
        name: What the report calls the run.
        model_dir: Where everything is written.
        stages: Run in this order.
        seed: All randomness comes from it.
        partitioner: The mesh and the rules that place arrays on it.
        choices: Made when all stages have finished: of the weight of an ensemble of their models,
            or among students that were trained with different weights. The last one is what the
            recipe ends with.
        compile_effort: Of the compiler, from -1, for models of so many layers that it would take
            an hour, to 1; JAX's exec_time_optimization_effort.
    """

    name: str
    model_dir: str
    stages: tuple[Stage, ...]
    seed: int = 0
    partitioner: Partitioner = Partitioner()
    choices: tuple[EnsembleChoice | CocktailChoice, ...] = ()
    compile_effort: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "choices", tuple(self.choices))
        if not -1 <= self.compile_effort <= 1:
            raise UserError(f"Recipe.compile_effort={self.compile_effort} must be from -1 to 1.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or not names:
            raise UserError(f"Recipe.stages needs stages with different names, not {names}.")
        self._check_choices(names)
        for i, stage in enumerate(self.stages):
            for verb, source in (
                ("restores from", stage.restore),
                ("has the teacher", stage.teacher or ""),
            ):
                name = source.removeprefix(STAGE)
                if source.startswith(STAGE) and name not in names[:i]:
                    raise UserError(
                        f"Stage '{stage.name}' {verb} '{source}', but the stages before it are "
                        f"{names[:i]}." + nearest(name, names[:i])
                    )

    def _check_choices(self, names: list[str]) -> None:
        taken = list(names)
        for choice in self.choices:
            if choice.name in taken:
                raise UserError(f"Recipe.choices: the name '{choice.name}' is taken: {taken}.")
            taken.append(choice.name)
            for name in choice.stages:
                if name not in names:
                    raise UserError(
                        f"Recipe.choices: '{choice.name}' needs a stage '{name}', but there are "
                        f"{names}." + nearest(name, names)
                    )

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def run(recipe: Recipe) -> Summary:
    """Runs all stages; finished ones are skipped, an unfinished one resumes exactly.

    Returns:
        All evaluation results, also written to `summary.json`.

    Raises:
        Stopped: SIGTERM arrived; the stage has saved a checkpoint and a new call resumes it.
    """
    claim(recipe)
    directory = Path(recipe.model_dir)
    main = multihost.is_first()
    summary = Summary(directory, enabled=main)
    params: Params | None = None
    with multihost.stop_on_sigterm() as stop, recipe.partitioner.activate():
        for i, stage in enumerate(recipe.stages):
            outcome = Outcome.read(directory / stage.name)
            if outcome is not None:
                _check_finished(recipe, stage, outcome)
                console.print_line(
                    f"[{stage.name}] finished before; step {outcome.step} was selected."
                )
                params = None
                continue
            # The stage before hands its parameters on without a detour over files.
            follows = i > 0 and stage.restore == STAGE + recipe.stages[i - 1].name
            params = params if follows else None
            # First, as for a moment it is there in two types.
            tutor = teacher(recipe, stage)
            params = restore(recipe, stage, params)
            if main:
                _write_model_info(stage, params, directory / stage.name)
            shared = Run(
                directory,
                recipe.partitioner,
                recipe.seed,
                summary,
                stop,
                baseline=i == 0,
                origin=origin(recipe, stage),
                teacher=tutor,
            )
            params = fit(stage, params, shared)
        params = None  # members of an ensemble need the room
        for choice in recipe.choices:
            _choose(recipe, choice, summary)
    return summary


def _choose(recipe: Recipe, choice: EnsembleChoice | CocktailChoice, summary: Summary) -> None:
    directory = Path(recipe.model_dir)
    made = Choice.read(directory / choice.name)
    if made is None:
        made = choice.run(directory, summary, functools.partial(predictor, recipe))
        if jax.process_index() == 0:
            (directory / choice.name).mkdir(exist_ok=True)
            write_json(directory / choice.name / CHOICE, dataclasses.asdict(made))
    elif [candidate.weight for candidate in made.candidates] != list(choice.weights):
        raise UserError(
            f"'{choice.name}' was chosen among other weights in {recipe.model_dir}; choose another "
            "MODEL_DIR, or delete its folder there to choose again."
        )
    console.print_line(
        f"[{choice.name}] lambda {made.weight:g} was chosen; its validation score is "
        f"{made.chosen.score:.1f}."
    )


def predictor(recipe: Recipe, name: str) -> Predictor:
    """Returns a predictor with what a finished stage ended with."""
    stage = recipe.stage(name)
    params = finished(recipe, name)
    return Predictor(stage.model, params, stage.data.vocabulary, recipe.partitioner)


def final_predictor(recipe: Recipe) -> BasePredictor:
    """Returns what a finished recipe ends with: its last choice, or the model of its last stage."""
    if not recipe.choices:
        return predictor(recipe, recipe.stages[-1].name)
    choice = recipe.choices[-1]
    made = Choice.read(Path(recipe.model_dir) / choice.name)
    if made is None:
        raise UserError(f"'{choice.name}' has not been chosen yet in {recipe.model_dir}.")
    return choice.predictor(made, functools.partial(predictor, recipe))


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
        return place(recipe, stage, read_onto(stage.model, stage.restore))
    earlier = recipe.stage(stage.restore.removeprefix(STAGE))
    configs: list[Any] = [stage.model.config, earlier.model.config]
    dtype, before = (config.param_dtype for config in configs)
    if handed_on is None or before != dtype:
        # What did not train comes from where the earlier stage had it, not rounded by its type.
        handed_on = _finished(
            recipe, dataclasses.replace(earlier, model=_kept_in(dtype, earlier.model))
        )
    known = restore_onto(
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


def teacher(recipe: Recipe, stage: Stage) -> Teacher | None:
    """Returns whom a stage's model learns from, with all parameters on the mesh; None for nobody.

    Nothing is shared with the student, although both often start from one model: the student's
    parameters change with the first step, which donates their arrays, and the teacher's are kept
    in another type.

    Args:
        recipe: The recipe that the stage belongs to; its earlier stages have finished.
        stage: The stage.
    """
    objective = stage.objective
    if stage.teacher is None or not (isinstance(objective, Cocktail) and objective.teacher_weight):
        return None
    vocabulary, partitioner = stage.data.vocabulary, recipe.partitioner
    if stage.teacher.startswith(STAGE):
        known = predictor(recipe, stage.teacher.removeprefix(STAGE))
    else:
        directory, *more = sources.split(stage.teacher)
        known = pretrained.load(
            directory,
            vocabulary=vocabulary,
            weights=",".join(more) or None,
            partitioner=partitioner,
        )
    model = _kept_in(stage.teacher_dtype, known.model)
    types = model.shapes()
    return Teacher(model, jax.tree.map(lambda x, as_: x.astype(as_.dtype), known.params, types))


def teacher_model(recipe: Recipe, stage: Stage) -> Model | None:
    """Returns the model of a stage's teacher, whose shapes and types are those of its parameters.

    Raises:
        UserError: The teacher is a directory, and there is none or it is broken.
    """
    if stage.teacher is None:
        return None
    if stage.teacher.startswith(STAGE):
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
    trained = trainable.trainable_paths(earlier.model.shapes(), earlier.trainable)
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
    return pretrained.place(stage.model, recipe.partitioner, known, init_rng, peft_rng)


def claim(recipe: Recipe) -> None:
    """Checks the recipe, then makes MODEL_DIR its own: creates it and writes `run.json`.

    Raises:
        UserError: A stage's patterns or batches do not fit its model or the mesh, or MODEL_DIR is
            another recipe's, or one with another seed, or it cannot be written. Nothing in it has
            been changed.
    """
    check(recipe)
    file = Path(recipe.model_dir) / "run.json"
    targets = [e.data.task for e in recipe.stages[-1].final_evaluations if e.role == TARGET]
    facts = {
        "name": recipe.name,
        "seed": recipe.seed,
        "target": targets[0] if targets else None,
        "stages": [stage.name for stage in recipe.stages],
        "choices": [choice.name for choice in recipe.choices],
    }
    try:
        owner = json.loads(file.read_text(encoding="utf-8")) if file.exists() else facts
        for field in ("name", "seed"):
            if owner.get(field) != facts[field]:
                raise UserError(
                    f"MODEL_DIR={recipe.model_dir} belongs to a run with {field} "
                    f"{owner.get(field)!r}, not {facts[field]!r}; choose another MODEL_DIR."
                )
        if multihost.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, facts)
        multihost.barrier()
        if not file.exists():
            raise UserError(
                f"MODEL_DIR={recipe.model_dir} is not one folder for all processes; put it on a "
                "file system that they share."
            )
    except OSError as error:
        raise UserError(
            f"MODEL_DIR={recipe.model_dir} cannot be written: {error.strerror}."
        ) from None


def check(recipe: Recipe) -> None:
    """Checks all stages against their models and the mesh: now, not after hours of training.

    Raises:
        UserError: A stage's patterns, tasks, batches, lengths or teacher do not fit, or the
            vocabularies of a choice's stages do not.
    """
    for stage in recipe.stages:
        stage.model.check()
        trainable.trainable_paths(stage.model.shapes(), stage.trainable)
        _check_tasks(stage)
        _check_mesh(recipe, stage)
        _check_lengths(stage)
        _check_teacher(recipe, stage)
    for choice in recipe.choices:
        check_vocabularies(choice, {stage.name: stage for stage in recipe.stages})


def _check_finished(recipe: Recipe, stage: Stage, outcome: Outcome) -> None:
    if outcome.steps != stage.steps:
        raise UserError(
            f"Stage '{stage.name}' has finished in {recipe.model_dir} after {outcome.steps} steps, "
            f"not {stage.steps}; choose another MODEL_DIR, or delete the stage's folder and those "
            "of the stages behind it to train them again."
        )


def _check_tasks(stage: Stage) -> None:
    for evaluation in (*stage.evaluations, *stage.final_evaluations):
        model = stage.model.without(*evaluation.detached(stage.model))
        if model.tasks:
            model.task_index(evaluation.task)
    _check_packing(stage, stage.model)


def _check_packing(stage: Stage, model: Model) -> None:
    prompts = [p.name for p in model.peft if type(p).embed is not Peft.embed]
    if stage.packing and prompts:
        raise UserError(
            f"Stage '{stage.name}' packs examples, but a soft prompt ('{prompts[0]}') needs a row "
            "for each example; set PACKING = False (Stage.packing)."
        )


def _check_mesh(recipe: Recipe, stage: Stage) -> None:
    partitioner, config = recipe.partitioner, stage.model.config
    for evaluation in (*stage.evaluations, *stage.final_evaluations):
        partitioner.check_batch(evaluation.batch_size, f"the evaluation on '{evaluation.task}'")
    partitioner.check_batch(stage.batch_size, f"stage '{stage.name}'", stage.microbatches)
    if partitioner.mesh.size == 1:
        return
    # Of heads, parameters know only the product with their size.
    for field in ("num_heads", "num_kv_heads"):
        if (heads := getattr(config, field, None)) is not None:
            partitioner.check_sizes(f"{type(config).__name__}.{field}", ("heads",), (heads,))
    axes = trainable.flatten(stage.model.logical_axes())
    for path, leaf in trainable.flatten(stage.model.shapes()).items():
        partitioner.check_sizes(f"Parameter '{path}'", axes[path], leaf.shape)


def _check_lengths(stage: Stage) -> None:
    used = {(stage.model, stage.data.inputs_length, stage.data.targets_length)}
    for evaluation in (*stage.evaluations, *stage.final_evaluations):
        model = stage.model.without(*evaluation.detached(stage.model))
        used.add((model, evaluation.data.inputs_length, evaluation.decoder.max_decode_len))
    for model, inputs, targets in used:
        model.check_lengths(inputs, targets)


def _check_teacher(recipe: Recipe, stage: Stage) -> None:
    model = teacher_model(recipe, stage)
    if model is None:
        return
    who = f"The teacher '{stage.teacher}' of stage '{stage.name}'"
    sizes = model.config.vocab_size, stage.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{who} knows {sizes[0]} tokens and its student {sizes[1]}; choose a teacher with the "
            "student's vocabulary."
        )
    if model.tasks and model.tasks != stage.model.tasks:
        raise UserError(
            f"{who} has prompts for the tasks {', '.join(model.tasks)}, but its student has not; "
            "choose a teacher with one prompt for all."
        )
    _check_packing(stage, model)
    model.check_lengths(stage.data.inputs_length, stage.data.targets_length)


def _write_model_info(stage: Stage, params: Params, directory: Path) -> None:
    paths = trainable.trainable_paths(params, stage.trainable)
    methods = stage.model.peft
    console.print_line(f"[{stage.name}] parameters:")
    console.print_line(model_info.report(params, paths, methods, compact=True))
    directory.mkdir(parents=True, exist_ok=True)
    info = model_info.report(params, paths, methods) + "\n"
    (directory / "model-info.txt").write_text(info, encoding="utf-8")
