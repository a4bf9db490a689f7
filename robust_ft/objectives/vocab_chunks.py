"""The vocabulary in chunks: slices of an output head, their logits and gradients."""

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

# Widths are multiples of it: the lanes of a TPU's vector registers.
LANES = 128

# Logits of a chunk, or anything computed from them.
ChunkValues = Float[Array, "batch target shards width"]


@dataclasses.dataclass(frozen=True)
class VocabChunks:
    """The division of a vocabulary into chunks of equal width.

    Where the mesh shards the vocabulary, a chunk takes `width` tokens of every shard. Each device
    then computes with the weights that it holds, and no weights are gathered.

    Attributes:
        vocab_size: Number of tokens.
        shards: Number of equal shards that devices split the vocabulary into.
        width: Number of tokens that a chunk takes of each shard.
    """

    vocab_size: int
    shards: int
    width: int

    @classmethod
    def fitting(
        cls, limit: int, batch: int, length: int, vocab_size: int, emb_dim: int
    ) -> "VocabChunks":
        """Returns the fewest chunks of which each device holds at most about `limit` elements.

        These are a chunk's logits or, where the weights are sharded along the embedding axis, its
        gathered weights. If a device can hold all logits at once, there is one chunk.

        Args:
            limit: The most elements of a chunk on a device.
            batch: Number of examples.
            length: Number of target positions of each example.
            vocab_size: Number of tokens.
            emb_dim: Number of weights of a token.
        """
        (vocab_shards,) = shards("vocab")
        elements = batch * length * vocab_size // math.prod(shards("batch", "length", "vocab"))
        if shards("embed") != (1,):
            elements = max(elements, emb_dim * vocab_size // vocab_shards)
        count = -(-elements // limit)
        shard_size = vocab_size // vocab_shards
        width = -(-shard_size // max(count, 1))
        return cls(vocab_size, vocab_shards, min(-(-width // LANES) * LANES, shard_size))

    @property
    def shard_size(self) -> int:
        """Number of tokens of each shard."""
        return self.vocab_size // self.shards

    @property
    def count(self) -> int:
        return -(-self.shard_size // self.width)

    def chunk(self, index: Int[Array, ""]) -> "Chunk":
        # The last chunk starts early enough to be as wide as the others: shapes are static.
        start = jnp.minimum(index * self.width, self.shard_size - self.width)
        positions = start + jnp.arange(self.width)  # [width], within a shard
        token_ids = jnp.arange(self.shards)[:, None] * self.shard_size + positions[None]
        return Chunk(self, start, token_ids, positions >= index * self.width)

    def zero_gradient(self, param: jax.Array, axis: int | None) -> jax.Array:
        """Returns the zeros to which `Chunk.add_gradient` adds a parameter's gradient.

        Args:
            param: A parameter of the head.
            axis: Its vocabulary axis. None if it has none: then every chunk contributes to the
                gradient, which is summed in float32. With a vocabulary axis each element comes from
                one chunk, and no wider type is needed.
        """
        if axis is None:
            return jnp.zeros(param.shape, jnp.float32)
        return jnp.zeros_like(self.split(param, axis))

    def split(self, array: jax.Array, axis: int) -> jax.Array:
        """Splits the vocabulary axis: [..., vocab, ...] -> [..., shards, vocab / shards, ...]."""
        return array.reshape(*array.shape[:axis], self.shards, -1, *array.shape[axis + 1 :])


class Chunk(NamedTuple):
    """One chunk: `width` neighbouring tokens of every shard of the vocabulary.

    Attributes:
        chunks: The division that it belongs to.
        start: Its first token's position within each shard.
        token_ids: Its tokens.
        is_new: Which of the width are in no earlier chunk: the last chunk overlaps the one before
            it where the width does not divide a shard.
    """

    chunks: VocabChunks
    start: Int[Array, ""]
    token_ids: Int[Array, "shards width"]
    is_new: Bool[Array, "width"]

    def is_target(
        self, targets: Int[Array, "batch target"]
    ) -> Bool[Array, "batch target shards width"]:
        """Returns which of the new tokens are the targets."""
        matches = self.token_ids[None, None] == targets[..., None, None]
        return matches & self.is_new[None, None, None]

    def slice(self, param: jax.Array, axis: int | None) -> jax.Array:
        """Returns the chunk's slice of a parameter along its vocabulary axis, if it has one."""
        if axis is None:
            return param
        split = self.chunks.split(param, axis)  # [..., shards, vocab / shards, ...]
        split = jax.lax.dynamic_slice_in_dim(split, self.start, self.chunks.width, axis + 1)
        return split.reshape(*param.shape[:axis], -1, *param.shape[axis + 1 :])

    def add_gradient(self, total: jax.Array, gradient: jax.Array, axis: int | None) -> jax.Array:
        """Adds the gradient of what `slice` returned to the whole parameter's."""
        if axis is None:
            return total + gradient.astype(total.dtype)
        gradient = self.chunks.split(gradient, axis)  # [..., shards, width, ...]
        # Added, not overwritten: the last chunk overlaps the one before it.
        before = jax.lax.dynamic_slice_in_dim(total, self.start, self.chunks.width, axis + 1)
        return jax.lax.dynamic_update_slice_in_dim(total, before + gradient, self.start, axis + 1)

    def logits(
        self,
        model: Model,
        hidden: Float[Array, "batch target embed"],
        head: Mapping[str, jax.Array],
        rng: jax.Array | None,
    ) -> ChunkValues:
        """Returns the chunk's logits.

        Args:
            model: The model of the whole vocabulary.
            hidden: What its head reads.
            head: Slices of the head's parameters, by path.
            rng: For dropout in the head, if any.
        """
        narrow = model.narrowed(self.chunks.shards * self.chunks.width)
        logits = narrow.head(unflatten(head), hidden, rng)  # [batch, target, shards * width]
        return self.chunks.split(constrain(logits, "batch", "length", "vocab"), 2)


@functools.lru_cache(maxsize=16)
def vocab_axes(model: Model) -> dict[str, int | None]:
    """Returns which axis of each parameter is the vocabulary; None where none is."""
    axes: dict[str, Any] = flatten(model.logical_axes())
    return {
        path: names.index("vocab") if "vocab" in names else None for path, names in axes.items()
    }
