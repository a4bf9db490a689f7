"""GPT-2: a decoder alone, with learned positions and norms before its sublayers.

It reads the same batches as encoder-decoders: the sequence is the input, then the target; see
`decoder_only`. Without inputs, that is with padding alone, it models plain text. `GPT2Config` is
flat; the module reads top to bottom.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import decoder_only, layers
from robust_ft.models.attention import active, attend, split_heads
from robust_ft.models.config import ModelConfig
from robust_ft.models.decoder_only import Cache
from robust_ft.models.options import ACTIVATIONS, rematerialized
from robust_ft.models.peft.base import KeyValues, Peft, decoder_slots
from robust_ft.partitioning import constrain
from robust_ft.ranges import Count, Rate
from robust_ft.types import AnyArray, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Sizes and switches of a GPT-2; the defaults are GPT-2 small.

    Attributes:
        vocab_size: Rows of the embedding, which is the head too. It may be larger than a
            checkpoint's: tokens that a task adds, such as padding and a separator, start as the
            mean of the others (`robust_ft.checkpoints_io.added_tokens`).
        num_heads: Heads of each attention, which share emb_dim.
        mlp_dim: Width of the MLP's inner layer.
        num_layers: Number of layers.
        num_positions: Most tokens that input, target and soft prompts have together.
        activation: A name in `robust_ft.models.options.ACTIVATIONS`.
        attention_dropout_rate: Of the attention weights.
    """

    decoder_only: ClassVar[bool] = True

    vocab_size: Count = 50257
    emb_dim: Count = 768
    num_heads: Count = 12
    mlp_dim: Count = 3072
    num_layers: Count = 12
    num_positions: Count = 1024
    activation: str = "gelu"
    attention_dropout_rate: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("activation", tuple(ACTIVATIONS))
        if self.emb_dim % self.num_heads:
            raise UserError(
                f"GPT2Config.emb_dim={self.emb_dim} must be a multiple of num_heads="
                f"{self.num_heads}."
            )

    def module(self, peft: tuple[Peft, ...] = ()) -> "GPT2":
        return GPT2(self, peft)

    def check_lengths(self, inputs: int, targets: int, slots: int) -> None:
        if slots + inputs + targets > self.num_positions:
            taken = f", of which a prefix takes {slots}" if slots else ""
            raise UserError(
                f"Inputs of {inputs} tokens, soft prompts included, and targets of {targets} do "
                f"not fit into GPT2Config.num_positions={self.num_positions}{taken}; shorten one "
                "of them."
            )


class SelfAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are one product.

    In two halves, between which decoding puts the KV cache: `project`, then `__call__`.
    """

    config: GPT2Config
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.qkv = _dense(cfg, self.peft, 3 * cfg.emb_dim, ("embed", "joined_kv"))
        self.out = _dense(cfg, self.peft, cfg.emb_dim, ("joined_kv", "embed"))
        self.dropout = nn.Dropout(cfg.attention_dropout_rate)

    def project(self, x: Float[Array, "batch length embed"]) -> tuple[jax.Array, KeyValues]:
        """Returns the queries and {"key", "value"}, each [batch, length, heads, head_dim]."""
        # One product, as GPT-2's checkpoints have one kernel for all three.
        joined = jnp.split(self.qkv(x), 3, axis=-1)  # 3 times [batch, length, heads * head_dim]
        query, key, value = (split_heads(each, self.config.num_heads) for each in joined)
        return query, {"key": key, "value": value}

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch query heads head_dim"],
        blocks: Sequence[KeyValues],
        bias: Float[Array, "batch 1 query key"],
    ) -> Float[Array, "batch query embed"]:
        # A prefix puts a block of keys before the others, and widens the bias by as many columns.
        for method in self.peft:
            blocks, bias = method.kv(self, blocks, bias)
        dropout = active(self.dropout, self.deterministic)
        scale, kernel = query.shape[-1] ** -0.5, self.config.attention
        return self.out(attend(query, blocks, bias, dropout, scale, kernel))


class Layer(nn.Module):
    """Self-attention and MLP, each with norm before and residual around it."""

    config: GPT2Config
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.pre_self_attention_layer_norm = _norm(cfg)
        self.self_attention = SelfAttention(cfg, self.peft, self.deterministic)
        self.pre_mlp_layer_norm = _norm(cfg)
        self.mlp = layers.MLP(
            cfg.mlp_dim,
            (cfg.activation,),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            peft=self.peft,
            use_bias=True,
        )
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self, x: Float[Array, "batch length embed"], bias: Float[Array, "batch 1 length length"]
    ) -> Float[Array, "batch length embed"]:
        return self.read(x, bias)[0]

    def read(
        self, x: Float[Array, "batch length embed"], bias: Float[Array, "batch 1 length length"]
    ) -> tuple[Float[Array, "batch length embed"], KeyValues]:
        """Returns the layer's output, and the keys and values of x for the KV cache."""
        query, keys = self.self_attention.project(self.pre_self_attention_layer_norm(x))
        return self._sublayers(x, query, [keys], bias), keys

    def extend(
        self,
        x: Float[Array, "batch new embed"],
        cache: Cache,
        length: Int[Array, "batch"],
        bias: Float[Array, "batch 1 new key"],
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Returns the layer's output and cache for the target's tokens from number `length` on."""
        query, new = self.self_attention.project(self.pre_self_attention_layer_norm(x))
        # The new tokens attend to the cache with themselves in it: [input block, target block].
        cache, blocks = decoder_only.update(cache, new, length)
        return self._sublayers(x, query, blocks, bias), cache

    def _sublayers(
        self, x: jax.Array, query: jax.Array, blocks: Sequence[KeyValues], bias: jax.Array
    ) -> jax.Array:
        # Norms stand before sublayers, so the residual stream itself is never normalized.
        x = x + self._sublayer("self_attention", self.self_attention(query, blocks, bias))
        y = self.mlp(self.pre_mlp_layer_norm(x), self.deterministic)
        x = x + self._sublayer("mlp", y)
        return constrain(x, "batch", "length", "activation_embed")

    @nn.compact
    def _sublayer(self, site: str, y: jax.Array) -> jax.Array:
        y = self.dropout(y, deterministic=self.deterministic)
        for method in self.peft:
            y = method.residual(self, site, y)
        return y


class Decoder(nn.Module):
    """The stack of layers over the embedded sequence."""

    config: GPT2Config
    peft: tuple[Peft, ...]
    deterministic: bool

    def setup(self) -> None:
        cfg = self.config
        self.position_embedder = layers.Embedding(
            cfg.num_positions, cfg.emb_dim, cfg.dtype, cfg.param_dtype, "length", 0.02
        )
        layer_class = rematerialized(Layer, cfg.remat)
        self.layers = [
            layer_class(cfg, self.peft, self.deterministic) for _ in range(cfg.num_layers)
        ]
        self.decoder_norm = _norm(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)

    @nn.compact
    def embedded_input(
        self, x: Float[Array, "batch source embed"], batch: Batch
    ) -> tuple[Float[Array, "batch input embed"], Bool[Array, "batch input"]]:
        """Returns the embedded input with its soft prompts, and which of it is not padding."""
        return layers.with_prompts(self, x, batch, self.peft)

    def __call__(
        self,
        inputs: Float[Array, "batch input embed"],
        input_mask: Bool[Array, "batch input"],
        targets: Float[Array, "batch target embed"],
        batch: Batch,
    ) -> Float[Array, "batch target embed"]:
        layout = decoder_only.layout(input_mask, batch)
        bias = layout.bias()  # [batch, 1, input + target, input + target], the same in all layers
        x = self._with_positions(jnp.concatenate([inputs, targets], 1), layout.positions)
        for layer in self.layers:
            x = layer(x, bias)
        # Only the target's states are read; the final norm works on each position by itself.
        return self.decoder_norm(x[:, inputs.shape[1] :])

    def prefill(
        self,
        inputs: Float[Array, "batch input embed"],
        input_mask: Bool[Array, "batch input"],
        max_length: int,
    ) -> Cache:
        layout = decoder_only.layout(input_mask)
        bias = layout.bias()
        x, keys = self._with_positions(inputs, layout.positions), []
        for layer in self.layers:
            x, layer_keys = layer.read(x, bias)  # [batch, input, heads, head_dim] each
            keys.append(layer_keys)
        return decoder_only.new_cache(input_mask, layout, keys, max_length)

    def extend(
        self, x: Float[Array, "batch new embed"], cache: Cache
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        layout = decoder_only.next_layout(cache, x.shape[1])
        x, bias, new_layers = self._with_positions(x, layout.positions), layout.bias(), []
        for layer, layer_cache in zip(self.layers, cache["layers"], strict=True):
            x, layer_cache = layer.extend(x, layer_cache, cache["length"], bias)
            new_layers.append(layer_cache)
        return self.decoder_norm(x), decoder_only.advance(cache, new_layers, x.shape[1])

    def _with_positions(
        self, x: Float[Array, "batch length embed"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        # A prefix occupies positions although it has no tokens, as in Li and Liang's code.
        positions = positions + decoder_slots(self.peft)
        # Padding behind a target may have no position left; it is seen by no token.
        x = x + self.position_embedder(jnp.minimum(positions, self.config.num_positions - 1))
        x = self.dropout(x, deterministic=self.deterministic)
        return x


class GPT2(nn.Module):
    """The whole model. Methods take batches with t5x's feature names (`robust_ft.types`)."""

    config: GPT2Config
    peft: tuple[Peft, ...] = ()
    deterministic: bool = True

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embedding(
            cfg.vocab_size, cfg.emb_dim, cfg.dtype, cfg.param_dtype, stddev=0.02
        )
        self.decoder = Decoder(cfg, self.peft, self.deterministic)

    def hidden(self, batch: Batch) -> Float[Array, "batch target embed"]:
        """Returns the last hidden states of the target, what `head` turns into logits."""
        targets = self.token_embedder(batch["decoder_input_tokens"])
        return self.decoder(*self._inputs(batch), targets, batch)

    def head(self, hidden: Float[Array, "*rest embed"]) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        return self.token_embedder.attend(hidden)  # the head is tied to the embedding

    def __call__(self, batch: Batch) -> Float[Array, "batch target vocab"]:
        return constrain(self.head(self.hidden(batch)), "batch", "length", "vocab")

    def prefill(self, batch: Batch, max_length: int) -> Cache:
        """Reads the input and returns a cache for targets up to `max_length` tokens."""
        return self.decoder.prefill(*self._inputs(batch), max_length)

    def extend(
        self, cache: Cache, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Cache]:
        """Reads the target's next tokens and returns their hidden states, what `head` reads."""
        return self.decoder.extend(self.token_embedder(tokens), cache)

    def _inputs(
        self, batch: Batch
    ) -> tuple[Float[Array, "batch input embed"], Bool[Array, "batch input"]]:
        x = self.token_embedder(batch["encoder_input_tokens"])
        return self.decoder.embedded_input(x, batch)


def _norm(cfg: GPT2Config) -> layers.LayerNorm:
    return layers.LayerNorm(cfg.dtype, cfg.param_dtype)


def _dense(
    cfg: GPT2Config, peft: tuple[Peft, ...], features: int, axes: tuple[str, str]
) -> layers.Dense:
    return layers.Dense(features, axes, cfg.dtype, cfg.param_dtype, peft=peft, use_bias=True)
