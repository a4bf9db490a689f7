"""T5 1.1 and its relatives: an encoder-decoder with relative positions.

Parameter names and shapes are t5x's. `T5Config` is flat; the module reads top to bottom.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import kept_keys, layers
from robust_ft.models.options import check_choices, rematerialized
from robust_ft.models.peft.base import Keys, Peft, decoder_slots
from robust_ft.partitioning import constrain
from robust_ft.types import Batch

Cache = dict[str, Any]

ACTIVATIONS = ("gelu", "relu", "silu", "swish", "linear")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and switches of a T5; the defaults are T5 1.1 small.

    Attributes:
        logits_via_embedding: Use the token embedding as the output head, scaled by
            emb_dim^-0.5 (T5 1.0); otherwise the head has its own kernel (T5 1.1, mT5).
        attention: What computes attention: "xla", "cudnn" (on NVIDIA GPUs), or "auto", cuDNN
            where it applies; see `attention_kernels`.
        remat: What the backward pass keeps of a layer: "none" keeps everything, "dots" the
            products with parameters, "full" nothing but the layer's input.
        dtype: Type of activations. Softmax, norms and logits are float32 whatever it is.
        param_dtype: Type in which parameters are drawn and kept.
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relative_num_buckets: int = 32
    relative_max_distance: int = 128
    dropout_rate: float = 0.0
    attention: str = "auto"
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        # gin gives lists; a frozen config has to be hashable.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        check_choices(self, mlp_activations=ACTIVATIONS)
        # Encoders give each direction half of the buckets and one distance each to half of those.
        if self.relative_num_buckets < 4:
            raise UserError(
                f"T5Config.relative_num_buckets={self.relative_num_buckets} must be at least 4."
            )
        if self.relative_max_distance <= self.relative_num_buckets // 2:
            raise UserError(
                f"T5Config.relative_max_distance={self.relative_max_distance} must be above half "
                f"of relative_num_buckets={self.relative_num_buckets}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "T5":
        return T5(self, peft)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with norm before and residual around it.

    The bias comes in two parts, by position and by mask. Their sum is as large as the scores,
    and so is its gradient: made outside of layers, one a layer would stay until all are added up.
    """

    config: T5Config
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch source embed"],
        position_bias: Float[Array, "one heads source source"],
        mask_bias: Float[Array, "batch one #source source"],
    ) -> Float[Array, "batch source embed"]:
        attention = _attention(self.config, self.peft, "attention")
        y = _norm(self.config, "pre_attention_layer_norm")(x)
        bias = position_bias + mask_bias
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
        valid = batch["encoder_input_tokens"] != 0
        for method in self.peft:
            x, valid = method.embed(self, x, valid, batch)
        positions = jnp.arange(x.shape[1])[None]
        position_bias = _relative_bias(cfg, bidirectional=True)(positions, positions)
        mask_bias = layers.mask_bias(self._allowed(valid, batch))
        x = _dropout(cfg)(x, deterministic=self.deterministic)
        layer_class = rematerialized(EncoderLayer, cfg.remat)
        for i in range(cfg.num_encoder_layers):
            layer = layer_class(cfg, self.peft, self.deterministic, name=f"layers_{i}")
            x = layer(x, position_bias, mask_bias)
        x = _norm(cfg, "encoder_norm")(x)
        return nn.Dropout(cfg.dropout_rate)(x, deterministic=self.deterministic), valid

    def _allowed(
        self, valid: Bool[Array, "batch source"], batch: Batch
    ) -> Bool[Array, "batch #source source"]:
        allowed = valid[:, None, :]
        if "encoder_segment_ids" in batch:
            segments = batch["encoder_segment_ids"]
            if segments.shape != valid.shape:
                raise UserError("Packed batches cannot be combined with a soft prompt.")
            allowed = allowed & layers.same_segment(segments, segments)
        return allowed


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and MLP.

    It either runs over all positions of a target at once (`__call__`) or, with kept keys and
    values, over the positions that follow them (`extend`).
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
        position_bias: Float[Array, "one heads target target"],
        mask_bias: Float[Array, "#batch one target target"],
        memory_bias: Float[Array, "batch one #target memory"],
    ) -> Float[Array, "batch target embed"]:
        y = self.pre_self_attention_layer_norm(x)
        keys = self.self_attention.project(y)
        memory_keys = self.project_memory(memory)
        self_bias = position_bias + mask_bias
        return self._sublayers(x, y, keys, self_bias, memory_keys, memory_bias)

    def project_memory(self, memory: Float[Array, "batch memory embed"]) -> dict[str, jax.Array]:
        return self.encoder_decoder_attention.project(memory)

    def extend(
        self,
        x: Float[Array, "batch new embed"],
        cache: Cache,
        positions: Int[Array, "batch new"],
        self_bias: Float[Array, "batch heads new length"],
        memory_bias: Float[Array, "batch one one memory"],
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        y = self.pre_self_attention_layer_norm(x)
        kept = kept_keys.remember(cache["self"], self.self_attention.project(y), positions)
        keys, memory_keys = kept_keys.by_head(kept), kept_keys.by_head(cache["memory"])
        x = self._sublayers(x, y, keys, self_bias, memory_keys, memory_bias)
        return x, {"self": kept, "memory": cache["memory"]}

    def _sublayers(
        self,
        x: jax.Array,
        y: jax.Array,
        keys: Keys,
        self_bias: jax.Array,
        memory_keys: Keys,
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
                _dtype(cfg),
                cfg.param_dtype,
                peft=self.peft,
                output_dtype=jnp.float32,
            )

    def __call__(
        self,
        x: Float[Array, "batch target embed"],
        memory: Float[Array, "batch memory embed"],
        memory_valid: Bool[Array, "batch memory"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        positions = jnp.arange(x.shape[1])[None]
        causal = positions[:, :, None] >= positions[:, None, :]
        slots = decoder_slots(self.peft)
        memory_allowed = memory_valid[:, None, :]
        if "decoder_segment_ids" in batch:
            segments = batch["decoder_segment_ids"]
            causal = causal & layers.same_segment(segments, segments)
            memory_allowed &= layers.same_segment(segments, batch["encoder_segment_ids"])
        causal = jnp.pad(causal, ((0, 0), (0, 0), (slots, 0)), constant_values=True)
        key_positions = jnp.arange(-slots, x.shape[1])[None]
        position_bias = self.relpos_bias(positions, key_positions)
        mask_bias = layers.mask_bias(causal)
        memory_bias = layers.mask_bias(memory_allowed)
        x = self.dropout(x, deterministic=self.deterministic)
        for layer in self.layers:
            x = layer(x, memory, position_bias, mask_bias, memory_bias)
        return self.dropout(self.decoder_norm(x), deterministic=self.deterministic)

    def empty_cache(
        self,
        memory: Float[Array, "batch memory embed"],
        memory_valid: Bool[Array, "batch memory"],
        max_length: int,
    ) -> Cache:
        keys = [layer.project_memory(memory) for layer in self.layers]
        return {
            "position": jnp.zeros(memory.shape[0], jnp.int32),
            "memory_valid": memory_valid,
            "layers": [
                {"self": kept_keys.room(each, max_length), "memory": kept_keys.keep(each)}
                for each in keys
            ],
        }

    def extend(
        self, x: Float[Array, "batch new embed"], cache: Cache
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        positions = cache["position"][:, None] + jnp.arange(x.shape[1])  # [batch, new]
        length = cache["layers"][0]["self"]["key"].shape[2]
        slots = jnp.arange(-decoder_slots(self.peft), length)  # [slots + length]
        seen = slots <= positions[:, :, None]  # [batch, new, slots + length]
        bias = self.relpos_bias(positions, jnp.broadcast_to(slots, (x.shape[0], *slots.shape)))
        self_bias = bias + layers.mask_bias(seen)
        memory_bias = layers.mask_bias(cache["memory_valid"][:, None, :])
        new_layers = []
        for layer, layer_cache in zip(self.layers, cache["layers"], strict=True):
            x, layer_cache = layer.extend(x, layer_cache, positions, self_bias, memory_bias)
            new_layers.append(layer_cache)
        moved = {"position": cache["position"] + x.shape[1], "layers": new_layers}
        return self.decoder_norm(x), cache | moved


class T5(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: T5Config
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, _dtype(cfg), cfg.param_dtype
        )
        self.encoder = Encoder(cfg, self.peft, self.deterministic)
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the decoder's last hidden states, what `head` turns into logits."""
        memory, memory_valid = self._encode(batch)
        x = self.token_embedder(batch["decoder_input_tokens"])
        return self.decoder(x, memory, memory_valid, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden) * self.config.emb_dim**-0.5
        return self.decoder.logits_dense(hidden)

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Encodes the input and returns an empty cache for targets up to `max_length` tokens."""
        return self.decoder.empty_cache(*self._encode(batch), max_length)

    def extend(
        self, cache: Cache, tokens: Int[Array, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self.token_embedder(tokens), cache)

    def _encode(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.encoder(self.token_embedder(batch["encoder_input_tokens"]), batch)


def _dtype(cfg: T5Config) -> jnp.dtype:
    return jnp.dtype(cfg.dtype)


def _norm(cfg: T5Config, name: str | None = None) -> layers.RMSNorm:
    return layers.RMSNorm(_dtype(cfg), cfg.param_dtype, name=name)


def _dropout(cfg: T5Config) -> nn.Dropout:
    # One mask for all positions of an example, as T5 does.
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))


def _attention(cfg: T5Config, peft: tuple[Peft, ...], name: str | None = None) -> layers.Attention:
    return layers.Attention(
        cfg.num_heads,
        cfg.head_dim,
        cfg.emb_dim,
        cfg.dropout_rate,
        _dtype(cfg),
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
        _dtype(cfg),
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
