"""The one training loop: fits one stage."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax

from robust_ft import console, export, multihost, optim, trainable
from robust_ft.data import loader
from robust_ft.errors import UserError
from robust_ft.evaluate import ALL, Evaluation
from robust_ft.metric_writer import MetricWriter
from robust_ft.objectives import Teacher
from robust_ft.outcome import Outcome
from robust_ft.partitioning import Partitioner
from robust_ft.stage import Stage, stage_key, stage_seed
from robust_ft.stage_checkpoints import StageCheckpoints
from robust_ft.stage_evaluator import StageEvaluator
from robust_ft.summary import Summary
from robust_ft.train_step import TrainState, TrainStep, init_state, make_train_step
from robust_ft.types import Params, Sums


class RunContext(NamedTuple):
    """What all stages of a run share.

    Attributes:
        directory: MODEL_DIR.
        partitioner: The mesh and its rules.
        seed: All randomness comes from it and the stage's name.
        summary: Where evaluation results are collected.
        stop: Set from outside (SIGTERM) to save and end.
        baseline: Evaluate the parameters before the first step as the pretrained model.
        origin: Where the parameters of the stage's base come from, for what it exports.
        teacher: Whom the stage's model learns from, with all parameters on the mesh.
    """

    directory: Path
    partitioner: Partitioner
    seed: int
    summary: Summary
    stop: multihost.Stop
    baseline: bool = False
    origin: str = ""
    teacher: Teacher | None = None


class Stopped(Exception):
    """Training was asked to stop, saved a checkpoint and can be resumed."""


def fit(stage: Stage, params: Params, run: RunContext) -> Params:
    """Trains one stage, from its newest checkpoint if there is one.

    Args:
        stage: What to do.
        params: All parameters at the stage's start, on the mesh; not to be used afterwards.
        run: What stages share.

    Returns:
        All parameters, those that trained as in the selected checkpoint.

    Raises:
        Stopped: `run.stop` was set; a checkpoint has been saved.
    """
    # 1. What trains: only this half is differentiated, optimized, donated and saved.
    paths = stage.trainable_paths()
    base = export.base_of(stage.model, params, paths, run.origin)
    trained, frozen = trainable.split(params, paths)
    # 2. Data and dropout, which depend on the seed and the stage's name only.
    batches = loader.train_batches(
        stage.data,
        stage.batch_size,
        stage_seed(run.seed, stage.name),
        stage.packing,
        run.partitioner.data_shard(),
        stage.model.start_id,
        stage.model.task_index if stage.model.tasks else None,
        stage.by_length,
    )
    data = {k: v for k, v in batches.get_state().items() if k not in ("position", "shard")}
    described = "\n".join(f"{name} {value}" for name, value in data.items())
    multihost.check_same(f"data of stage '{stage.name}'", described)
    # 3. A fresh state, or the one that the newest checkpoint holds.
    directory = run.directory / stage.name
    state = place_state(stage, trained, run.partitioner)
    checkpoints = StageCheckpoints(directory)
    if resumed := checkpoints.restore(state):
        state, data_position = resumed
        if state.step > stage.steps:
            raise UserError(
                f"{directory} holds a checkpoint of step {state.step}, but stage '{stage.name}' "
                f"has steps={stage.steps}; raise them or choose another MODEL_DIR."
            )
        batches.set_state(data_position)
    # 4. Train.
    with MetricWriter(directory, jax.process_index() == 0) as writer:
        # Before the first checkpoint nothing counts, not even what step 0 reported.
        kept = int(state.step) if resumed else -1
        writer.truncate(kept)
        run.summary.truncate(stage.name, kept)
        evaluator = StageEvaluator(
            stage.name, directory, stage.model, paths, run.partitioner, writer, run.summary
        )
        try:
            state = _train(stage, run, state, frozen, batches, checkpoints, evaluator)
            # 5. Hand on the selected checkpoint.
            selected = (checkpoints.best_step() if stage.select_best else None) or stage.steps
            if selected != stage.steps:
                best = checkpoints.restore_params(selected, like=state.trainable)
                state = state._replace(trainable=best)
            params = trainable.merge(state.trainable, frozen)
            evaluator(stage.final_evaluations, params, selected)
            score = checkpoints.score(selected)
        finally:
            checkpoints.close()
    if base is not None:
        folder = directory / export.FOLDER
        export.write(folder, stage.model, params, paths, base, run.partitioner)
    Outcome(selected, score, tuple(sorted(paths)), stage.steps).write(directory)
    return params


def _train(
    stage: Stage,
    run: RunContext,
    state: TrainState,
    frozen: Params,
    batches: loader.BatchSource,
    checkpoints: StageCheckpoints,
    evaluator: StageEvaluator,
) -> TrainState:
    train_step = compile_train_step(stage, state)
    rng = stage_key(run.seed, stage.name, "dropout")
    log = TrainingLog(evaluator.writer)
    step = saved = int(state.step)
    with console.progress(stage.name, stage.steps, step) as progress:
        while True:
            if (step % stage.eval_period == 0 or step == stage.steps) and (
                step > saved or step == 0
            ):
                progress.update(step, 0, **log.flush())
                params = trainable.merge(state.trainable, frozen)
                score = evaluator(stage.evaluations, params, step)
                if step == 0 and run.baseline:
                    # Last, so that it stays where both evaluate the same split.
                    evaluator(pretrained(stage), params, step)
                if step:
                    checkpoints.save(state, batches.get_state(), score)
                    saved = step
            if step == stage.steps:
                return state
            if run.stop.is_set():
                progress.update(step, 0, **log.flush())
                if step > saved:
                    checkpoints.save(state, batches.get_state(), None)
                raise Stopped(f"Stopped at step {step} of stage '{stage.name}'.")
            batch = run.partitioner.put_batch(next(batches))
            state, sums = train_step(state, frozen, run.teacher, batch, rng)
            step += 1
            log.add(step, sums)
            if step % stage.log_period == 0:
                progress.update(step, stage.log_period * stage.batch_size, **log.rotate())


def pretrained(stage: Stage) -> list[Evaluation]:
    """Returns the final evaluations as they are for the model before any PEFT method."""
    return [dataclasses.replace(e, detach=ALL) for e in stage.final_evaluations]


def compile_train_step(stage: Stage, state: TrainState) -> TrainStep:
    """Returns the stage's jitted step; it donates the state it gets.

    Args:
        stage: The stage.
        state: Where the next state shall be too: arrays, or shapes with shardings. The compiler
            would move some of it, and compile the second step anew.
    """
    train_step = make_train_step(
        stage.model,
        stage.objective,
        stage.optimizer,
        stage.gradient,
        stage.microbatches,
        stage.gradient_dtype,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))


def place_state(stage: Stage, trained: Params, partitioner: Partitioner) -> TrainState:
    """Returns the state before the first step, optimizer state sharded like its parameters.

    The arrays of `trained` are donated: they live on in the state only.
    """
    _, shardings = state_shardings(stage, trained, partitioner)
    init = functools.partial(init_state, stage.optimizer)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(trained)


def state_shardings(stage: Stage, trained: Params, partitioner: Partitioner) -> tuple[Any, Any]:
    """Returns (shapes, shardings) of a stage's state, both as a TrainState.

    Args:
        stage: The stage.
        trained: Those of its parameters that train, or their shapes.
        partitioner: The mesh and its rules.
    """
    axes, _ = trainable.split(stage.model.logical_axes(), frozenset(trainable.flatten(trained)))
    shapes = jax.eval_shape(functools.partial(init_state, stage.optimizer), trained)
    replicated: Any = partitioner.replicated  # a state of shardings in place of arrays
    shardings = TrainState(
        step=replicated,
        trainable=partitioner.shardings(axes),
        opt_state=partitioner.shardings(optim.state_axes(shapes.opt_state, trained, axes)),
    )
    return shapes, shardings


class TrainingLog:
    """Collects metric sums on the device and writes means, one window of steps behind.

    Reading a window only when the next one is full means that no step is waited for.
    """

    def __init__(self, writer: MetricWriter):
        self._writer = writer
        self._full: list[tuple[int, Sums]] = []
        self._window: list[tuple[int, Sums]] = []
        self._shown: dict[str, float] = {}

    def add(self, step: int, sums: Sums) -> None:
        self._window.append((step, sums))

    def rotate(self) -> dict[str, float]:
        """Writes the window before this one and returns what to show of it."""
        self._write(self._full)
        self._full, self._window = self._window, []
        return self._shown

    def flush(self) -> dict[str, float]:
        """Writes all that was collected and returns what to show of it."""
        self.rotate()
        return self.rotate()

    def _write(self, window: list[tuple[int, Sums]]) -> None:
        if not window:
            return
        totals: dict[str, float] = {}
        for sums in jax.device_get([sums for _, sums in window]):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        # The loss and its parts are sums over target tokens, these two are one number a step.
        per_step = {name: totals.pop(name) / len(window) for name in ("grad_norm", "learning_rate")}
        values = {name: total / (weight or 1.0) for name, total in totals.items()} | per_step
        self._writer.write(window[-1][0], values)
        self._shown = {"loss": values["loss"]}
