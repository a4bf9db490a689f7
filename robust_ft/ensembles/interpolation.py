"""Weight interpolation: one model whose parameters are a weighted mean of several."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.ensembles.mixing import check_weights
from robust_ft.errors import UserError
from robust_ft.trainable import flatten
from robust_ft.types import Params


def interpolate(params: Sequence[Params], weights: Sequence[float]) -> Params:
    """Returns the weighted mean of several models' parameters, which costs no more than one model.

    Args:
        params: Trees with the same paths and shapes: whole models, or only the parameters of one
            PEFT method.
        weights: The weight of each tree, from 0 to 1, with the sum 1.

    Returns:
        A tree like the first, in its dtypes. The mean is computed in float32.

    Raises:
        UserError: The weights are wrong, or paths or shapes differ; it names the first such path.
    """
    weights = check_weights(weights, len(params))
    first, *others = (flatten(tree) for tree in params)
    for number, other in enumerate(others, start=1):
        for path in sorted(first.keys() | other.keys()):
            shape, other_shape = (
                list(flat[path].shape) if path in flat else "missing" for flat in (first, other)
            )
            if shape != other_shape:
                raise UserError(
                    f"Parameters cannot be interpolated: '{path}' is {shape} in member 0, but "
                    f"{other_shape} in member {number}."
                )
    mean: Params = _mean(tuple(dict(tree) for tree in params), jnp.asarray(weights, jnp.float32))
    return mean


@jax.jit
def _mean(params: tuple[Params, ...], weights: Float[Array, "members"]) -> Any:
    def mean(*leaves: jax.Array) -> jax.Array:
        terms = [w * leaf.astype(jnp.float32) for w, leaf in zip(weights, leaves, strict=True)]
        total: jax.Array = functools.reduce(jnp.add, terms)
        return total.astype(leaves[0].dtype)

    return jax.tree.map(mean, *params)
