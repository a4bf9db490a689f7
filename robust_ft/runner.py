"""Runs a recipe: its stages, finished ones skipped, its selections, its few-shot evaluation."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from robust_ft import compiling, console, full_disk, model_info, multihost, overlap_file
from robust_ft.checkpoints_io import sources
from robust_ft.checkpoints_io.stage_record import StageRecord
from robust_ft.checks import untuned
from robust_ft.claiming import claim
from robust_ft.ensembles.mixture_weight import FILE as SELECTED
from robust_ft.ensembles.mixture_weight import SelectedWeight
from robust_ft.ensembles.selection import Selection, without_final_evaluations
from robust_ft.errors import UserError
from robust_ft.few_shot_run import run_few_shot
from robust_ft.files import as_path, write_json
from robust_ft.objectives import Teacher
from robust_ft.outcome import Outcome
from robust_ft.predictor import BasePredictor
from robust_ft.recipe import Recipe
from robust_ft.run_context import Callback, RunContext
from robust_ft.run_record import RunRecord
from robust_ft.stage import STAGE, Stage
from robust_ft.stage_start import origin, predictor, pretrained, restore, teacher
from robust_ft.summary import Summary
from robust_ft.trainer import fit, test
from robust_ft.types import Params


def run(
    recipe: Recipe, callbacks: Sequence[Callback] = (), allow_change: Sequence[str] = ()
) -> Summary:
    """Runs all stages; finished ones are skipped, an unfinished one resumes exactly.

    Selections and few-shot evaluation follow, of which what is there is not done again.

    ```python
    recipe = robust_ft.load_recipe("gin_configs/promot_rte.gin", MODEL_DIR="/tmp/run")
    summary = robust_ft.run(recipe)
    robust_ft.write_report([recipe.model_dir], recipe.model_dir)
    ```

    Compiled programs are kept on disk, see `compiling.use_cache`. Progress is printed;
    `robust_ft.console.configure(enabled=False)` silences it.

    Args:
        recipe: What to run.
        callbacks: Follow the training loop of each stage.
        allow_change: Fields that an unfinished run may go on with another value of, see
            `claiming.claim`.

    Returns:
        All evaluation results, also written to `summary.json`.

    Raises:
        UserError: The recipe does not fit together, or differs from what its MODEL_DIR was made
            with; nothing has been changed.
        Stopped: SIGTERM arrived; the stage has saved a checkpoint and a new call resumes it.
    """
    claim(recipe, allow_change)
    return run_claimed(recipe, callbacks)


def run_claimed(recipe: Recipe, callbacks: Sequence[Callback] = ()) -> Summary:
    """Runs the stages of a recipe whose MODEL_DIR is claimed already, as `run` does.

    For callers that write into MODEL_DIR first.
    """
    with _started(recipe) as run:
        params = _run_stages(recipe, recipe.stages, run._replace(callbacks=callbacks))
        kept = params if recipe.few_shot and not recipe.selections else None
        params = None  # frees memory for the members of an ensemble
        for selection in recipe.selections:
            _select(recipe, selection, run.summary)
        if recipe.few_shot is not None:
            follows = bool(recipe.stages) and recipe.few_shot.restore == STAGE + recipe.last.name
            few_shot_start = kept if follows else None
            run_few_shot(recipe, recipe.few_shot, run.summary, run.stop, few_shot_start)
    return run.summary


def validate(recipe: Recipe, name: str, callbacks: Sequence[Callback] = ()) -> float | None:
    """Runs a recipe as far as a stage or a selection, without its final evaluations.

    `run_claimed` makes these, and what comes after, when it is called later; nothing trains twice.

    Args:
        recipe: The recipe, whose MODEL_DIR is claimed already.
        name: The stage or the selection.
        callbacks: Follow the training loop of each stage.

    Returns:
        The validation score by which its checkpoint or its lambda was selected; None without one.

    Raises:
        UserError, Stopped: As for `run`.
    """
    directory = as_path(recipe.model_dir)
    names = [stage.name for stage in recipe.stages]
    count = names.index(name) + 1 if name in names else len(names)
    with _started(recipe) as run:
        run = run._replace(callbacks=callbacks, tests=False)
        _run_stages(recipe, recipe.stages[:count], run)
        if name in names:
            outcome = Outcome.read(directory / name)
            return None if outcome is None else outcome.score
        selection = next(each for each in recipe.selections if each.name == name)
        selected = SelectedWeight.read(directory / name)
        if selected is None:
            validated = without_final_evaluations(selection)
            selected = validated.run(directory, run.summary, functools.partial(predictor, recipe))
        return selected.selected.score


@contextlib.contextmanager
def _started(recipe: Recipe) -> Iterator[RunContext]:
    """Yields what the stages of a recipe share."""
    compiling.use_cache()
    compiling.use_effort(recipe.compile_effort)
    if note := untuned(recipe):
        console.print_line(note, style="yellow")
    directory = as_path(recipe.model_dir)
    summary = Summary(directory, enabled=multihost.is_first())
    record = RunRecord.read(directory)
    changed = record is not None and bool(record.changes)
    with (
        full_disk.told(directory),
        multihost.stop_on_sigterm() as stop,
        recipe.partitioner.activate(),
    ):
        yield RunContext(directory, recipe.partitioner, recipe.seed, summary, stop, changed=changed)


def _run_stages(recipe: Recipe, stages: Sequence[Stage], run: RunContext) -> Params | None:
    """Runs stages; returns the last one's final parameters, None if it had finished before."""
    params: Params | None = None
    for i, stage in enumerate(stages):
        outcome = Outcome.read(run.directory / stage.name)
        if outcome is not None:
            _check_finished(recipe, stage, outcome)
            console.print_line(f"[{stage.name}] finished before; step {outcome.step} was selected.")
            params = None
            if run.tests and not outcome.is_tested:
                stage_teacher = teacher(recipe, stage)
                start = restore(recipe, stage)
                test(stage, start, _context(recipe, stage, run, stage_teacher))
            continue
        # The previous stage's parameters are handed over in memory.
        follows = i > 0 and stage.restore == STAGE + stages[i - 1].name
        params = params if follows else None
        # The teacher first: loading it takes twice its memory for a moment.
        stage_teacher = teacher(recipe, stage)
        params = restore(recipe, stage, params)
        if multihost.is_first():
            _write_model_info(stage, params, run.directory / stage.name)
            _record(recipe, stage).write(run.directory / stage.name)
        overlap_file.write(stage, run.directory / stage.name)
        params = fit(stage, params, _context(recipe, stage, run, stage_teacher))
    return params


def _context(
    recipe: Recipe, stage: Stage, run: RunContext, stage_teacher: Teacher | None
) -> RunContext:
    """Returns what a stage is given beside its parameters."""
    return run._replace(
        baseline=stage.name == recipe.stages[0].name,
        origin=origin(recipe, stage),
        teacher=stage_teacher,
        pretrained=functools.partial(pretrained, recipe, stage),
    )


def _select(recipe: Recipe, selection: Selection, summary: Summary) -> None:
    directory = as_path(recipe.model_dir)
    selected = SelectedWeight.read(directory / selection.name)
    if selected is None:
        selected = selection.run(directory, summary, functools.partial(predictor, recipe))
        if multihost.is_first():
            (directory / selection.name).mkdir(exist_ok=True)
            write_json(directory / selection.name / SELECTED, dataclasses.asdict(selected))
    elif [candidate.weight for candidate in selected.candidates] != list(selection.weights):
        raise UserError(
            f"'{selection.name}' was chosen among other weights in {recipe.model_dir}; choose "
            "another Recipe.model_dir, or delete its folder there to choose again."
        )
    console.print_line(
        f"[{selection.name}] lambda {selected.weight:g} was chosen; its validation score is "
        f"{selected.selected.score:.1f}."
    )


def final_predictor(recipe: Recipe) -> BasePredictor:
    """Returns a finished recipe's result: its last selection, or its last stage's model.

    Raises:
        UserError: It has neither, or the selection has not been made.
    """
    if not recipe.stages:
        raise UserError(
            f"The run in {recipe.model_dir} trains no model, it only evaluates one; load "
            f"'{recipe.few_shot and recipe.few_shot.restore}'."
        )
    if not recipe.selections:
        return predictor(recipe, recipe.stages[-1].name)
    selection = recipe.selections[-1]
    selected = SelectedWeight.read(as_path(recipe.model_dir) / selection.name)
    if selected is None:
        raise UserError(f"'{selection.name}' has not been chosen yet in {recipe.model_dir}.")
    return selection.predictor(selected, functools.partial(predictor, recipe))


def _check_finished(recipe: Recipe, stage: Stage, outcome: Outcome) -> None:
    ended_early = stage.patience is not None and outcome.steps < stage.steps
    if outcome.steps != stage.steps and not ended_early:
        raise UserError(
            f"Stage '{stage.name}' has finished in {recipe.model_dir} after {outcome.steps} steps, "
            f"not {stage.steps}; choose another Recipe.model_dir, or delete the stage's folder and "
            "those of the stages after it to train them again."
        )


def _record(recipe: Recipe, stage: Stage) -> StageRecord:
    restored_from = sources.split(stage.restore)
    return StageRecord.of(stage.model, stage.data.vocabulary, restored_from, recipe.seed)


def _write_model_info(stage: Stage, params: Params, directory: Path) -> None:
    paths = stage.trainable_paths()
    methods = stage.model.peft
    console.print_line(f"[{stage.name}] parameters:")
    console.print_line(model_info.report(params, paths, methods, compact=True))
    directory.mkdir(parents=True, exist_ok=True)
    info = model_info.report(params, paths, methods) + "\n"
    (directory / "model-info.txt").write_text(info, encoding="utf-8")
