"""Keys and values that decoding keeps.

They are kept head by head, [batch, heads, length, head_dim]: so the products of one query, which
are all that a step does with them, read them in the order in which they lie. Layers and PEFT
methods see them as they see all keys, [batch, length, heads, head_dim]; that costs nothing, since
compilers fold the two transpositions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int

from robust_ft.models.peft.base import Keys
from robust_ft.partitioning import constrain, locally

# Whole sequences on each device: a token attends to all of what is kept.
AXES = ("batch", "heads", None, "kv")


def by_head(keys: Keys) -> Keys:
    """Returns keys and values with the axes of length and heads exchanged, in either direction."""
    return {name: jnp.swapaxes(leaf, 1, 2) for name, leaf in keys.items()}


def keep(keys: Keys) -> Keys:
    """Returns keys and values as they are kept.

    Without the constraint, compilers may leave them as they were and reorder them in every step.
    It is each device's own, as compilers would gather all rows on all devices for it.
    """
    lies = functools.partial(with_layout_constraint, layouts=Layout((0, 1, 2, 3)))
    return {name: locally(lies, AXES)(leaf) for name, leaf in by_head(keys).items()}


def room(keys: Keys, length: int) -> Keys:
    """Returns empty kept keys and values for so many tokens, like these [batch, _, heads, dim]."""

    def empty(leaf: jax.Array) -> jax.Array:
        batch, _, heads, head_dim = leaf.shape
        return constrain(jnp.zeros((batch, heads, length, head_dim), leaf.dtype), *AXES)

    return jax.tree.map(empty, dict(keys))


def remember(kept: Keys, new: Keys, positions: Int[Array, "batch new"]) -> Keys:
    """Returns what is kept, with the keys and values [batch, new, heads, dim] of more tokens."""

    def write(leaf: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
        rows = jnp.arange(positions.shape[0])[:, None]
        return leaf.at[rows, :, positions].set(new)

    placed = locally(write, AXES, ("batch", None, "heads", "kv"), ("batch", None))
    return {name: placed(leaf, new[name], positions) for name, leaf in kept.items()}
