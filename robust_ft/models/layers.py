"""Layers that the families share; each calls the PEFT hooks of its site in one line."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from robust_ft.models.attention import active, attend, input_mask, split_heads
from robust_ft.models.axes import with_axes
from robust_ft.models.options import ACTIVATIONS
from robust_ft.models.peft.base import KeyValues, Peft
from robust_ft.models.product import product
from robust_ft.partitioning import constrain
from robust_ft.types import AnyArray, Batch

Initializer = Callable[..., jax.Array]

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def per_feature(vector: Float[Array, "features"], x: jax.Array) -> jax.Array:
    """Returns a vector with the rank of x, to broadcast along x's last axis."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Dense(nn.Module):
    """A matrix product: [..., inputs] -> [..., features].

    Attributes:
        features: Size of the output.
        axes: Logical axes of the kernel.
        dtype: Type in which the product is computed.
        output_dtype: Type of the result, by default the inputs'. A wider one keeps the digits in
            which accelerators accumulate.
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
            bias = self.param("bias", init, (self.features,), self.param_dtype)
            y = y + per_feature(bias, y).astype(y.dtype)
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
        # Parameters may be bfloat16: the product is in float32 all the same.
        return (x * per_feature(scale, x).astype(jnp.float32)).astype(self.dtype)


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
        scale, bias = (per_feature(each, x).astype(jnp.float32) for each in (scale, bias))
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

    def __call__(self, tokens: Int[AnyArray, "batch length"]) -> Float[Array, "batch length embed"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return constrain(x, "batch", "length", "activation_embed")

    def attend(self, x: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits: the dot products with every token's embedding."""
        logits: jax.Array = jnp.einsum(
            "...e,ve->...v",
            x,
            self.embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits


def with_prompts(
    scope: nn.Module,
    x: Float[Array, "batch source embed"],
    batch: Batch,
    peft: Sequence[Peft],
) -> tuple[Float[Array, "batch input embed"], Bool[Array, "batch input"]]:
    """Returns the embedded input with its soft prompts, and which of it is not padding.

    Args:
        scope: The module that gets the prompts' parameters, in a compact method.
        x: The embedded `encoder_input_tokens`; learned positions are added later.
        batch: Where they come from.
        peft: The methods whose `embed` is called.
    """
    mask = jnp.asarray(input_mask(batch))
    for method in peft:
        x, mask = method.embed(scope, x, mask, batch)
    return x, mask


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
        # [*batch, query, key]: positive where the key is ahead of the query
        distance = key_positions[..., None, :] - query_positions[..., :, None]
        buckets = relative_position_bucket(
            distance, self.bidirectional, self.num_buckets, self.max_distance
        )  # [*batch, query, key]
        bias = jnp.take(table.astype(jnp.float32).T, buckets, axis=0)  # [*batch, query, key, heads]
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

    The table is computed on the host, because accelerators' logarithms may miss the exact distances
    at which buckets begin (16, 32 and 64 in T5).
    """
    exact = num_buckets // 2  # as many distances have a bucket each
    distance = np.arange(max_distance + 1)
    share = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    # Without the small number, a share of exactly k buckets may be rounded to just below k.
    logarithmic = exact + (share * (num_buckets - exact) + 1e-9).astype(np.int32)
    buckets = np.where(distance < exact, distance, np.minimum(logarithmic, num_buckets - 1))
    return buckets.astype(np.int32)


class Attention(nn.Module):
    """Multi-head attention in two halves, between which decoding puts the KV cache.

    `project` computes the keys and values of a sequence, `__call__` attends to them.

    Attributes:
        use_bias: Whether the four projections have a bias.
        scale: Factor of the scores. Where it is 1, as in T5, and not head_dim^-0.5, the query
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

        # T5 has no factor on the scores: it is in the query kernel from the start, and Adafactor's
        # steps are relative to a parameter's size.
        def query_init(*args: Any) -> jax.Array:
            return fan_in_normal(*args) / (math.sqrt(self.head_dim) * self.scale)

        joined = self.num_heads * self.head_dim
        self.query = projection(joined, ("embed", "joined_kv"), query_init)
        self.key = projection(joined, ("embed", "joined_kv"), fan_in_normal)
        self.value = projection(joined, ("embed", "joined_kv"), fan_in_normal)
        self.out = projection(self.embed_dim, ("joined_kv", "embed"), fan_in_normal)
        self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=self.dropout_dims)

    def project(self, x: Float[Array, "batch key embed"]) -> KeyValues:
        """Returns {"key", "value"}, each [batch, key, heads, head_dim]."""
        return {"key": self._split(self.key(x)), "value": self._split(self.value(x))}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        keys: KeyValues,
        bias: Float[Array, "#batch #heads #query key"],
        deterministic: bool,
    ) -> Float[Array, "batch query embed"]:
        query = self._split(self.query(x))
        blocks: Sequence[KeyValues] = [keys]
        for method in self.peft:
            blocks, bias = method.kv(self, blocks, bias)
        dropout = active(self.dropout, deterministic)
        return self.out(attend(query, blocks, bias, dropout, self.scale, self.kernel))

    def _split(self, x: Float[Array, "batch length joined"]) -> jax.Array:
        return split_heads(x, self.num_heads)


class MLP(nn.Module):
    """The feed-forward sublayer; with two input kernels a gated one: wo(f(wi_0 x) * g(wi_1 x)).

    Attributes:
        activations: Names in `robust_ft.models.options.ACTIVATIONS`.
        dropout_rate: Of the hidden units.
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
        # [batch, length, mlp]: T5 1.1 and Llama multiply two activations, T5 1.0 has one kernel.
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
