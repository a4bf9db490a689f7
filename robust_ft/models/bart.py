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
from robust_ft.models import kept_keys, layers
from robust_ft.models.axes import with_axes
from robust_ft.models.options import ACTIVATIONS, check_choices, rematerialized
from robust_ft.models.peft.base import Keys, Peft, decoder_slots
from robust_ft.models.t5 import Cache
from robust_ft.partitioning import constrain
from robust_ft.types import Batch

# The first rows of BART's tables of positions are never used.
OFFSET = 2


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """Sizes and switches of a BART; the defaults are BART base.

    Attributes:
        num_positions: Most tokens of an input, soft prompts included, and of a target.
        activation: A name in `robust_ft.models.options.ACTIVATIONS`.
        scale_embedding: Multiply embedded tokens by emb_dim^0.5.
        final_logits_bias: Whether checkpoints hold something to add to the logits. It never
            trains, and is 0 in the published ones that have it.
        pad_id: Tokens of the input that are masked.
        dropout_rate: Of embedded tokens and of what sublayers add.
        attention_dropout_rate: Of the attention weights.
        activation_dropout_rate: Of what the MLP's activation gives.
        attention: What computes attention: "xla", "cudnn" (on NVIDIA GPUs), or "auto", cuDNN
            where it applies; see `attention_kernels`.
        remat: What the backward pass keeps of a layer: "none" keeps everything, "dots" the
            products with parameters, "full" nothing but the layer's input.
        dtype: Type of activations. Softmax, norms and logits are float32 whatever it is.
        param_dtype: Type in which parameters are drawn and kept.
    """

    vocab_size: int = 50265
    emb_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    num_positions: int = 1024
    activation: str = "gelu_exact"
    scale_embedding: bool = False
    final_logits_bias: bool = False
    pad_id: int = 1
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation_dropout_rate: float = 0.0
    attention: str = "auto"
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choices(self, activation=tuple(ACTIVATIONS))
        if self.emb_dim % self.num_heads:
            raise UserError(
                f"BartConfig.emb_dim={self.emb_dim} must be a multiple of num_heads="
                f"{self.num_heads}."
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise UserError(
                f"BartConfig.pad_id={self.pad_id} is no token of a vocabulary of {self.vocab_size}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "Bart":
        return Bart(self, peft)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with residual around and norm behind it."""

    config: BartConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch source embed"],
        bias: Float[Array, "batch one #source source"],
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
        valid = batch["encoder_input_tokens"] != cfg.pad_id
        for method in self.peft:
            x, valid = method.embed(self, x, valid, batch)
        _check_length(cfg, x.shape[1], "Inputs, soft prompts included,")
        allowed, positions = valid[:, None, :], jnp.arange(x.shape[1])[None]
        if "encoder_segment_ids" in batch:
            segments = batch["encoder_segment_ids"]
            if segments.shape != valid.shape:
                raise UserError("Packed batches cannot be combined with a soft prompt.")
            allowed = allowed & layers.same_segment(segments, segments)
            positions = _packed_positions(segments)
        x = x + _position_embedder(cfg, "position_embedder")(positions + OFFSET)
        x = _norm(cfg, "embedding_layer_norm")(x)
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=self.deterministic)
        bias = layers.mask_bias(allowed)
        layer_class = rematerialized(EncoderLayer, cfg.remat)
        for i in range(cfg.num_encoder_layers):
            x = layer_class(cfg, self.peft, self.deterministic, name=f"layers_{i}")(x, bias)
        return x, valid


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and MLP.

    It either runs over all positions of a target at once (`__call__`) or, with kept keys and
    values, over the positions that follow them (`extend`).
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
        self_bias: Float[Array, "#batch one target target"],
        memory_bias: Float[Array, "batch one #target memory"],
    ) -> Float[Array, "batch target embed"]:
        keys, memory_keys = self.self_attention.project(x), self.project_memory(memory)
        return self._sublayers(x, keys, self_bias, memory_keys, memory_bias)

    def project_memory(self, memory: Float[Array, "batch memory embed"]) -> dict[str, jax.Array]:
        return self.encoder_decoder_attention.project(memory)

    def extend(
        self,
        x: Float[Array, "batch new embed"],
        cache: Cache,
        positions: Int[Array, "batch new"],
        self_bias: Float[Array, "batch one new length"],
        memory_bias: Float[Array, "batch one one memory"],
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        kept = kept_keys.remember(cache["self"], self.self_attention.project(x), positions)
        keys, memory_keys = kept_keys.by_head(kept), kept_keys.by_head(cache["memory"])
        x = self._sublayers(x, keys, self_bias, memory_keys, memory_bias)
        return x, {"self": kept, "memory": cache["memory"]}

    def _sublayers(
        self,
        x: jax.Array,
        keys: Keys,
        self_bias: jax.Array,
        memory_keys: Keys,
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
        memory_valid: Bool[Array, "batch memory"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        _check_length(self.config, x.shape[1], "Targets", decoder_slots(self.peft))
        positions = jnp.arange(x.shape[1])[None]
        causal = positions[:, :, None] >= positions[:, None, :]
        memory_allowed = memory_valid[:, None, :]
        if "decoder_segment_ids" in batch:
            segments = batch["decoder_segment_ids"]
            causal = causal & layers.same_segment(segments, segments)
            memory_allowed &= layers.same_segment(segments, batch["encoder_segment_ids"])
            positions = _packed_positions(segments)
        self_bias, memory_bias = layers.mask_bias(causal), layers.mask_bias(memory_allowed)
        x = self._with_positions(x, positions)
        for layer in self.layers:
            x = layer(x, memory, self_bias, memory_bias)
        return x

    def empty_cache(
        self,
        memory: Float[Array, "batch memory embed"],
        memory_valid: Bool[Array, "batch memory"],
        max_length: int,
    ) -> Cache:
        _check_length(self.config, max_length, "Targets", decoder_slots(self.peft))
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
        slots = jnp.arange(cache["layers"][0]["self"]["key"].shape[2])  # [length]
        self_bias = layers.mask_bias(slots <= positions[:, :, None])
        memory_bias = layers.mask_bias(cache["memory_valid"][:, None, :])
        x, new_layers = self._with_positions(x, positions), []
        for layer, layer_cache in zip(self.layers, cache["layers"], strict=True):
            x, layer_cache = layer.extend(x, layer_cache, positions, self_bias, memory_bias)
            new_layers.append(layer_cache)
        moved = {"position": cache["position"] + x.shape[1], "layers": new_layers}
        return x, cache | moved

    def _with_positions(
        self, x: Float[Array, "batch length embed"], positions: Int[Array, "#batch length"]
    ) -> Float[Array, "batch length embed"]:
        positions = positions + OFFSET + decoder_slots(self.peft)
        x = self.embedding_layer_norm(x + self.position_embedder(positions))
        return self.dropout(x, deterministic=self.deterministic)


class Bart(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: BartConfig
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, _dtype(cfg), cfg.param_dtype, stddev=0.02
        )
        self.encoder = Encoder(cfg, self.peft, self.deterministic)
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the decoder's last hidden states, what `head` turns into logits."""
        memory, memory_valid = self._encode(batch)
        x = self._embed(batch["decoder_input_tokens"])
        return self.decoder(x, memory, memory_valid, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        logits = self.token_embedder.attend(hidden)
        if self.config.final_logits_bias:
            bias = lax.stop_gradient(self.decoder.final_logits_bias[0])
            logits = logits + bias.astype(jnp.float32)
        return logits

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Encodes the input and returns an empty cache for targets up to `max_length` tokens."""
        return self.decoder.empty_cache(*self._encode(batch), max_length)

    def extend(
        self, cache: Cache, tokens: Int[Array, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self._embed(tokens), cache)

    def _encode(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self.encoder(self._embed(batch["encoder_input_tokens"]), batch)

    def _embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        x = self.token_embedder(tokens)
        return x * self.config.emb_dim**0.5 if self.config.scale_embedding else x


def _dtype(cfg: BartConfig) -> jnp.dtype:
    return jnp.dtype(cfg.dtype)


def _norm(cfg: BartConfig, name: str | None = None) -> layers.LayerNorm:
    return layers.LayerNorm(_dtype(cfg), cfg.param_dtype, name=name)


def _position_embedder(cfg: BartConfig, name: str | None = None) -> layers.Embedding:
    rows = cfg.num_positions + OFFSET
    return layers.Embedding(
        rows, cfg.emb_dim, _dtype(cfg), cfg.param_dtype, "length", 0.02, name=name
    )


def _packed_positions(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Returns positions that start at 0 in every example of a packed row."""
    before = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return jnp.sum(layers.same_segment(segments, segments) & before, -1) - 1


def _check_length(cfg: BartConfig, length: int, what: str, slots: int = 0) -> None:
    if length + slots > cfg.num_positions:
        taken = f", of which a prefix takes {slots}" if slots else ""
        raise UserError(
            f"{what} of {length} tokens do not fit into BartConfig.num_positions="
            f"{cfg.num_positions}{taken}; shorten them."
        )


def _attention(
    cfg: BartConfig, peft: tuple[Peft, ...], name: str | None = None
) -> layers.Attention:
    head_dim = cfg.emb_dim // cfg.num_heads
    return layers.Attention(
        cfg.num_heads,
        head_dim,
        cfg.emb_dim,
        cfg.attention_dropout_rate,
        _dtype(cfg),
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
        _dtype(cfg),
        cfg.param_dtype,
        peft,
        use_bias=True,
        dropout_dims=(),
        name=name,
    )
