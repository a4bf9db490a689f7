"""The training loop: `fit` trains one stage, `test` evaluates it later."""

import dataclasses

from robust_ft import (
    console,
    export,
    finite,
    first_batch,
    flow_scale,
    multihost,
    stage_anchor,
    trainable,
)
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.data.loader import BatchSource
from robust_ft.errors import UserError
from robust_ft.metric_writer import MetricWriter
from robust_ft.objectives.penalties import Anchor
from robust_ft.outcome import Outcome
from robust_ft.run_context import RunContext
from robust_ft.stage import Stage, stage_key
from robust_ft.stage_checkpoints import StageCheckpoints
from robust_ft.stage_evaluator import StageEvaluator
from robust_ft.stage_step import compile_train_step, place_state, train_batches
from robust_ft.train_step import TrainState
from robust_ft.training_log import Done, TrainingLog
from robust_ft.types import Params


class Stopped(Exception):
    """Training was asked to stop, saved a checkpoint and can be resumed."""


def fit(stage: Stage, params: Params, run: RunContext) -> Params:
    """Trains one stage, from its newest checkpoint if there is one.

    Args:
        stage: What to train, on what, and for how long.
        params: All parameters at the stage's start, on the mesh. They are donated.
        run: What the stages of a run share.

    Returns:
        All parameters, the trained ones as in the selected checkpoint.

    Raises:
        Stopped: `run.stop` was set; a checkpoint has been saved.
        UserError: What is restored, a step's loss or the parameters after it are not finite.
    """
    finite.check_start(stage, params, run.teacher)
    stage = flow_scale.measured(stage, params, run)
    # 1. What trains: only this half is differentiated, optimized, donated and saved.
    paths = stage.trainable_paths()
    base = export.base_of(stage.model, params, paths, run.origin)
    trained, frozen = trainable.split(params, paths)
    # 2. Data, on which all processes must agree.
    batches = train_batches(stage, run.partitioner, run.seed)
    data = {k: v for k, v in batches.get_state().items() if k not in ("position", "shard")}
    described = "\n".join(f"{name} {value}" for name, value in data.items())
    multihost.check_same(f"data of stage '{stage.name}'", described)
    anchor = stage_anchor.anchor(stage, params, run)
    # 3. A fresh state, or the one of the newest checkpoint.
    directory = run.directory / stage.name
    state = place_state(stage, trained, run.partitioner)
    checkpoints = StageCheckpoints(directory)
    if resumed := checkpoints.restore(state):
        state, data_position = resumed
        finite.check(
            state.trainable,
            f"{directory}, to which stage '{stage.name}' would return at step {state.step},",
            "delete the folder of that checkpoint, or of the stage to train it again",
        )
        if state.step > stage.steps:
            raise UserError(
                f"{directory} holds a checkpoint of step {state.step}, but stage '{stage.name}' "
                f"has only Stage.steps={stage.steps}; raise it or choose another Recipe.model_dir."
            )
        if run.changed and (misfit := batches.misfit(data_position)):
            console.print_line(f"[{stage.name}] {misfit} So its data are read from the start.")
        else:
            batches.set_state(data_position)
    with MetricWriter(directory, multihost.is_first()) as writer, checkpoints:
        # What follows the checkpoint will be reported again; without one, step 0 too.
        last_step = int(state.step) if resumed else -1
        writer.truncate(last_step)
        run.summary.truncate(stage.name, last_step)
        evaluator = StageEvaluator(stage, run, writer)
        # 4. Train.
        with multihost.stop_on_ctrl_c(run.stop):
            state = _train(stage, run, state, frozen, anchor, batches, checkpoints, evaluator)
        # 5. Return to the selected checkpoint.
        last = int(state.step)
        selected = (checkpoints.best_step() if stage.select_best else None) or last
        if last < stage.steps:
            console.print_line(
                f"[{stage.name}] ends at step {last}: after step {selected} no score was better, "
                f"in {stage.patience} evaluation(s)."
            )
        if selected != last:
            best = checkpoints.restore_params(selected, like=state.trainable)
            state = state._replace(trainable=best, average=None)
        params = trainable.merge(state.evaluated, frozen)
        if run.tests:
            evaluator(stage.final_evaluations, params, selected, kept=stage.final_kept)
        score = checkpoints.score(selected)
    folder, tokens = directory / export.FOLDER, Tokens.of(stage.model, stage.data.vocabulary)
    export.write(folder, stage.model, params, paths, base, tokens, run.partitioner)
    Outcome(selected, score, tuple(sorted(paths)), last, run.tests).write(directory)
    return params


def test(stage: Stage, params: Params, run: RunContext) -> None:
    """Runs the final evaluations of a stage that was trained without them.

    Args:
        stage: The stage, which has finished.
        params: All parameters at the stage's start, on the mesh.
        run: What the stages of a run share.
    """
    directory = run.directory / stage.name
    outcome = Outcome.read(directory)
    assert outcome is not None
    stage = flow_scale.measured(stage, params, run)
    start, frozen = trainable.split(params, frozenset(outcome.paths))
    with MetricWriter(directory, multihost.is_first()) as writer:
        evaluator = StageEvaluator(stage, run, writer)
        if run.baseline:
            evaluator(stage.final_evaluations, params, 0, pretrained=True)
        with StageCheckpoints(directory) as checkpoints:
            trained = checkpoints.restore_params(outcome.step, like=start)
        params = trainable.merge(trained, frozen)
        evaluator(stage.final_evaluations, params, outcome.step, kept=stage.final_kept)
    dataclasses.replace(outcome, is_tested=True).write(directory)


def _train(
    stage: Stage,
    run: RunContext,
    state: TrainState,
    frozen: Params,
    anchor: Anchor | None,
    batches: BatchSource,
    checkpoints: StageCheckpoints,
    evaluator: StageEvaluator,
) -> TrainState:
    """The training loop: evaluate and save where it is due, then step."""
    train_step = compile_train_step(stage, state)
    rng = stage_key(run.seed, stage.name, "dropout")
    step = saved = int(state.step)  # on the host, so that no step is waited for
    paths = sorted(trainable.flatten(state.trainable))
    nonfinite = finite.NonFinite(stage, paths, batches, saved)

    def save(score: float | None) -> None:
        nonlocal saved
        evaluator.writer.flush()  # a run that goes on from here has all lines up to here
        checkpoints.save(state, batches.get_state(), score)
        saved = nonfinite.saved = step
        for callback in run.callbacks:
            callback.on_checkpoint(stage, step)

    with console.progress(stage.name, stage.steps, step) as progress:
        examples = stage.examples_per_step
        log = TrainingLog(evaluator.writer, progress, nonfinite, stage.log_period, examples)
        while True:
            if (step == stage.steps or step % stage.eval_period == 0) and (
                step > saved or step == 0
            ):
                log.flush(step)
                params = trainable.merge(state.evaluated, frozen)
                score = evaluator(stage.evaluations, params, step)
                if step == 0 and run.baseline and run.tests:
                    # After the stage's own, whose rows it replaces where both use one split.
                    evaluator(stage.final_evaluations, params, step, pretrained=True)
                if step:
                    save(score)
            # Only where it may end early: the best step is known when all writing has ended.
            waits = stage.patience is not None and step % stage.eval_period == 0
            if stage.is_over(step, checkpoints.best_step() if waits else None):
                return state
            if run.stop.is_set():
                log.flush(step)
                if step > saved:
                    save(None)
                raise Stopped(f"Stopped at step {step} of stage '{stage.name}'.")
            arrays = next(batches)
            if step == 0:
                first_batch.show(stage, arrays, batches, run.directory / stage.name)
            batch = run.partitioner.put_batch(arrays)
            state, sums, flags = train_step(state, frozen, run.teacher, batch, rng, anchor)
            step += 1
            log.add(Done(step, sums, flags, batches.examples))
            for callback in run.callbacks:
                callback.on_step(stage, step, state, sums)
