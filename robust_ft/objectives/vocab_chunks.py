"""The vocabulary in blocks: a head's logits of some tokens at a time, and its gradient's places."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_ft.models.model import Model
from robust_ft.partitioning import constrain, shards
from robust_ft.trainable import flatten, unflatten

# Blocks are multiples of it, as accelerators' registers are.
LANES = 128

# Logits of a block, or what is computed from them.
Values = Float[Array, "batch target parts width"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a vocabulary is divided.

    Where devices split the vocabulary, a block has tokens of every device's part: so each computes
    what it holds, and no weights travel.

    Attributes:
        vocab: Number of tokens.
        parts: Into how many equal parts devices split them.
        width: Tokens that a block has of each part.
    """

    vocab: int
    parts: int
    width: int

    @classmethod
    def holding(cls, limit: int, rows: int, length: int, vocab: int, embed: int) -> "Blocks":
        """Returns equal blocks of which each device holds about `limit` numbers, or fewer.

        These are a block's logits or, where devices have to gather them, its weights.

        Args:
            limit: If a device can hold all at once, there is one block.
            rows: Size of the batch.
            length: Target positions of each row.
            vocab: Number of tokens.
            embed: Weights of a token.
        """
        (parts,) = shards("vocab")
        held = rows * length * vocab // math.prod(shards("batch", "length", "vocab"))
        if shards("embed") != (1,):
            held = max(held, embed * vocab // parts)
        count = -(-held // limit)
        tokens = vocab // parts
        width = -(-tokens // max(count, 1))
        return cls(vocab, parts, min(-(-width // LANES) * LANES, tokens))

    @property
    def tokens(self) -> int:
        """Number of tokens of a part."""
        return self.vocab // self.parts

    @property
    def count(self) -> int:
        return -(-self.tokens // self.width)

    def at(self, turn: Int[Array, ""]) -> "Block":
        start = jnp.minimum(turn * self.width, self.tokens - self.width)
        places = start + jnp.arange(self.width)
        ids = jnp.arange(self.parts)[:, None] * self.tokens + places
        return Block(self, start, ids, places >= turn * self.width)

    def zeros(self, leaf: jax.Array, axis: int | None) -> jax.Array:
        """Returns what `Block.add` adds a parameter's gradient to.

        That of a token's weights comes from one block, and needs no wider type than theirs.
        """
        if axis is None:
            return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        return jnp.zeros_like(self.split(leaf, axis))

    def split(self, leaf: jax.Array, axis: int) -> jax.Array:
        """Returns [.., vocab, ..] or a block of it as [.., parts, tokens or width, ..]."""
        return leaf.reshape(*leaf.shape[:axis], self.parts, -1, *leaf.shape[axis + 1 :])


class Block(NamedTuple):
    """One block: `width` neighbours in every part of the vocabulary.

    The last one begins before its turn, so that it is as wide as the others.

    Attributes:
        blocks: The division that it is of.
        start: The position in each part of its first token.
        ids: Its tokens.
        fresh: Which are in no earlier block.
    """

    blocks: Blocks
    start: Int[Array, ""]
    ids: Int[Array, "parts width"]
    fresh: Bool[Array, "width"]

    def holds(self, targets: Int[Array, "batch target"]) -> Bool[Array, "batch target parts width"]:
        """Returns which of the fresh tokens are the targets."""
        return (self.ids == targets[..., None, None]) & self.fresh

    def take(self, leaf: jax.Array, axis: int | None) -> jax.Array:
        """Returns the block's slice of a parameter whose axis `axis` is the vocabulary, if any."""
        if axis is None:
            return leaf
        slices = self.blocks.split(leaf, axis)
        slices = jax.lax.dynamic_slice_in_dim(slices, self.start, self.blocks.width, axis + 1)
        return slices.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])

    def add(self, sums: jax.Array, found: jax.Array, axis: int | None) -> jax.Array:
        """Adds the gradient of what `take` returned to that of the whole parameter."""
        if axis is None:
            return sums + found
        found = self.blocks.split(found, axis)
        before = jax.lax.dynamic_slice_in_dim(sums, self.start, self.blocks.width, axis + 1)
        return jax.lax.dynamic_update_slice_in_dim(sums, before + found, self.start, axis + 1)

    def logits(
        self,
        model: Model,
        hidden: Float[Array, "batch target embed"],
        taken: Mapping[str, jax.Array],
        rng: jax.Array | None,
    ) -> Values:
        """Returns the block's logits.

        Args:
            model: The model of the whole vocabulary.
            hidden: What the head reads.
            taken: Slices of the head's parameters, by path.
            rng: For dropout in the head, if any.
        """
        blocks = self.blocks
        narrow = model.narrowed(blocks.parts * blocks.width)
        logits = narrow.head(unflatten(taken), hidden, rng)
        return blocks.split(constrain(logits, "batch", "length", "vocab"), 2)


@functools.lru_cache(maxsize=16)
def vocab_axes(model: Model) -> dict[str, int | None]:
    """Returns which axis of each parameter is the vocabulary, None where none is."""
    axes: dict[str, Any] = flatten(model.logical_axes())
    return {
        path: names.index("vocab") if "vocab" in names else None for path, names in axes.items()
    }
