"""The train step: from a state and a batch to the next state."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from robust_ft import trainable as trainable_lib
from robust_ft.models.model import Model
from robust_ft.objectives import Objective, Teacher
from robust_ft.objectives.gradients import GradientFn, backprop, cast
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.objectives.penalties import Anchor, Penalty
from robust_ft.optim import Optimizer, apply_updates, moving_average
from robust_ft.types import Batch, Params, Sums


class TrainState(NamedTuple):
    """What a train step updates, and all that a checkpoint holds.

    Attributes:
        step: Number of updates so far.
        trainable: The trainable parameters, a pruned nested dict.
        opt_state: The optimizer state of these parameters.
        gradient_state: What the gradient rule carries from step to step; None for nothing.
        average: The moving average of the trainable parameters, in float32; None for none.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
    gradient_state: Any = None
    average: Params | None = None

    @property
    def evaluated(self) -> Params:
        """The trainable parameters as they are evaluated and exported: averaged, if they are."""
        if self.average is None:
            return self.trainable
        narrow: Params = jax.tree.map(
            lambda mean, leaf: mean.astype(leaf.dtype), self.average, self.trainable
        )
        return narrow


@runtime_checkable
class TrainStep(Protocol):
    """From a state and a batch to the next state and metric sums.

    Frozen parameters, teacher and anchor are arguments and not closures, which would be compiled
    into the program as constants. They are not donated: the next step reads them again.
    """

    def __call__(
        self,
        state: TrainState,
        frozen: Params,
        teacher: Teacher | None,
        batch: Batch,
        rng: jax.Array,
        anchor: Anchor | None = None,
    ) -> tuple[TrainState, Sums]: ...


def init_state(
    optimizer: Optimizer,
    trainable: Params,
    model: Model | None = None,
    gradient: GradientFn | MetaLearning = backprop,
    averaged: bool = False,
) -> TrainState:
    """Returns the state before the first step; a meta-learning rule needs the model."""
    carried = None
    if isinstance(gradient, MetaLearning) and model is not None:
        carried = gradient.init(model, trainable)
    step = jnp.zeros((), jnp.int32)
    average = None
    if averaged:  # copied, as the step donates both
        average = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
    return TrainState(step, trainable, optimizer.build().init(trainable), carried, average)


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: Optimizer,
    gradient_fn: GradientFn | MetaLearning = backprop,
    microbatches: int = 1,
    gradient_dtype: str | None = None,
    penalty: Penalty | None = None,
    ema_decay: float | None = None,
) -> TrainStep:
    """Returns the train step, a pure function to be jitted with its first argument donated.

    Its metric sums are "loss", "weight", the objective's own, "grad_norm" and "learning_rate", and
    "penalty" if there is one.

    Args:
        model: The model.
        objective: The loss.
        optimizer: The optimizer; it computes in float32, whatever the gradient's dtype.
        gradient_fn: The gradient rule.
        microbatches: Number of microbatches over which gradients are accumulated.
        gradient_dtype: Dtype of each microbatch's gradient, or of each task's meta-gradient; by
            default its parameter's.
        penalty: Added to the mean loss; the step then needs its anchor.
        ema_decay: Of the moving average of parameters, if the state has one.
    """
    tx = optimizer.build()
    meta = gradient_fn if isinstance(gradient_fn, MetaLearning) else None
    rule = backprop if isinstance(gradient_fn, MetaLearning) else gradient_fn
    inner_paths = meta.paths(model) if meta is not None else frozenset()

    def train_step(
        state: TrainState,
        frozen: Params,
        teacher: Teacher | None,
        batch: Batch,
        rng: jax.Array,
        anchor: Anchor | None = None,
    ) -> tuple[TrainState, Sums]:
        if teacher is not None:
            teacher = teacher.with_shared(frozen)

        def loss_fn(trainable: Params, batch: Batch, rng: jax.Array) -> Any:
            params = trainable_lib.merge(trainable, frozen)
            loss, weight, sums = objective(model, params, batch, rng, teacher)
            return loss, (weight, sums)

        def gradient_of(microbatch: Batch, rng: jax.Array) -> tuple[Params, Sums]:
            gradient, sums = rule(loss_fn, state.trainable, microbatch, rng)
            return cast(gradient, gradient_dtype), sums

        rng = jax.random.fold_in(rng, state.step)
        carried = state.gradient_state
        if meta is None:
            gradient, sums = accumulate(gradient_of, batch, rng, microbatches)
        else:
            parts = state.trainable, inner_paths, carried
            gradient, sums, carried = meta(
                loss_fn, *parts, batch, rng, microbatches, gradient_dtype
            )
        # The mean over target positions, or over tasks; without any that counts, the gradient is 0
        # and not NaN.
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, gradient)
        if penalty is not None:
            assert anchor is not None, "a penalty needs its anchor"
            value, pull = penalty(state.trainable, anchor)
            gradient = jax.tree.map(jnp.add, gradient, pull)
            sums["penalty"] = value * sums["weight"]  # a mean over target positions, as the loss
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
        trainable = apply_updates(state.trainable, updates)
        sums["grad_norm"] = optax.tree.norm(gradient)
        sums["learning_rate"] = optimizer.learning_rate(state.step)
        average = state.average
        if ema_decay is not None:
            assert average is not None, "the state has no average"
            average = moving_average(average, trainable, ema_decay)
        return TrainState(state.step + 1, trainable, opt_state, carried, average), sums

    return train_step


def accumulate(
    gradient_of: Callable[[Batch, jax.Array], tuple[Params, Sums]],
    batch: Batch,
    rng: jax.Array,
    microbatches: int,
) -> tuple[Params, Sums]:
    """Accumulates gradients and metric sums over microbatches, one after the other.

    Microbatch i of n has the examples i, i + n, i + 2n, ... Every device then has its share of each
    microbatch already, while contiguous microbatches would move examples between devices.

    Args:
        gradient_of: From a microbatch and a key to its gradient and metric sums.
        batch: Arrays [batch, ...].
        rng: A key.
        microbatches: Their number n, which divides the batch size.
    """
    if microbatches == 1:
        return gradient_of(batch, rng)

    def microbatch(i: Int[Array, ""]) -> dict[str, jax.Array]:
        strided = {
            name: x.reshape(-1, microbatches, *x.shape[1:])  # [batch / n, n, ...]
            for name, x in batch.items()
        }
        return {
            name: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
            for name, x in strided.items()
        }

    def body(i: Int[Array, ""], total: tuple[Params, Sums]) -> Any:
        terms = gradient_of(microbatch(i), jax.random.fold_in(rng, i))
        return jax.tree.map(lambda t, term: t + term.astype(t.dtype), total, terms)

    shapes = jax.eval_shape(gradient_of, microbatch(jnp.asarray(0)), rng)
    # In float32 also for bfloat16 gradients: a bfloat16 sum loses terms below 1/256 of it.
    zeros: tuple[Params, Sums] = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    total: tuple[Params, Sums] = jax.lax.fori_loop(0, microbatches, body, zeros)
    return total
