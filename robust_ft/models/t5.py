"""T5 1.1 and its relatives: an encoder-decoder with relative positions.

Parameter names and shapes are t5x's. `T5Config` is flat; the module reads top to bottom.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import encoder_decoder, layers
from robust_ft.models.attention import mask_to_bias
from robust_ft.models.config import ModelConfig
from robust_ft.models.encoder_decoder import Cache
from robust_ft.models.options import rematerialized
from robust_ft.models.peft.base import KeyValues, Peft, decoder_slots
from robust_ft.partitioning import constrain
from robust_ft.ranges import Count, Range
from robust_ft.types import AnyArray, Batch

ACTIVATIONS = ("gelu", "relu", "silu", "swish", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Sizes and switches of a T5; the defaults are T5 1.1 small.

    Attributes:
        num_heads: Heads of each attention.
        head_dim: Width of a head.
        mlp_dim: Width of the MLP's inner layer.
        num_encoder_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder.
        mlp_activations: Names in `robust_ft.models.options.ACTIVATIONS`, whose results are
            multiplied: two of them gate (T5 1.1), one is plain (T5 1.0).
        logits_via_embedding: Use the token embedding as the output head, scaled by
            emb_dim^-0.5 (T5 1.0); otherwise the head has its own kernel (T5 1.1, mT5).
        scaled_head: Scale the logits of a head with its own kernel, too.
        relative_num_buckets: Buckets of relative positions, each with a bias of its own.
        relative_max_distance: All larger distances share the last bucket.
    """

    vocab_size: Count = 32128
    emb_dim: Count = 512
    num_heads: Count = 6
    head_dim: Count = 64
    mlp_dim: Count = 1024
    num_encoder_layers: Count = 8
    num_decoder_layers: Count = 8
    mlp_activations: Sequence[str] = ("gelu", "linear")
    logits_via_embedding: bool = False
    scaled_head: bool = False
    # Encoders give each direction half of the buckets and one distance each to half of those.
    relative_num_buckets: Annotated[int, Range(least=4)] = 32
    relative_max_distance: Count = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        # gin gives lists; a frozen config has to be hashable.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        self.check_choice("mlp_activations", ACTIVATIONS)
        if self.relative_max_distance <= self.relative_num_buckets // 2:
            raise UserError(
                f"T5Config.relative_max_distance={self.relative_max_distance} must be above half "
                f"of relative_num_buckets={self.relative_num_buckets}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "T5":
        return T5(self, peft)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with norm before and residual around it.

    The bias comes in two terms, by position and by mask. Their sum is as large as the scores, and
    so is its gradient. Added up outside of the layers, the sum would have one gradient for each
    layer, all of them held until the backward pass has added them.
    """

    config: T5Config
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch source embed"],
        position_bias: Float[Array, "1 heads source source"],
        mask_bias: Float[Array, "batch 1 #source source"],
    ) -> Float[Array, "batch source embed"]:
        attention = _attention(self.config, self.peft, "attention")
        y = _norm(self.config, "pre_attention_layer_norm")(x)
        bias = position_bias + mask_bias  # [batch, heads, source, source]
        y = attention(y, attention.project(y), bias, self.deterministic)
        x = x + self._sublayer("attention", y)
        y = _norm(self.config, "pre_mlp_layer_norm")(x)
        x = x + self._sublayer("mlp", _mlp(self.config, self.peft)(y, self.deterministic))
        return constrain(x, "batch", "length", "activation_embed")

    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = _dropout(self.config)(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Encoder(nn.Module):
    """The stack of encoder layers over the embedded input."""

    config: T5Config
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch source embed"], batch: Batch
    ) -> tuple[Float[Array, "batch memory embed"], Bool[Array, "batch memory"]]:
        cfg = self.config
        x, input_mask = layers.with_prompts(self, x, batch, self.peft)
        positions = jnp.arange(x.shape[1])[None]  # [1, source], soft prompts included
        position_bias = _relative_bias(cfg, bidirectional=True)(positions, positions)
        mask_bias = mask_to_bias(encoder_decoder.encoder_mask(input_mask, batch))
        x = _dropout(cfg)(x, deterministic=self.deterministic)
        layer_class = rematerialized(EncoderLayer, cfg.remat)
        for i in range(cfg.num_encoder_layers):
            layer = layer_class(cfg, self.peft, self.deterministic, name=f"layers_{i}")
            x = layer(x, position_bias, mask_bias)
        x = _norm(cfg, "encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=self.deterministic), input_mask


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and MLP.

    It runs over a whole target at once (`__call__`) or, with a KV cache, over the tokens that
    follow (`extend`).
    """

    config: T5Config
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.pre_self_attention_layer_norm = _norm(cfg)
        self.self_attention = _attention(cfg, self.peft)
        self.pre_cross_attention_layer_norm = _norm(cfg)
        self.encoder_decoder_attention = _attention(cfg, self.peft)
        self.pre_mlp_layer_norm = _norm(cfg)
        self.mlp = _mlp(cfg, self.peft, name=None)
        self.dropout = _dropout(cfg)

    def __call__(
        self,
        x: Float[Array, "batch target embed"],
        memory: Float[Array, "batch memory embed"],
        position_bias: Float[Array, "1 heads target key"],
        mask_bias: Float[Array, "#batch 1 target key"],
        memory_bias: Float[Array, "batch 1 #target memory"],
    ) -> Float[Array, "batch target embed"]:
        y = self.pre_self_attention_layer_norm(x)
        keys = self.self_attention.project(y)
        memory_keys = self.project_memory(memory)
        self_bias = position_bias + mask_bias
        return self._sublayers(x, y, keys, self_bias, memory_keys, memory_bias)

    def project_memory(self, memory: Float[Array, "batch memory embed"]) -> KeyValues:
        return self.encoder_decoder_attention.project(memory)

    def extend(
        self,
        x: Float[Array, "batch new embed"],
        cache: Cache,
        positions: Int[Array, "batch new"],
        self_bias: Float[Array, "batch heads new key"],
        memory_bias: Float[Array, "batch 1 1 memory"],
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.project(y)
        cache, keys, memory_keys = encoder_decoder.update(cache, new, positions)
        return self._sublayers(x, y, keys, self_bias, memory_keys, memory_bias), cache

    def _sublayers(
        self,
        x: jax.Array,
        y: jax.Array,
        keys: KeyValues,
        self_bias: jax.Array,
        memory_keys: KeyValues,
        memory_bias: jax.Array,
    ) -> jax.Array:
        y = self.self_attention(y, keys, self_bias, self.deterministic)
        x = x + self._sublayer("self_attention", y)
        y = self.pre_cross_attention_layer_norm(x)
        attended = self.encoder_decoder_attention(y, memory_keys, memory_bias, self.deterministic)
        x = x + self._sublayer("encoder_decoder_attention", attended)
        y = self.pre_mlp_layer_norm(x)
        x = x + self._sublayer("mlp", self.mlp(y, self.deterministic))
        return constrain(x, "batch", "length", "activation_embed")

    @nn.compact
    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = self.dropout(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Decoder(nn.Module):
    """The stack of decoder layers over the embedded target."""

    config: T5Config
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.relpos_bias = _relative_bias(cfg, bidirectional=False, name=None)
        layer_class = rematerialized(DecoderLayer, cfg.remat)
        self.layers = [
            layer_class(cfg, self.peft, self.deterministic) for _ in range(cfg.num_decoder_layers)
        ]
        self.decoder_norm = _norm(cfg)
        self.dropout = _dropout(cfg)
        if not cfg.logits_via_embedding:
            self.logits_dense = layers.Dense(
                cfg.vocab_size,
                ("embed", "vocab"),
                cfg.dtype,
                cfg.param_dtype,
                peft=self.peft,
                output_dtype=jnp.float32,
            )

    def __call__(
        self,
        x: Float[Array, "batch target embed"],
        memory: Float[Array, "batch memory embed"],
        memory_mask: Bool[Array, "batch memory"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        self_mask, memory_mask = encoder_decoder.decoder_masks(memory_mask, batch)
        # A counted prefix has the positions before the target's, and all tokens see it.
        slots = decoder_slots(self.peft)
        self_mask = jnp.pad(self_mask, ((0, 0), (0, 0), (slots, 0)), constant_values=True)
        positions = jnp.arange(x.shape[1])[None]  # [1, target]
        key_positions = jnp.arange(-slots, x.shape[1])[None]  # [1, slots + target]
        position_bias = self.relpos_bias(positions, key_positions)
        mask_bias, memory_bias = mask_to_bias(self_mask), mask_to_bias(memory_mask)
        x = self.dropout(x, deterministic=self.deterministic)
        for layer in self.layers:
            x = layer(x, memory, position_bias, mask_bias, memory_bias)
        x = self.dropout(self.decoder_norm(x), deterministic=self.deterministic)
        return x

    def empty_cache(
        self,
        memory: Float[Array, "batch memory embed"],
        memory_mask: Bool[Array, "batch memory"],
        max_length: int,
    ) -> Cache:
        memory_keys = [layer.project_memory(memory) for layer in self.layers]
        return encoder_decoder.new_cache(memory_keys, memory_mask, max_length)

    def extend(
        self, x: Float[Array, "batch new embed"], cache: Cache
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        positions = encoder_decoder.next_positions(cache, x.shape[1])
        key_positions = jnp.arange(
            -decoder_slots(self.peft), encoder_decoder.cached_length(cache)
        )  # [slots + length]
        self_mask = key_positions[None, None] <= positions[:, :, None]
        position_bias = self.relpos_bias(
            positions, jnp.broadcast_to(key_positions, (x.shape[0], *key_positions.shape))
        )
        self_bias = position_bias + mask_to_bias(self_mask)  # [batch, heads, new, slots + length]
        memory_bias = mask_to_bias(cache["memory_mask"][:, None, :])
        new_layers = []
        for layer, layer_cache in zip(self.layers, cache["layers"], strict=True):
            x, layer_cache = layer.extend(x, layer_cache, positions, self_bias, memory_bias)
            new_layers.append(layer_cache)
        return self.decoder_norm(x), encoder_decoder.advance(cache, new_layers, x.shape[1])


class T5(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: T5Config
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.param_dtype
        )
        self.encoder = Encoder(cfg, self.peft, self.deterministic)
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the decoder's last hidden states, what `head` turns into logits."""
        memory, memory_mask = self._encode(batch)
        x = self.token_embedder(batch["decoder_input_tokens"])
        return self.decoder(x, memory, memory_mask, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        cfg = self.config
        logits: jax.Array
        if cfg.logits_via_embedding:
            logits = self.token_embedder.attend(hidden)
        else:
            logits = self.decoder.logits_dense(hidden)
        # T5 1.0 scales what its head reads, as its embedding was not initialized for a head.
        scaled = cfg.logits_via_embedding or cfg.scaled_head
        return logits * cfg.emb_dim**-0.5 if scaled else logits

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Encodes the input and returns an empty cache for targets up to `max_length` tokens."""
        return self.decoder.empty_cache(*self._encode(batch), max_length)

    def extend(
        self, cache: Cache, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self.token_embedder(tokens), cache)

    def _encode(
        self, batch: Batch
    ) -> tuple[Float[Array, "batch memory embed"], Bool[Array, "batch memory"]]:
        return self.encoder(self.token_embedder(batch["encoder_input_tokens"]), batch)


def _norm(cfg: T5Config, name: str | None = None) -> layers.RMSNorm:
    return layers.RMSNorm(cfg.dtype, cfg.param_dtype, name=name)


def _dropout(cfg: T5Config) -> nn.Dropout:
    # One mask for all positions of an example, as T5 does.
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))


def _attention(cfg: T5Config, peft: tuple[Peft, ...], name: str | None = None) -> layers.Attention:
    return layers.Attention(
        cfg.num_heads,
        cfg.head_dim,
        cfg.emb_dim,
        cfg.dropout_rate,
        cfg.dtype,
        cfg.param_dtype,
        peft,
        kernel=cfg.attention,
        name=name,
    )


def _mlp(cfg: T5Config, peft: tuple[Peft, ...], name: str | None = "mlp") -> layers.MLP:
    return layers.MLP(
        cfg.mlp_dim,
        cfg.mlp_activations,
        cfg.dropout_rate,
        cfg.dtype,
        cfg.param_dtype,
        peft,
        name=name,
    )


def _relative_bias(
    cfg: T5Config, bidirectional: bool, name: str | None = "relpos_bias"
) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        cfg.num_heads,
        cfg.relative_num_buckets,
        cfg.relative_max_distance,
        bidirectional,
        cfg.param_dtype,
        name=name,
    )
