"""Llama and its relatives (Mistral, Qwen2, Qwen3): a decoder with rotary positions.

RMSNorm before each sublayer, grouped-query attention, SwiGLU. Input and target are one sequence
(`models/decoder_only.py`). `LlamaConfig` is flat; the module reads top to bottom.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import decoder_only, layers
from robust_ft.models.attention import active, attend, split_heads
from robust_ft.models.config import ModelConfig
from robust_ft.models.decoder_only import Cache, Layout
from robust_ft.models.options import rematerialized
from robust_ft.models.peft.base import KeyValues, Peft, decoder_slots
from robust_ft.models.rotary import ROPE_SCALINGS, Rotary, rotary_angles, rotate
from robust_ft.partitioning import constrain
from robust_ft.ranges import Count, Positive, Whole
from robust_ft.types import AnyArray, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Sizes and switches of a Llama-style decoder; the defaults are Llama 2 7B.

    Attributes:
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values; each serves num_heads / num_kv_heads of queries.
        head_dim: Width of a head.
        mlp_dim: Width of the MLP's inner layer.
        num_layers: Number of layers.
        max_length: Tokens of the longest sequence that the model was trained on; for information.
        logits_via_embedding: Use the token embedding as the output head; otherwise the head has its
            own kernel.
        qkv_bias: Whether queries, keys and values have a bias (Qwen2).
        out_bias: Whether attention's output has a bias.
        qk_norm: Whether each head's queries and keys are normalized (Qwen3).
        sliding_window: How many tokens a token sees, itself included (Mistral); None for all.
        first_window_layer: The first layer with a window; those below see all tokens.
        norm_epsilon: Added to the mean square in each norm.
        rope_theta: Base of the rotary positions' wavelengths.
        rope_scaling: How wavelengths are stretched for long sequences: "none", "linear" all by
            `rope_factor`; "llama3" and "yarn" the long ones only.
        rope_factor: By how much.
        rope_original_length: The length that "llama3" and "yarn" models were first trained on.
        rope_low_freq_factor: In "llama3", wavelengths above rope_original_length / this are
            stretched in full.
        rope_high_freq_factor: And those below rope_original_length / this are not; those between
            by degrees.
        rope_beta_slow: In "yarn", wavelengths with fewer than about this many periods in
            rope_original_length are stretched in full.
        rope_beta_fast: And those with more than this many are not; those between by degrees.
        rope_truncate: Whether "yarn" rounds these two limits outwards, to whole pairs of entries.
        rope_attention_factor: In "yarn", what queries and keys are multiplied by; None for
            0.1 log(rope_factor) + 1.
    """

    decoder_only: ClassVar[bool] = True

    vocab_size: Count = 32000
    emb_dim: Count = 4096
    num_heads: Count = 32
    num_kv_heads: Count = 32
    head_dim: Count = 128
    mlp_dim: Count = 11008
    num_layers: Count = 32
    max_length: Count = 4096
    logits_via_embedding: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_window: Count | None = None
    first_window_layer: Whole = 0
    norm_epsilon: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: str = "none"
    rope_factor: Positive = 1.0
    rope_original_length: Count = 8192
    rope_low_freq_factor: Positive = 1.0
    rope_high_freq_factor: Positive = 4.0
    rope_beta_slow: Positive = 1.0
    rope_beta_fast: Positive = 32.0
    rope_truncate: bool = True
    rope_attention_factor: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("rope_scaling", ROPE_SCALINGS)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"LlamaConfig.num_kv_heads={self.num_kv_heads} must divide "
                f"num_heads={self.num_heads}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"LlamaConfig.head_dim={self.head_dim} must be even: rotary positions rotate pairs."
            )
        if self.rope_scaling != "none" and self.rope_factor < 1:
            raise UserError(f"LlamaConfig.rope_factor={self.rope_factor} must be at least 1.")
        if self.rope_scaling == "llama3" and not (
            self.rope_low_freq_factor < self.rope_high_freq_factor
        ):
            raise UserError(
                f"LlamaConfig.rope_low_freq_factor={self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor={self.rope_high_freq_factor}."
            )
        if self.rope_scaling == "yarn" and not self.rope_beta_slow < self.rope_beta_fast:
            raise UserError(
                f"LlamaConfig.rope_beta_slow={self.rope_beta_slow} must be below "
                f"rope_beta_fast={self.rope_beta_fast}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "Llama":
        return Llama(self, peft)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, in two halves as `layers.Attention`."""

    config: LlamaConfig
    peft: tuple[Peft, ...]

    def setup(self) -> None:
        cfg = self.config

        def projection(heads: int) -> layers.Dense:
            return _dense(
                cfg, heads * cfg.head_dim, ("embed", "joined_kv"), self.peft, cfg.qkv_bias
            )

        self.query = projection(cfg.num_heads)
        self.key = projection(cfg.num_kv_heads)
        self.value = projection(cfg.num_kv_heads)
        self.out = _dense(cfg, cfg.emb_dim, ("joined_kv", "embed"), self.peft, cfg.out_bias)
        # Qwen3 normalizes each head's queries and keys, over head_dim.
        if cfg.qk_norm:
            self.query_norm = _norm(cfg, "kv")
            self.key_norm = _norm(cfg, "kv")
        self.dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))

    def project(self, x: Float[Array, "batch key embed"], rotary: Rotary) -> KeyValues:
        """Returns {"key", "value"}, each [batch, key, kv_heads, head_dim]; keys are rotated."""
        key = split_heads(self.key(x), self.config.num_kv_heads)  # [batch, key, kv_heads, head_dim]
        if self.config.qk_norm:
            key = self.key_norm(key)
        # Cached keys are rotated: they keep their positions, whatever comes after them.
        value = split_heads(self.value(x), self.config.num_kv_heads)
        return {"key": rotate(key, rotary), "value": value}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        rotary: Rotary,
        blocks: Sequence[KeyValues],
        bias: Float[Array, "batch 1 query key"],
        deterministic: bool,
    ) -> Float[Array, "batch query embed"]:
        cfg = self.config
        # A prefix's keys are used as they are, not rotated.
        for method in self.peft:
            blocks, bias = method.kv(self, blocks, bias)
        query = split_heads(self.query(x), cfg.num_heads)
        if cfg.qk_norm:
            query = self.query_norm(query)
        query = rotate(query, rotary)
        dropout = active(self.dropout, deterministic)
        return self.out(attend(query, blocks, bias, dropout, cfg.head_dim**-0.5, cfg.attention))


class DecoderLayer(nn.Module):
    """Causal self-attention and MLP, each with norm before and residual around it."""

    config: LlamaConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        rotary: Rotary,
        bias: Float[Array, "batch 1 length key"],
        cache: Cache | None = None,
        length: Int[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Any]:
        """Returns the layer's output, and the keys and values of x or, with a cache, the cache.

        Args:
            x: A whole sequence or, with a cache, the tokens that follow it.
            rotary: Of the positions of x.
            bias: The attention bias.
            cache: This layer's, see `decoder_only.new_cache`.
            length: Number of the target's tokens in the cache.
        """
        cfg = self.config
        attention = Attention(cfg, self.peft, name="self_attention")
        y = _norm(cfg, name="pre_self_attention_layer_norm")(x)
        keys = attention.project(y, rotary)
        blocks: Sequence[KeyValues] = [keys]
        state: Any = keys  # of a whole sequence; `new_cache` makes a cache of it
        if cache is not None and length is not None:
            state, blocks = decoder_only.update(cache, keys, length)
        y = attention(y, rotary, blocks, bias, self.deterministic)
        x = x + self._sublayer("self_attention", y)
        y = _norm(cfg, name="pre_mlp_layer_norm")(x)
        x = x + self._sublayer("mlp", _mlp(cfg, self.peft)(y, self.deterministic))
        return constrain(x, "batch", "length", "activation_embed"), state

    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = _dropout(self.config)(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Decoder(nn.Module):
    """The stack of layers over the embedded input and target."""

    config: LlamaConfig
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        layer_class = rematerialized(DecoderLayer, cfg.remat)
        self.layers = [
            layer_class(cfg, self.peft, self.deterministic) for _ in range(cfg.num_layers)
        ]
        self.decoder_norm = _norm(cfg)
        if not cfg.logits_via_embedding:
            self.logits_dense = _dense(
                cfg, cfg.vocab_size, ("embed", "vocab"), self.peft, output_dtype=jnp.float32
            )

    def __call__(
        self,
        x: Float[Array, "batch source embed"],
        y: Float[Array, "batch target embed"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        x, input_mask = self._with_prompts(x, batch)
        layout = decoder_only.layout(input_mask, batch)
        hidden, _ = self._layers(jnp.concatenate([x, y], 1), layout)
        # Only the target's states are read; the final norm works on each position by itself.
        return self.decoder_norm(hidden[:, x.shape[1] :])

    def prefill(
        self, x: Float[Array, "batch source embed"], batch: Batch, max_length: int
    ) -> Cache:
        x, input_mask = self._with_prompts(x, batch)
        layout = decoder_only.layout(input_mask)
        _, keys = self._layers(x, layout)
        return decoder_only.new_cache(input_mask, layout, keys, max_length)

    def extend(
        self, x: Float[Array, "batch new embed"], cache: Cache
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        x, new_layers = self._layers(x, decoder_only.next_layout(cache, x.shape[1]), cache)
        return self.decoder_norm(x), decoder_only.advance(cache, new_layers, x.shape[1])

    @nn.compact
    def _with_prompts(
        self, x: Float[Array, "batch source embed"], batch: Batch
    ) -> tuple[Float[Array, "batch input embed"], Bool[Array, "batch input"]]:
        return layers.with_prompts(self, x, batch, self.peft)

    def _layers(
        self, x: Float[Array, "batch length embed"], layout: Layout, cache: Cache | None = None
    ) -> tuple[Float[Array, "batch length embed"], list[Any]]:
        """Returns the last layer's output, and every layer's keys and values, or its cache."""
        cfg = self.config
        slots = decoder_slots(self.peft)
        rotary = rotary_angles(layout.positions + slots, cfg)
        # Both biases are computed once, not in every layer.
        full = windowed = layout.bias()
        if cfg.sliding_window is not None:
            windowed = layout.windowed_bias(cfg.sliding_window, slots)
        states = []
        for i, layer in enumerate(self.layers):
            bias = windowed if i >= cfg.first_window_layer else full
            past = () if cache is None else (cache["layers"][i], cache["length"])
            x, state = layer(x, rotary, bias, *past)
            states.append(state)
        return x, states


class Llama(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: LlamaConfig
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.param_dtype, stddev=0.02
        )
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the target's last hidden states, what `head` turns into logits."""
        x = self.token_embedder(batch["encoder_input_tokens"])
        y = self.token_embedder(batch["decoder_input_tokens"])
        return self.decoder(x, y, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden)
        return self.decoder.logits_dense(hidden)

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Reads the input and returns a cache for targets up to `max_length` tokens."""
        x = self.token_embedder(batch["encoder_input_tokens"])
        return self.decoder.prefill(x, batch, max_length)

    def extend(
        self, cache: Cache, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self.token_embedder(tokens), cache)


def _norm(cfg: LlamaConfig, axis: str = "embed", name: str | None = None) -> layers.RMSNorm:
    return layers.RMSNorm(cfg.dtype, cfg.param_dtype, cfg.norm_epsilon, axis=axis, name=name)


def _dense(
    cfg: LlamaConfig,
    features: int,
    axes: tuple[str, str],
    peft: tuple[Peft, ...],
    use_bias: bool = False,
    output_dtype: Any = None,
) -> layers.Dense:
    return layers.Dense(
        features,
        axes,
        cfg.dtype,
        cfg.param_dtype,
        peft=peft,
        output_dtype=output_dtype,
        use_bias=use_bias,
    )


def _dropout(cfg: LlamaConfig) -> nn.Dropout:
    # One mask for all positions of an example, as in T5.
    return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))


def _mlp(cfg: LlamaConfig, peft: tuple[Peft, ...]) -> layers.MLP:
    return layers.MLP(
        cfg.mlp_dim,
        ("silu", "linear"),
        cfg.dropout_rate,
        cfg.dtype,
        cfg.param_dtype,
        peft,
        name="mlp",
    )
