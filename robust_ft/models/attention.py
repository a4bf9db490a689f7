"""The attention of all families: masks, and from queries, keys and values to what is mixed.

Masks are boolean, True where a query may see a key. Scores take them as a bias (`mask_to_bias`),
to which T5 adds its relative positions.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import attention_kernels
from robust_ft.models.peft.base import KeyValues
from robust_ft.partitioning import constrain
from robust_ft.types import AnyArray, Batch

# Large enough to vanish after softmax, small enough to add to scores in bfloat16.
MASKED = -1e10

Dropout = Callable[[jax.Array], jax.Array]


def input_mask(batch: Batch) -> Bool[AnyArray, "batch source"]:
    """Returns which of `encoder_input_tokens` are tokens, and not padding.

    The batch says so, in `encoder_input_mask` or, packed, in `encoder_segment_ids`; else all are.
    An id never tells: in many models that of padding is a token's, such as EOS.
    """
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"] > 0
    if "encoder_input_mask" in batch:
        return jnp.asarray(batch["encoder_input_mask"], bool)  # 0 and 1 will do
    return jnp.ones(batch["encoder_input_tokens"].shape, bool)


def same_segment(
    query_segments: Int[AnyArray, "batch query"], key_segments: Int[AnyArray, "batch key"]
) -> Bool[Array, "batch query key"]:
    """Returns which pairs belong to the same example of a packed row."""
    return jnp.equal(query_segments[:, :, None], key_segments[:, None, :])


def input_segments(
    batch: Batch, mask: Bool[Array, "batch input"]
) -> Int[AnyArray, "batch input"] | None:
    """Returns the example that each token of a packed row's input belongs to, None if unpacked.

    Args:
        batch: Packed rows have `encoder_segment_ids`.
        mask: Of the input as the model reads it, soft prompts included.

    Raises:
        UserError: A soft prompt has made the input longer than its segments.
    """
    segments = batch.get("encoder_segment_ids")
    if segments is not None and segments.shape != mask.shape:
        raise UserError("Packed batches cannot be combined with a soft prompt.")
    return segments


def mask_to_bias(mask: Bool[Array, "#batch #query key"]) -> Float[Array, "#batch 1 #query key"]:
    """Returns the attention bias, the same for all heads, that hides what the mask hides."""
    return jnp.where(mask, 0.0, MASKED)[:, None]


def split_heads(
    x: Float[Array, "batch length joined"], num_heads: int
) -> Float[Array, "batch length heads head_dim"]:
    """Splits the last axis into heads, which the mesh may shard."""
    x = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)
    return constrain(x, "batch", "length", "heads", "kv")


def active(dropout: nn.Dropout, deterministic: bool) -> Dropout | None:
    """Returns the dropout as a function, None if it changes nothing."""
    if deterministic or dropout.rate == 0:
        return None
    return functools.partial(dropout, deterministic=False)


def attend(
    query: Float[Array, "batch query heads head_dim"],
    blocks: Sequence[KeyValues],
    bias: Float[Array, "#batch #heads #query key"],
    dropout: Dropout | None,
    scale: float = 1.0,
    kernel: str = "xla",
) -> Float[Array, "batch query joined"]:
    """Returns the values that each query attends to, heads joined; softmax is in float32.

    Args:
        query: The queries.
        blocks: Keys and values, each [batch, block, kv_heads, head_dim], in one or more blocks
            whose lengths add up to the bias's. So a prefix, the input's and the target's KV cache
            need not be concatenated at every decode step. With fewer kv_heads than heads,
            consecutive heads share keys and values (grouped-query attention), and the bias is the
            same for all heads.
        bias: Added to the scores, such as `mask_to_bias`.
        dropout: Applied to the attention weights, if any.
        scale: Factor of the scores.
        kernel: A config's `attention`, see `attention_kernels`.
    """
    if attention_kernels.uses_cudnn(kernel, query, blocks, dropout is not None):
        return attention_kernels.fused(query, blocks, bias, scale)
    batch, length, heads, head_dim = query.shape
    kv_heads = blocks[0]["key"].shape[2]
    if kv_heads < heads:
        # An axis of its own for the heads of a group, "..." below; each key is read once for all.
        query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        bias = bias[:, :, None]  # [batch, 1, 1, query, key]
    # Each [batch, kv_heads, (group,) query, block], accumulated in float32 also from bfloat16.
    scores = [
        jnp.einsum("bqh...d,bkhd->bh...qk", query, keys["key"], preferred_element_type=jnp.float32)
        for keys in blocks
    ]
    # One softmax over all blocks: the scores are concatenated, which is cheaper than the keys.
    weights = jax.nn.softmax(jnp.concatenate(scores, -1) * scale + bias, axis=-1)
    weights = weights.astype(query.dtype)  # [batch, kv_heads, (group,) query, key]
    if dropout is not None:
        weights = dropout(weights)
    ends = np.cumsum([keys["key"].shape[1] for keys in blocks])
    # The weighted values of each block, [batch, query, kv_heads, (group,) head_dim], add up.
    mixed = sum(
        jnp.einsum("bh...qk,bkhd->bqh...d", part, keys["value"])
        for part, keys in zip(jnp.split(weights, ends[:-1], axis=-1), blocks, strict=True)
    )
    return jnp.reshape(mixed, (batch, length, heads * head_dim))
