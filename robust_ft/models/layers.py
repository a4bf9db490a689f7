"""Layers shared by the models; each calls the PEFT hooks of its site in one line."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from robust_ft.models import attention_kernels
from robust_ft.models.axes import with_axes
from robust_ft.models.options import ACTIVATIONS
from robust_ft.models.peft.base import Keys, Peft
from robust_ft.models.product import product
from robust_ft.partitioning import constrain

Initializer = Callable[..., jax.Array]

# Large enough to vanish after softmax, small enough to add to scores in bfloat16.
MASKED = -1e10

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Dense(nn.Module):
    """A matrix product: [..., inputs] -> [..., features].

    Attributes:
        features: Size of the output.
        axes: Logical axes of the kernel.
        dtype: Type in which the product is computed.
        output_dtype: Type of the result, by default the inputs'; a wider one loses nothing of
            what accelerators accumulate.
        use_bias: Whether a bias is added.
    """

    features: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = fan_in_normal
    peft: tuple[Peft, ...] = ()
    output_dtype: Any = None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*rest inputs"]) -> Float[Array, "*rest features"]:
        kernel = self.param(
            "kernel",
            with_axes(self.kernel_init, *self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        for method in self.peft:
            x = method.dense_input(self, x)
        y = product(x, kernel.astype(self.dtype), self.output_dtype)
        if self.use_bias:
            init = with_axes(nn.initializers.zeros, self.axes[1])
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(y.dtype)
        for method in self.peft:
            y = method.dense(self, x, y)
        return y


class RMSNorm(nn.Module):
    """T5's layer norm: no mean is subtracted and there is no bias; computed in float32.

    Attributes:
        axis: Logical axis of what is normalized.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    epsilon: float = 1e-6
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*rest embed"]) -> Float[Array, "*rest embed"]:
        scale = self.param(
            "scale",
            with_axes(nn.initializers.ones, self.axis),
            (x.shape[-1],),
            self.param_dtype,
        )
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last axis, then scale and bias; computed in float32."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*rest embed"]) -> Float[Array, "*rest embed"]:
        ones, zeros = (
            with_axes(init, "embed") for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class Embedding(nn.Module):
    """A table of token embeddings, also usable as the output head (`attend`).

    Attributes:
        axis: Logical axis of the rows: "vocab", or "length" for a table of positions.
        stddev: Of the initial values.
    """

    vocab_size: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis: str = "vocab"
    stddev: float = 1.0

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            with_axes(nn.initializers.normal(self.stddev), self.axis, "embed"),
            (self.vocab_size, self.features),
            self.param_dtype,
        )

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return constrain(x, "batch", "length", "activation_embed")

    def attend(self, x: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits: the dot products with every token's embedding."""
        return jnp.einsum(
            "...e,ve->...v",
            x,
            self.embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


class RelativePositionBias(nn.Module):
    """T5's bucketed relative position bias, one table for a whole stack of layers."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query_positions: Int[Array, "*batch query"], key_positions: Int[Array, "*batch key"]
    ) -> Float[Array, "*batch heads query key"]:
        table = self.param(
            "rel_embedding",
            with_axes(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                "heads",
                "relpos_buckets",
            ),
            (self.num_heads, self.num_buckets),
            self.param_dtype,
        )
        distance = key_positions[..., None, :] - query_positions[..., :, None]
        buckets = relative_position_bucket(
            distance, self.bidirectional, self.num_buckets, self.max_distance
        )  # [*batch, query, key]
        bias = jnp.take(table.astype(jnp.float32).T, buckets, axis=0)
        return jnp.moveaxis(bias, -1, -3)


def relative_position_bucket(
    distance: Int[Array, "*rest"], bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "*rest"]:
    """Maps key position minus query position to a bucket.

    Half of the buckets hold one distance each; the others grow logarithmically up to
    `max_distance`, beyond which all distances share the last one. Bidirectional attention keeps
    one half of the buckets for keys behind the query, the other for keys ahead; causal attention
    has buckets for keys behind only.
    """
    if bidirectional:
        num_buckets //= 2
    table = jnp.asarray(_distance_buckets(num_buckets, max_distance))
    behind = table[jnp.clip(-distance, 0, max_distance)]
    if not bidirectional:
        return behind
    ahead = num_buckets + table[jnp.clip(distance, 0, max_distance)]
    return jnp.where(distance > 0, ahead, behind)


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the buckets of the distances 0 to `max_distance`.

    A table made on the host, because accelerators' logarithms may miss the exact distances at
    which buckets begin (16, 32 and 64 in T5).
    """
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    share = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (share * (num_buckets - exact) + 1e-9).astype(np.int32)
    buckets = np.where(distance < exact, distance, np.minimum(logarithmic, num_buckets - 1))
    return buckets.astype(np.int32)


class Attention(nn.Module):
    """Multi-head attention in two halves, so that decoding can keep keys and values.

    `project` makes keys and values of the attended sequence, `__call__` attends to them.

    Attributes:
        use_bias: Whether the four projections have a bias.
        scale: Factor of the scores; where it is 1, as in T5, and not head_dim^-0.5, the query
            kernel is initialized smaller instead.
        dropout_dims: Axes of the attention weights along which one dropout mask is shared.
        kernel: What computes it, a config's `attention`.
    """

    num_heads: int
    head_dim: int
    embed_dim: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    peft: tuple[Peft, ...] = ()
    use_bias: bool = False
    scale: float = 1.0
    dropout_dims: tuple[int, ...] = (-2,)
    kernel: str = "xla"

    def setup(self) -> None:
        def projection(features: int, axes: tuple[str, str], init: Initializer) -> Dense:
            return Dense(
                features,
                axes,
                self.dtype,
                self.param_dtype,
                init,
                self.peft,
                use_bias=self.use_bias,
            )

        def query_init(*args: Any) -> jax.Array:
            return fan_in_normal(*args) / (math.sqrt(self.head_dim) * self.scale)

        joined = self.num_heads * self.head_dim
        self.query = projection(joined, ("embed", "joined_kv"), query_init)
        self.key = projection(joined, ("embed", "joined_kv"), fan_in_normal)
        self.value = projection(joined, ("embed", "joined_kv"), fan_in_normal)
        self.out = projection(self.embed_dim, ("joined_kv", "embed"), fan_in_normal)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=self.dropout_dims)

    def project(self, x: Float[Array, "batch key embed"]) -> dict[str, jax.Array]:
        """Returns {"key", "value"}, each [batch, key, heads, head_dim]."""
        return {"key": self._split(self.key(x)), "value": self._split(self.value(x))}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        keys: Keys,
        bias: Float[Array, "#batch #heads query key"],
        deterministic: bool,
    ) -> Float[Array, "batch query embed"]:
        query = self._split(self.query(x))
        blocks: Sequence[Keys] = [keys]
        for method in self.peft:
            blocks, bias = method.kv(self, blocks, bias)
        dropout = active(self.dropout, deterministic)
        return self.out(attended(query, blocks, bias, dropout, self.scale, self.kernel))

    def _split(self, x: Float[Array, "batch length joined"]) -> jax.Array:
        return split_heads(x, self.num_heads)


def split_heads(
    x: Float[Array, "batch length joined"], num_heads: int
) -> Float[Array, "batch length heads head_dim"]:
    """Returns the same numbers by head, the heads placed as the mesh has them."""
    x = x.reshape(*x.shape[:2], num_heads, -1)
    return constrain(x, "batch", "length", "heads", "kv")


def active(dropout: nn.Dropout, deterministic: bool) -> Callable[[jax.Array], jax.Array] | None:
    """Returns the dropout as a function, None if it changes nothing."""
    if deterministic or dropout.rate == 0:
        return None
    return functools.partial(dropout, deterministic=False)


def attended(
    query: Float[Array, "batch query heads head_dim"],
    blocks: Sequence[Keys],
    bias: Float[Array, "#batch #heads query key"],
    dropout: Callable[[jax.Array], jax.Array] | None,
    scale: float = 1.0,
    kernel: str = "xla",
) -> Float[Array, "batch query joined"]:
    """Returns the values that attention mixes, heads joined; softmax is in float32.

    Args:
        query: What attends.
        blocks: {"key", "value"} of what is attended to, each [batch, part, heads, head_dim]. What
            decoding keeps in parts need not be joined at every step.
        bias: Added to the scores, such as `mask_bias`.
        dropout: Applied to the weights, if any.
        scale: Factor of the scores.
        kernel: What computes it, see `attention_kernels`.
    """
    if attention_kernels.uses_cudnn(kernel, query, blocks, dropout is not None):
        return attention_kernels.fused(query, blocks, bias, scale)
    scores = [
        jnp.einsum("bqhd,bkhd->bhqk", query, keys["key"], preferred_element_type=jnp.float32)
        for keys in blocks
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, -1) * scale + bias, axis=-1)
    weights = weights.astype(query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    ends = np.cumsum([keys["key"].shape[1] for keys in blocks])
    mixed = sum(
        jnp.einsum("bhqk,bkhd->bqhd", part, keys["value"])
        for part, keys in zip(jnp.split(weights, ends[:-1], axis=-1), blocks, strict=True)
    )
    return jnp.reshape(mixed, (*query.shape[:2], -1))


class MLP(nn.Module):
    """The feed-forward sublayer: the product of one activation per input kernel, then `wo`.

    Attributes:
        activations: Names in `robust_ft.models.options.ACTIVATIONS`.
        dropout_rate: Of what the activations give.
        dropout_dims: Axes along which one dropout mask is shared.
    """

    hidden_dim: int
    activations: Sequence[str]
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    peft: tuple[Peft, ...] = ()
    use_bias: bool = False
    dropout_dims: tuple[int, ...] = (-2,)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], deterministic: bool
    ) -> Float[Array, "batch length embed"]:
        hidden: Any = 1
        for i, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{i}"
            y = Dense(
                self.hidden_dim,
                ("embed", "mlp"),
                self.dtype,
                self.param_dtype,
                peft=self.peft,
                use_bias=self.use_bias,
                name=name,
            )(x)
            hidden = hidden * ACTIVATIONS[activation](y)
        hidden = nn.Dropout(self.dropout_rate, broadcast_dims=self.dropout_dims)(
            hidden, deterministic=deterministic
        )
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(
            x.shape[-1],
            ("mlp", "embed"),
            self.dtype,
            self.param_dtype,
            peft=self.peft,
            use_bias=self.use_bias,
            name="wo",
        )(hidden)


def mask_bias(
    allowed: Bool[Array, "batch #query key"],
) -> Float[Array, "batch one #query key"]:
    """Returns an attention bias, the same for all heads, that hides what is not allowed."""
    return jnp.where(allowed, 0.0, MASKED)[:, None]


def same_segment(
    query_segments: Int[Array, "batch query"], key_segments: Int[Array, "batch key"]
) -> Bool[Array, "batch query key"]:
    """Returns which pairs belong to the same example of a packed row."""
    return query_segments[:, :, None] == key_segments[:, None, :]
