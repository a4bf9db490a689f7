"""BART: an encoder-decoder with learned positions and norms behind its sublayers.

`BartConfig` is flat; the module reads top to bottom, as T5's (`t5`) does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import encoder_decoder, layers
from robust_ft.models.attention import mask_to_bias, same_segment
from robust_ft.models.axes import with_axes
from robust_ft.models.config import ModelConfig
from robust_ft.models.encoder_decoder import Cache
from robust_ft.models.options import ACTIVATIONS, rematerialized
from robust_ft.models.peft.base import KeyValues, Peft, decoder_slots
from robust_ft.partitioning import constrain
from robust_ft.ranges import Count, Rate
from robust_ft.types import AnyArray, Batch

# The first rows of BART's tables of positions are never used.
OFFSET = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig(ModelConfig):
    """Sizes and switches of a BART; the defaults are BART base.

    Attributes:
        num_heads: Heads of each attention, which share emb_dim.
        mlp_dim: Width of the MLP's inner layer.
        num_encoder_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder.
        num_positions: Most tokens of an input, soft prompts included, and of a target.
        activation: A name in `robust_ft.models.options.ACTIVATIONS`.
        scale_embedding: Multiply embedded tokens by emb_dim^0.5.
        final_logits_bias: Whether checkpoints hold something to add to the logits. It never
            trains, and is 0 in the published ones that have it.
        attention_dropout_rate: Of the attention weights.
        activation_dropout_rate: Of what the MLP's activation gives.
    """

    vocab_size: Count = 50265
    emb_dim: Count = 768
    num_heads: Count = 12
    mlp_dim: Count = 3072
    num_encoder_layers: Count = 6
    num_decoder_layers: Count = 6
    num_positions: Count = 1024
    activation: str = "gelu_exact"
    scale_embedding: bool = False
    final_logits_bias: bool = False
    attention_dropout_rate: Rate = 0.0
    activation_dropout_rate: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("activation", tuple(ACTIVATIONS))
        if self.emb_dim % self.num_heads:
            raise UserError(
                f"BartConfig.emb_dim={self.emb_dim} must be a multiple of num_heads="
                f"{self.num_heads}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "Bart":
        return Bart(self, peft)

    def check_lengths(self, inputs: int, targets: int, slots: int) -> None:
        for what, length, taken in (
            ("Inputs, soft prompts included,", inputs, 0),
            ("Targets", targets, slots),
        ):
            if length + taken > self.num_positions:
                prefix = f", of which a prefix takes {taken}" if taken else ""
                raise UserError(
                    f"{what} of {length} tokens do not fit into BartConfig.num_positions="
                    f"{self.num_positions}{prefix}; shorten them."
                )


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with residual around and norm behind it."""

    config: BartConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch source embed"],
        bias: Float[Array, "batch 1 #source source"],
    ) -> Float[Array, "batch source embed"]:
        attention = _attention(self.config, self.peft, "attention")
        y = attention(x, attention.project(x), bias, self.deterministic)
        x = _norm(self.config, "attention_layer_norm")(x + self._sublayer("attention", y))
        y = _mlp(self.config, self.peft)(x, self.deterministic)
        x = _norm(self.config, "mlp_layer_norm")(x + self._sublayer("mlp", y))
        return constrain(x, "batch", "length", "activation_embed")

    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = nn.Dropout(self.config.dropout_rate)(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Encoder(nn.Module):
    """The stack of encoder layers over the embedded input."""

    config: BartConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch source embed"], batch: Batch
    ) -> tuple[Float[Array, "batch memory embed"], Bool[Array, "batch memory"]]:
        cfg = self.config
        x, input_mask = layers.with_prompts(self, x, batch, self.peft)
        bias = mask_to_bias(encoder_decoder.encoder_mask(input_mask, batch))
        positions = _positions(x.shape[1], batch.get("encoder_segment_ids"))
        positions = _within(cfg, positions)
        x = x + _position_embedder(cfg, "position_embedder")(positions + OFFSET)
        x = _norm(cfg, "embedding_layer_norm")(x)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=self.deterministic)
        layer_class = rematerialized(EncoderLayer, cfg.remat)
        for i in range(cfg.num_encoder_layers):
            x = layer_class(cfg, self.peft, self.deterministic, name=f"layers_{i}")(x, bias)
        return x, input_mask


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and MLP.

    It runs over a whole target at once (`__call__`) or, with a KV cache, over the tokens that
    follow (`extend`).
    """

    config: BartConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.self_attention = _attention(cfg, self.peft)
        self.self_attention_layer_norm = _norm(cfg)
        self.encoder_decoder_attention = _attention(cfg, self.peft)
        self.cross_attention_layer_norm = _norm(cfg)
        self.mlp = _mlp(cfg, self.peft, name=None)
        self.mlp_layer_norm = _norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "batch target embed"],
        memory: Float[Array, "batch memory embed"],
        self_bias: Float[Array, "#batch 1 target target"],
        memory_bias: Float[Array, "batch 1 #target memory"],
    ) -> Float[Array, "batch target embed"]:
        keys, memory_keys = self.self_attention.project(x), self.project_memory(memory)
        return self._sublayers(x, keys, self_bias, memory_keys, memory_bias)

    def project_memory(self, memory: Float[Array, "batch memory embed"]) -> KeyValues:
        return self.encoder_decoder_attention.project(memory)

    def extend(
        self,
        x: Float[Array, "batch new embed"],
        cache: Cache,
        positions: Int[Array, "batch new"],
        self_bias: Float[Array, "batch 1 new length"],
        memory_bias: Float[Array, "batch 1 1 memory"],
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        new = self.self_attention.project(x)
        cache, keys, memory_keys = encoder_decoder.update(cache, new, positions)
        return self._sublayers(x, keys, self_bias, memory_keys, memory_bias), cache

    def _sublayers(
        self,
        x: jax.Array,
        keys: KeyValues,
        self_bias: jax.Array,
        memory_keys: KeyValues,
        memory_bias: jax.Array,
    ) -> jax.Array:
        y = self.self_attention(x, keys, self_bias, self.deterministic)
        x = self.self_attention_layer_norm(x + self._sublayer("self_attention", y))
        y = self.encoder_decoder_attention(x, memory_keys, memory_bias, self.deterministic)
        x = self.cross_attention_layer_norm(x + self._sublayer("encoder_decoder_attention", y))
        y = self.mlp(x, self.deterministic)
        x = self.mlp_layer_norm(x + self._sublayer("mlp", y))
        return constrain(x, "batch", "length", "activation_embed")

    @nn.compact
    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = self.dropout(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Decoder(nn.Module):
    """The stack of decoder layers over the embedded target."""

    config: BartConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.position_embedder = _position_embedder(cfg)
        self.embedding_layer_norm = _norm(cfg)
        layer_class = rematerialized(DecoderLayer, cfg.remat)
        self.layers = [
            layer_class(cfg, self.peft, self.deterministic) for _ in range(cfg.num_decoder_layers)
        ]
        self.dropout = nn.Dropout(cfg.dropout_rate)
        if cfg.final_logits_bias:
            init = with_axes(nn.initializers.zeros, None, "vocab")
            self.final_logits_bias = self.param(
                "final_logits_bias", init, (1, cfg.vocab_size), cfg.param_dtype
            )

    def __call__(
        self,
        x: Float[Array, "batch target embed"],
        memory: Float[Array, "batch memory embed"],
        memory_mask: Bool[Array, "batch memory"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        self_mask, memory_mask = encoder_decoder.decoder_masks(memory_mask, batch)
        self_bias, memory_bias = mask_to_bias(self_mask), mask_to_bias(memory_mask)
        positions = _positions(x.shape[1], batch.get("decoder_segment_ids"))
        x = self._with_positions(x, positions)
        for layer in self.layers:
            x = layer(x, memory, self_bias, memory_bias)
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
        key_positions = jnp.arange(encoder_decoder.cached_length(cache))  # [length]
        self_bias = mask_to_bias(key_positions[None, None] <= positions[:, :, None])
        memory_bias = mask_to_bias(cache["memory_mask"][:, None, :])
        x, new_layers = self._with_positions(x, positions), []
        for layer, layer_cache in zip(self.layers, cache["layers"], strict=True):
            x, layer_cache = layer.extend(x, layer_cache, positions, self_bias, memory_bias)
            new_layers.append(layer_cache)
        return x, encoder_decoder.advance(cache, new_layers, x.shape[1])

    def _with_positions(
        self, x: Float[Array, "batch length embed"], positions: Int[Array, "#batch length"]
    ) -> Float[Array, "batch length embed"]:
        positions = _within(self.config, positions + decoder_slots(self.peft))
        x = self.embedding_layer_norm(x + self.position_embedder(positions + OFFSET))
        x = self.dropout(x, deterministic=self.deterministic)
        return x


class Bart(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: BartConfig
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.param_dtype, stddev=0.02
        )
        self.encoder = Encoder(cfg, self.peft, self.deterministic)
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the decoder's last hidden states, what `head` turns into logits."""
        memory, memory_mask = self._encode(batch)
        x = self._embed(batch["decoder_input_tokens"])
        return self.decoder(x, memory, memory_mask, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        logits = self.token_embedder.attend(hidden)
        if self.config.final_logits_bias:
            bias = lax.stop_gradient(self.decoder.final_logits_bias[0])
            logits = logits + layers.per_feature(bias, logits).astype(jnp.float32)
        return logits

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Encodes the input and returns an empty cache for targets up to `max_length` tokens."""
        return self.decoder.empty_cache(*self._encode(batch), max_length)

    def extend(
        self, cache: Cache, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self._embed(tokens), cache)

    def _encode(
        self, batch: Batch
    ) -> tuple[Float[Array, "batch memory embed"], Bool[Array, "batch memory"]]:
        return self.encoder(self._embed(batch["encoder_input_tokens"]), batch)

    def _embed(self, tokens: Int[AnyArray, "batch length"]) -> Float[Array, "batch length embed"]:
        x = self.token_embedder(tokens)
        return x * self.config.emb_dim**0.5 if self.config.scale_embedding else x


def _norm(cfg: BartConfig, name: str | None = None) -> layers.LayerNorm:
    return layers.LayerNorm(cfg.dtype, cfg.param_dtype, name=name)


def _position_embedder(cfg: BartConfig, name: str | None = None) -> layers.Embedding:
    rows = cfg.num_positions + OFFSET
    return layers.Embedding(
        rows, cfg.emb_dim, cfg.dtype, cfg.param_dtype, "length", 0.02, name=name
    )


def _positions(
    length: int, segments: Int[AnyArray, "batch length"] | None
) -> Int[Array, "#batch length"]:
    """Returns positions that start at 0 in every example of a packed row."""
    slots = jnp.arange(length)[None]  # [1, length]
    if segments is None:
        return slots
    seen = same_segment(segments, segments) & (slots[:, :, None] >= slots[:, None, :])
    return jnp.sum(seen, -1) - 1


def _within(cfg: BartConfig, positions: Int[Array, "#batch length"]) -> Int[Array, "#batch length"]:
    """Returns positions that the table has: padding may have none left, and is seen by no token."""
    return jnp.minimum(positions, cfg.num_positions - 1)


def _attention(
    cfg: BartConfig, peft: tuple[Peft, ...], name: str | None = None
) -> layers.Attention:
    head_dim = cfg.emb_dim // cfg.num_heads
    return layers.Attention(
        cfg.num_heads,
        head_dim,
        cfg.emb_dim,
        cfg.attention_dropout_rate,
        cfg.dtype,
        cfg.param_dtype,
        peft,
        use_bias=True,
        scale=head_dim**-0.5,
        dropout_dims=(),
        kernel=cfg.attention,
        name=name,
    )


def _mlp(cfg: BartConfig, peft: tuple[Peft, ...], name: str | None = "mlp") -> layers.MLP:
    return layers.MLP(
        cfg.mlp_dim,
        (cfg.activation,),
        cfg.activation_dropout_rate,
        cfg.dtype,
        cfg.param_dtype,
        peft,
        use_bias=True,
        dropout_dims=(),
        name=name,
    )
