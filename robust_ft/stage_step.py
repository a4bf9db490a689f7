"""What a stage needs for its training steps: batches, the state, and the jitted step."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from robust_ft import optim, trainable
from robust_ft.data import loader
from robust_ft.data.meta_batches import MetaBatch
from robust_ft.finite import CheckedStep, checked
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.partitioning import Partitioner
from robust_ft.stage import SKIP, Stage, stage_seed
from robust_ft.train_step import TrainState, init_state, make_train_step
from robust_ft.types import Params


def train_batches(stage: Stage, partitioner: Partitioner, seed: int) -> loader.BatchSource:
    """Returns the stage's training batches, which depend on the run's seed and the stage's name."""
    return loader.train_batches(
        stage.data,
        stage.batch_size,
        stage_seed(seed, stage.name),
        stage.packing,
        partitioner.data_shard(),
        stage.model.decoder_start,
        stage.model.task_index if stage.model.tasks else None,
        stage.by_length,
        MetaBatch(stage.gradient.tasks, stage.gradient.batches)
        if isinstance(stage.gradient, MetaLearning)
        else None,
        stage.replay,
        stage.prompts_are_left_out,
    )


def compile_train_step(stage: Stage, state: TrainState) -> CheckedStep:
    """Returns the stage's jitted step, which says what is not finite; it donates the state.

    Args:
        stage: The stage.
        state: Arrays, or shapes with shardings. The next state gets the same shardings: the
            compiler would change some of them, and the second step would be compiled again.
    """
    train_step = make_train_step(
        stage.model,
        stage.objective,
        stage.optimizer,
        stage.gradient,
        stage.microbatches,
        stage.gradient_dtype,
        stage.penalty,
        stage.ema_decay,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The flags are on every process, as the number of steps is.
    jitted: CheckedStep = jax.jit(
        checked(train_step, skip=stage.on_nonfinite == SKIP),
        donate_argnums=0,
        out_shardings=(shardings, None, shardings.step),
    )
    return jitted


def place_state(stage: Stage, trained: Params, partitioner: Partitioner) -> TrainState:
    """Returns the state before the first step, optimizer state sharded like its parameters.

    The arrays of `trained` are donated: use those of the state from here on.
    """
    _, shardings = state_shardings(stage, trained, partitioner)
    state: TrainState = jax.jit(_init_of(stage), out_shardings=shardings, donate_argnums=0)(trained)
    return state


def state_shardings(
    stage: Stage, trained: Params, partitioner: Partitioner
) -> tuple[TrainState, TrainState]:
    """Returns the shapes and the shardings of a stage's state.

    Args:
        stage: The stage.
        trained: The parameters that train, or their shapes.
        partitioner: The mesh and its rules.
    """
    axes, _ = trainable.split(stage.model.logical_axes(), frozenset(trainable.flatten(trained)))
    shapes: TrainState = jax.eval_shape(_init_of(stage), trained)
    replicated: Any = partitioner.replicated  # a sharding in the place of an array
    carried: Any = None
    if shapes.gradient_state is not None:
        carried = partitioner.shardings(optim.state_axes(shapes.gradient_state, trained, axes))
    placed = partitioner.shardings(axes)
    shardings = TrainState(
        step=replicated,
        trainable=placed,
        opt_state=partitioner.shardings(optim.state_axes(shapes.opt_state, trained, axes)),
        gradient_state=carried,
        average=None if shapes.average is None else placed,
    )
    return shapes, shardings


def _init_of(stage: Stage) -> Callable[[Params], TrainState]:
    return functools.partial(
        init_state,
        stage.optimizer,
        model=stage.model,
        gradient=stage.gradient,
        averaged=stage.ema_decay is not None,
    )
