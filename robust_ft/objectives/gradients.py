"""Gradient rules: from a batch to a gradient of the trainable parameters."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from robust_ft.types import Batch, Params, Sums

# (trainable parameters, batch, key) -> (summed loss, (summed weights, metric sums))
LossFn = Callable[
    [Params, Batch, jax.Array], tuple[Float[Array, ""], tuple[Float[Array, ""], Sums]]
]


@runtime_checkable
class GradientFn(Protocol):
    """A rule from a batch to a gradient: backpropagation, or a meta-learning rule."""

    def __call__(
        self, loss_fn: LossFn, trainable: Params, batch: Batch, rng: jax.Array
    ) -> tuple[Params, Sums]:
        """Returns the gradient of the *summed* loss and sums that include "loss" and "weight"."""
        ...


def backprop(
    loss_fn: LossFn, trainable: Params, batch: Batch, rng: jax.Array
) -> tuple[Params, Sums]:
    """The plain gradient, a `GradientFn`.

    Args:
        loss_fn: The stage's objective; this and what follows is given by the train step.
        trainable: The parameters that train.
        batch: The examples.
        rng: The step's key.
    """
    (loss, (weight, sums)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        trainable, batch, rng
    )
    return gradient, {"loss": loss, "weight": weight, **sums}


def cast(gradient: Params, dtype: str | None) -> Params:
    """Returns a gradient rounded to a dtype, None for its own."""
    if dtype is None:
        return gradient

    def rounded(leaf: jax.Array) -> jax.Array:
        # Without a barrier XLA drops a cast to a narrower dtype and back. One barrier for each
        # leaf, so that its update need not wait for the other gradients.
        barrier: Callable[[jax.Array], jax.Array] = jax.lax.optimization_barrier
        return barrier(leaf.astype(dtype))

    narrow: Params = jax.tree.map(rounded, gradient)
    return narrow
