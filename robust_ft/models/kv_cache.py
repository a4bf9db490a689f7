"""The KV cache of one attention: the keys and values of the tokens that were read.

It is [batch, heads, length, head_dim], where layers and PEFT methods have [batch, length, heads,
head_dim]: a decode step multiplies it with a single query, and reads it from memory in order. The
two transpositions between them cost nothing, since compilers fold them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int

from robust_ft.models.peft.base import KeyValues
from robust_ft.partitioning import constrain, locally

# The length is not sharded: a query attends to all of it.
AXES = ("batch", "heads", None, "kv")


def swap(keys: KeyValues) -> KeyValues:
    """Exchanges the axes of length and heads: from a layer's keys to the cache's, or back."""
    return {name: jnp.swapaxes(leaf, 1, 2) for name, leaf in keys.items()}


def filled(keys: KeyValues) -> KeyValues:
    """Returns a cache of these keys and values, which nothing is added to.

    Without the layout constraint, compilers may keep the layers' layout, and transpose the cache in
    every step. Each device has a constraint of its own (`locally`), as compilers would gather the
    rows of all devices for a common one.
    """
    in_order = functools.partial(with_layout_constraint, layouts=Layout((0, 1, 2, 3)))
    return {name: locally(in_order, AXES)(leaf) for name, leaf in swap(keys).items()}


def empty(like: KeyValues, length: int) -> KeyValues:
    """Returns a cache for `length` tokens with the heads of `like` [batch, _, heads, head_dim]."""

    def zeros(leaf: jax.Array) -> jax.Array:
        batch, _, heads, head_dim = leaf.shape
        return constrain(jnp.zeros((batch, heads, length, head_dim), leaf.dtype), *AXES)

    return {name: zeros(leaf) for name, leaf in like.items()}


def update(cache: KeyValues, new: KeyValues, positions: Int[Array, "batch new"]) -> KeyValues:
    """Writes the keys and values [batch, new, heads, head_dim] of more tokens at `positions`."""

    def write(leaf: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
        rows = jnp.arange(positions.shape[0])[:, None]  # [batch, 1], beside positions [batch, new]
        return leaf.at[rows, :, positions].set(new)

    # Rows are written where they are: compilers would gather all rows for the scatter.
    written = locally(write, AXES, ("batch", None, "heads", "kv"), ("batch", None))
    return {name: written(leaf, new[name], positions) for name, leaf in cache.items()}
