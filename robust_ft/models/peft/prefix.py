"""Prefixes: trainable keys and values that attention sees at every layer (prefix-tuning).

Li and Liang, 2021, section 4. The modules read plain keys and values. While their MLP (section 4.3)
trains, its parameters replace these, and `Prefix.materialize` computes them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float

from robust_ft.errors import UserError, nearest
from robust_ft.models.axes import with_axes
from robust_ft.models.peft.base import KeyValues, Peft
from robust_ft.partitioning import constrain
from robust_ft.ranges import Count
from robust_ft.types import AnyArray, Params
from robust_ft.vocabulary import Vocabulary

INITIALIZATIONS = ("random", "text")
PARTS = ("key", "value")
# A switch of `Prefix` -> the name of its attention in the models.
SITES = {
    "encoder": "attention",
    "decoder": "self_attention",
    "cross": "encoder_decoder_attention",
}


@dataclasses.dataclass(frozen=True)
class Prefix(Peft):
    """Slots before what attention sees: `<attention>/prefix/key` and `value`.

    Each is [length, heads, head_dim], with the heads that keys have. All tokens see all slots, in a
    packed row too. Decoder-only models have "decoder" attention alone.

    Attributes:
        length: Slots of each attention.
        encoder: Whether the encoder's self-attention gets a prefix.
        decoder: Whether the decoder's self-attention gets one.
        cross: Whether the decoder's attention to the encoder's output gets one.
        counted: Whether the decoder's slots take the first positions, as in PEFT: targets (in
            decoder-only models, inputs) then start at position `length`, and T5's relative position
            bias reaches the slots; a sliding window leaves them behind, as it does in PEFT.
            Otherwise slots have no position and no bias, and every token sees them.
        mid_dim: If not None, keys and values of each kind of attention come out of an MLP, whose
            hidden layer has this size: P = W tanh(W' P'), with biases, where P' is [length,
            emb_dim] (section 4.3; the authors take 512 for GPT-2, 800 for BART). Its parameters are
            those of `prefix/encoder`, `prefix/decoder` and `prefix/cross`; it is gone at export.
        initialization: "random", or "text" for the keys and values that the pretrained model
            itself has for the words of `text`, read from position 0 on in encoder and decoder.
            With `counted` a decoder-only model then starts as if it had read them before its input.
            With `mid_dim` the MLP's last layer is fitted to them: exactly if mid_dim >= length,
            otherwise in the least-squares sense.
        text: Cut to `length` tokens, or repeated until there are as many.
        vocabulary: Gives the text's tokens, without any before or after them.
    """

    name: str = "prefix"
    length: Count = 20
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    counted: bool = False
    mid_dim: Count | None = None
    initialization: str = "random"
    text: str = ""
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, switch) for switch in SITES):
            raise UserError(f"Prefix needs one of {', '.join(SITES)} to be True.")
        if self.counted and not self.decoder:
            raise UserError("Prefix.counted needs Prefix.decoder: only its slots have positions.")
        if self.initialization not in INITIALIZATIONS:
            raise UserError(
                f"Prefix.initialization='{self.initialization}' is not one of {INITIALIZATIONS}."
                + nearest(self.initialization, INITIALIZATIONS)
            )
        if self.initialization == "text" and self.vocabulary is None:
            raise UserError("Prefix.initialization='text' needs Prefix.vocabulary.")

    def kv(
        self,
        scope: nn.Module,
        blocks: Sequence[KeyValues],
        bias: Float[Array, "#batch #heads query key"],
    ) -> tuple[Sequence[KeyValues], Float[Array, "#batch #heads query longer"]]:
        if scope.path[-1] not in self._sites():
            return blocks, bias
        like = blocks[0]["key"]  # [batch, key, heads, head_dim]
        slots = _Slots((self.length, *like.shape[2:]), name=self.name)()
        prefix = {  # [batch, length, heads, head_dim]
            part: jnp.broadcast_to(leaf.astype(like.dtype)[None], (like.shape[0], *leaf.shape))
            for part, leaf in slots.items()
        }
        blocks, missing = [prefix, *blocks], self.length
        if self.counted and scope.path[-1] == SITES["decoder"]:
            # A relative position bias, and a window's, already has columns for the slots.
            missing = max(0, sum(block["key"].shape[1] for block in blocks) - bias.shape[-1])
        # A bias of 0: every token sees every slot.
        return blocks, jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (missing, 0)))

    def decoder_slots(self) -> int:
        return self.length if self.counted else 0

    def check(self, shapes: Params, config: Any) -> None:
        if not any(self.owns(path) for path in traverse_util.flatten_dict(shapes, sep="/")):
            raise UserError(
                "Prefix has no attention in this model; decoder-only models need "
                "Prefix.decoder=True."
            )
        if self.initialization == "text":
            if (largest := max(self._tokens())) >= config.vocab_size:
                raise UserError(
                    f"Prefix.vocabulary gives Prefix.text the token {largest}, but the model has "
                    f"{config.vocab_size} tokens; give the model's vocabulary."
                )
            # What `_activations` reads must have positions.
            config.check_lengths(self.length, 1 if config.decoder_only else self.length, 0)

    def initialize(self, rng: jax.Array, params: Params, config: Any) -> Mapping[str, Any]:
        del rng
        if self.initialization == "random":
            return {}
        activations = self._activations(params, config)
        if self.mid_dim is None:
            return activations
        values: dict[str, jax.Array] = {}
        for switch, mlp in params[self.name].items():
            layers = range(mlp["out"]["kernel"].shape[1])
            slots = [[activations[self._path(switch, i, part)] for part in PARTS] for i in layers]
            # From [layers, key or value, length, heads, head_dim] to the length first.
            out = _fitted(mlp, jnp.moveaxis(jnp.array(slots), 2, 0))
            values |= {f"{self.name}/{switch}/out/{name}": leaf for name, leaf in out.items()}
        return values

    def reparameterize(self, rng: jax.Array, params: Params) -> Params:
        if self.mid_dim is None:
            return params
        flat = traverse_util.flatten_dict(params, sep="/")
        emb_dim = nn.unbox(flat["token_embedder/embedding"]).shape[-1]
        for number, (switch, site) in enumerate(SITES.items()):
            ending = f"/{site}/{self.name}/key"
            keys = [nn.unbox(leaf) for path, leaf in flat.items() if path.endswith(ending)]
            if keys:
                mlp = _mlp(
                    jax.random.fold_in(rng, number), emb_dim, self.mid_dim, len(keys), keys[0].shape
                )
                for path, leaf in traverse_util.flatten_dict(mlp, sep="/").items():
                    flat[f"{self.name}/{switch}/{path}"] = leaf
                for i in range(len(keys)):
                    for part in PARTS:
                        del flat[self._path(switch, i, part)]
        reparameterized: Params = traverse_util.unflatten_dict(flat, sep="/")
        return reparameterized

    def materialize(self, params: Params) -> Params:
        if self.name not in params:
            return params
        rest = {name: leaf for name, leaf in params.items() if name != self.name}
        flat = traverse_util.flatten_dict(rest, sep="/")
        for switch, mlp in params[self.name].items():
            # [length, layers, key or value, heads, head_dim]
            slots = _linear(_hidden(mlp), mlp["out"])
            slots = constrain(slots, "prompt", None, None, "heads", "kv")
            for i in range(slots.shape[1]):
                for j, part in enumerate(PARTS):
                    flat[self._path(switch, i, part)] = slots[:, i, j]
        materialized: Params = traverse_util.unflatten_dict(flat, sep="/")
        return materialized

    def exported(self) -> "Prefix":
        return dataclasses.replace(
            self, mid_dim=None, initialization="random", text="", vocabulary=None
        )

    def _sites(self) -> set[str]:
        return {site for switch, site in SITES.items() if getattr(self, switch)}

    def _path(self, switch: str, layer: int, part: str) -> str:
        stack = "decoder" if switch == "cross" else switch
        return f"{stack}/layers_{layer}/{SITES[switch]}/{self.name}/{part}"

    def _tokens(self) -> list[int]:
        tokens = self.vocabulary.encode(self.text) if self.vocabulary else []
        if not tokens:
            raise UserError(f"Prefix.text='{self.text}' has no tokens to start from.")
        return (tokens * self.length)[: self.length]

    def _activations(
        self, params: Params, config: Any
    ) -> dict[str, Float[Array, "length heads head_dim"]]:
        """Returns the text's keys and values in the model without PEFT methods, by path."""
        tokens = jnp.array([self._tokens()], jnp.int32)
        # In decoder-only models the target comes after the text, and its keys are cut off below.
        target = tokens[:, :1] if config.decoder_only else tokens
        batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": target}
        module = config.module((_Recorder(self.name),))
        _, state = module.apply({"params": params}, batch, method="hidden", mutable="intermediates")
        return {
            path: leaf[0, : self.length].astype(jnp.float32)
            for path, leaf in traverse_util.flatten_dict(state["intermediates"], sep="/").items()
            if path.split("/")[-3] in self._sites()
        }


class _Recorder(Peft):
    """Records the keys and values that attention sees, under the paths of a prefix."""

    def kv(
        self,
        scope: nn.Module,
        blocks: Sequence[KeyValues],
        bias: Float[Array, "#batch #heads query key"],
    ) -> tuple[Sequence[KeyValues], Float[Array, "#batch #heads query key"]]:
        keys = dict(blocks[0])
        scope.sow("intermediates", self.name, keys, init_fn=dict, reduce_fn=lambda _, new: new)
        return blocks, bias


class _Slots(nn.Module):
    """The parameters of one attention's prefix, drawn as PEFT draws them."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        init: Any = with_axes(nn.initializers.normal(1.0), "prompt", "heads", "kv")
        return {name: self.param(name, init, self.shape, jnp.float32) for name in PARTS}


def _mlp(
    rng: jax.Array, emb_dim: int, mid_dim: int, layers: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Draws the MLP of one kind of attention as PyTorch, and so the authors' code, draws it.

    Args:
        rng: A key.
        emb_dim: Width of P'.
        mid_dim: Width of the hidden layer.
        layers: Number of the model's layers.
        shape: Of the keys of one of them, [length, heads, head_dim].

    Returns:
        Leaves boxed with their logical axes. One kernel for all layers, as it is one linear layer
        in the paper: one product, and one leaf for the optimizer. Heads have an axis of their own,
        so that each device computes the keys and values of its heads; the other axis that may be
        split is the kernel's inputs, as in other layers, because it is by far the largest leaf.
    """
    length, *head = shape
    rngs = jax.random.split(rng, 3)
    normal = with_axes(nn.initializers.normal(1.0), "prompt", "embed")
    return {
        "embedding": normal(rngs[0], (length, emb_dim), jnp.float32),
        "hidden": _drawn(rngs[1], (emb_dim, mid_dim), ("embed", None)),
        "out": _drawn(
            rngs[2], (mid_dim, layers, len(PARTS), *head), ("embed", None, None, "heads", "kv")
        ),
    }


def _drawn(rng: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Any]:
    """Draws a linear layer uniformly within inputs^-0.5, for a kernel of this shape."""
    bound = shape[0] ** -0.5

    def uniform(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)

    kernel_rng, bias_rng = jax.random.split(rng)
    return {
        "kernel": with_axes(uniform, *axes)(kernel_rng, shape),
        "bias": with_axes(uniform, *axes[1:])(bias_rng, shape[1:]),
    }


def _hidden(mlp: Params) -> Float[Array, "length mid"]:
    return jnp.tanh(_linear(mlp["embedding"], mlp["hidden"]))


def _linear(x: Float[AnyArray, "length inputs"], layer: Params) -> Float[Array, "length *outputs"]:
    # Accelerators would round to fewer digits by default. It is little work, once a step.
    y = jnp.tensordot(x, layer["kernel"], 1, precision=lax.Precision.HIGHEST)
    bias: jax.Array = layer["bias"]
    return y + bias[None]


def _fitted(
    mlp: Params, slots: Float[Array, "length layers two heads head_dim"]
) -> dict[str, jax.Array]:
    """Returns the MLP's last layer with which its output comes closest to `slots`.

    Of several such layers it is the one of least norm (kernel and bias together). Hidden states
    are random, so that `length` of them are linearly independent if mid_dim >= length: the output
    is then exact. The authors fit the whole MLP by gradient descent instead.
    """
    hidden = _hidden(mlp)
    inputs = jnp.concatenate([hidden, jnp.ones_like(hidden[:, :1])], 1)  # [length, mid + 1]
    layer = jnp.tensordot(jnp.linalg.pinv(inputs), slots, 1, precision=lax.Precision.HIGHEST)
    return {"kernel": layer[:-1], "bias": layer[-1]}
