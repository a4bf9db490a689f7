"""What encoder-decoders share: attention masks, and the cache of a decoder that reads an encoder.

The encoder's output is the `memory` that the decoder's cross-attention reads. Its keys and values
are computed once; decoding neither extends nor reorders them.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from robust_ft.models import attention, kv_cache
from robust_ft.models.peft.base import KeyValues
from robust_ft.types import Batch

Cache = dict[str, Any]


def encoder_mask(
    input_mask: Bool[Array, "batch source"], batch: Batch
) -> Bool[Array, "batch #source source"]:
    """Returns what the encoder's self-attention sees: all tokens of the input or, packed, of the
    same example.
    """
    mask = input_mask[:, None, :]
    segments = attention.input_segments(batch, input_mask)
    return mask if segments is None else mask & attention.same_segment(segments, segments)


def decoder_masks(
    memory_mask: Bool[Array, "batch memory"], batch: Batch
) -> tuple[Bool[Array, "#batch target target"], Bool[Array, "batch #target memory"]]:
    """Returns what the decoder's self-attention and its cross-attention see."""
    slots = jnp.arange(batch["decoder_input_tokens"].shape[1])[None]  # [1, target]
    self_mask = slots[:, :, None] >= slots[:, None, :]
    cross_mask = memory_mask[:, None, :]
    if "decoder_segment_ids" in batch:
        segments = batch["decoder_segment_ids"]
        self_mask = self_mask & attention.same_segment(segments, segments)
        cross_mask &= attention.same_segment(segments, batch["encoder_segment_ids"])
    return self_mask, cross_mask


def new_cache(
    memory_keys: Sequence[KeyValues], memory_mask: Bool[Array, "batch memory"], max_length: int
) -> Cache:
    """Returns the cache of a decoder that has read nothing.

    Args:
        memory_keys: Each layer's keys and values of the memory.
        memory_mask: Which of the memory is not padding.
        max_length: The most tokens that will be read.
    """
    return {
        "position": jnp.zeros(memory_mask.shape[0], jnp.int32),  # [batch], of the next token
        "memory_mask": memory_mask,
        "layers": [
            {"self": kv_cache.empty(keys, max_length), "memory": kv_cache.filled(keys)}
            for keys in memory_keys
        ],
    }


def next_positions(cache: Cache, count: int) -> Int[Array, "batch new"]:
    """Returns the positions of the next tokens."""
    positions: Int[Array, "batch new"] = cache["position"][:, None] + jnp.arange(count)[None]
    return positions


def cached_length(cache: Cache) -> int:
    """Returns for how many tokens of the target the cache has room."""
    length: int = cache["layers"][0]["self"]["key"].shape[2]
    return length


def update(
    layer: Cache, new: KeyValues, positions: Int[Array, "batch new"]
) -> tuple[Cache, KeyValues, KeyValues]:
    """Adds the keys and values of more tokens to a layer's cache.

    Returns:
        The cache, and the keys and values that self-attention and cross-attention read, each
        [batch, length, heads, head_dim].
    """
    cache = {"self": kv_cache.update(layer["self"], new, positions), "memory": layer["memory"]}
    return cache, kv_cache.swap(cache["self"]), kv_cache.swap(cache["memory"])


def advance(cache: Cache, new_layers: Sequence[Cache], count: int) -> Cache:
    """Returns the cache after `count` more tokens, with the layers' caches that they left."""
    return cache | {"position": cache["position"] + count, "layers": list(new_layers)}
