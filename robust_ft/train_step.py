"""One training step: from state and batch to the next state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from robust_ft import trainable as trainable_lib
from robust_ft.models.model import Model
from robust_ft.objectives import Objective, Teacher
from robust_ft.objectives.gradients import GradientFn, backprop
from robust_ft.optim import Optimizer
from robust_ft.types import Batch, Params, Sums


class TrainState(NamedTuple):
    """What a step changes, and all that a checkpoint holds.

    Attributes:
        step: Number of updates made so far.
        trainable: The parameters that train, a pruned nested dict.
        opt_state: The optimizer's state, for those parameters only.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any


# (state, frozen, teacher, batch, key) -> (next state, metric sums). Frozen parameters and the
# teacher are arguments, not closures, so that they are neither copied into the program nor donated.
TrainStep = Callable[
    [TrainState, Params, Teacher | None, Batch, jax.Array], tuple[TrainState, Sums]
]


def init_state(optimizer: Optimizer, trainable: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.build().init(trainable))


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: Optimizer,
    gradient_fn: GradientFn = backprop,
    microbatches: int = 1,
    gradient_dtype: str | None = None,
) -> TrainStep:
    """Builds the step; pure, to be jitted with its first argument donated.

    The metric sums hold "loss", "weight", the objective's own, "grad_norm" and "learning_rate".

    Args:
        model: The model.
        objective: From logits to loss.
        optimizer: Computes in float32 whatever the gradient's type.
        gradient_fn: From a batch to a gradient.
        microbatches: Parts of a batch that are computed one after the other.
        gradient_dtype: Type of what is kept of a gradient until it is applied; by default its
            parameter's.
    """
    tx = optimizer.build()

    def train_step(
        state: TrainState,
        frozen: Params,
        teacher: Teacher | None,
        batch: Batch,
        rng: jax.Array,
    ) -> tuple[TrainState, Sums]:
        def loss_fn(trainable: Params, batch: Batch, rng: jax.Array) -> Any:
            params = trainable_lib.merge(trainable, frozen)
            loss, weight, sums = objective(model, params, batch, rng, teacher)
            return loss, (weight, sums)

        rng = jax.random.fold_in(rng, state.step)

        def gradient_of(part: Batch, rng: jax.Array) -> tuple[Params, Sums]:
            gradient, sums = gradient_fn(loss_fn, state.trainable, part, rng)
            return _kept_in(gradient_dtype, gradient), sums

        gradient, sums = accumulate(gradient_of, batch, rng, microbatches)
        # A batch in which nothing counts has a gradient of 0.
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        sums["grad_norm"] = optax.tree.norm(gradient)
        sums["learning_rate"] = optimizer.learning_rate(state.step)
        return TrainState(state.step + 1, trainable, opt_state), sums

    return train_step


def _kept_in(dtype: str | None, gradient: Params) -> Params:
    if dtype is None:
        return gradient
    # The compiler would take a cast to a narrower type and back for a mere loss of precision, and
    # leave it out. One barrier a leaf, so that an update need not wait for other gradients.
    return jax.tree.map(lambda g: jax.lax.optimization_barrier(g.astype(dtype)), gradient)


def accumulate(
    gradient_of: Callable[[Batch, jax.Array], tuple[Params, Sums]],
    batch: Batch,
    rng: jax.Array,
    microbatches: int,
) -> tuple[Params, Sums]:
    """Adds up gradients and sums over microbatches, one after the other.

    Microbatch i holds the examples i, i + n, i + 2n, ...: so every device keeps its own examples,
    where contiguous blocks would move them between devices.
    """
    if microbatches == 1:
        return gradient_of(batch, rng)

    def microbatch(i: Int[Array, ""]) -> Batch:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(
                x.reshape(-1, microbatches, *x.shape[1:]), i, axis=1, keepdims=False
            ),
            batch,
        )

    def body(i: Int[Array, ""], total: tuple[Params, Sums]) -> tuple[Params, Sums]:
        part = gradient_of(microbatch(i), jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, part)

    shapes = jax.eval_shape(gradient_of, microbatch(jnp.asarray(0)), rng)
    # In float32 also where gradients are bfloat16, whose sums would soon stop growing.
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    return jax.lax.fori_loop(0, microbatches, body, zeros)
