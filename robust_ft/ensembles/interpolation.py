"""Ensembles in weight space: one model whose parameters are the mean of several."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.ensembles.mixing import check_weights
from robust_ft.errors import UserError
from robust_ft.trainable import flatten
from robust_ft.types import Params


def interpolate(params: Sequence[Params], weights: Sequence[float]) -> Params:
    """Returns the weighted mean of parameters: an ensemble in weight space, as fast as one model.

    Args:
        params: Trees of the same paths and shapes: of whole models, or of lightweight modules of
            one kind alone.
        weights: From 0 to 1, with the sum 1.

    Returns:
        Leaves of the first tree's types, computed in float32.

    Raises:
        UserError: Weights or shapes do not fit; it names the first path that differs.
    """
    weights = check_weights(weights, len(params))
    trees = [flatten(each) for each in params]
    for number, tree in enumerate(trees[1:], start=1):
        for path in sorted(trees[0].keys() | tree.keys()):
            shapes = [each[path].shape if path in each else None for each in (trees[0], tree)]
            if shapes[0] != shapes[1]:
                said = ["missing" if shape is None else list(shape) for shape in shapes]
                raise UserError(
                    f"Parameters cannot be interpolated: '{path}' is {said[0]} in member 0, but "
                    f"{said[1]} in member {number}."
                )
    return _mean(tuple(dict(each) for each in params), jnp.asarray(weights, jnp.float32))


@jax.jit
def _mean(params: tuple[Params, ...], weights: Float[Array, " members"]) -> Params:
    def mean(*leaves: jax.Array) -> jax.Array:
        parts = [w * leaf.astype(jnp.float32) for w, leaf in zip(weights, leaves, strict=True)]
        return functools.reduce(jnp.add, parts).astype(leaves[0].dtype)

    return jax.tree.map(mean, *params)
