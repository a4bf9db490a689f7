"""The bundle that the rest of the program sees: plain functions of parameters and batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, Int

from robust_ft.errors import UserError
from robust_ft.models.peft.base import Peft
from robust_ft.types import Batch, Params


class ModelConfig(Protocol):
    """A frozen dataclass with an architecture's sizes."""

    @property
    def vocab_size(self) -> int: ...

    def module(self, peft: tuple[Peft, ...] = ()) -> nn.Module:
        """Returns the Linen module with these PEFT methods plugged in."""
        ...


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture, its PEFT methods and its token ids.

    Hashable, so that jitted functions can take it as a static argument. All methods are pure.

    Attributes:
        config: Sizes; knows how to build the Linen module.
        peft: The PEFT methods that are plugged in.
        start_id: The first token of every decoder input.
    """

    config: ModelConfig
    peft: tuple[Peft, ...] = ()
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peft", tuple(self.peft))
        names = [method.name for method in self.peft]
        if len(set(names)) < len(names):
            raise UserError(f"Model.peft needs methods with different names, not {names}.")

    def without(self, *names: str) -> "Model":
        """Returns the model with these PEFT methods removed; parameters stay as they are."""
        return dataclasses.replace(self, peft=tuple(p for p in self.peft if p.name not in names))

    def init(self, rng: jax.Array) -> Params:
        """Draws all parameters."""
        return nn.unbox(self._init(rng))

    def shapes(self) -> Params:
        """Returns the parameters' shapes and types without drawing them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Params:
        """Returns each parameter's logical axis names, a tree like `init`'s."""
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
        )

    def initialize_peft(self, rng: jax.Array, params: Params) -> Params:
        """Sets PEFT parameters whose initial values depend on the pretrained ones."""
        flat = traverse_util.flatten_dict(params, sep="/")
        for i, method in enumerate(self.peft):
            flat |= method.initialize(jax.random.fold_in(rng, i), params)
        return traverse_util.unflatten_dict(flat, sep="/")

    def peft_owns(self, path: str) -> bool:
        """Returns whether the parameter belongs to a PEFT method, not to the pretrained model."""
        return any(method.owns(path) for method in self.peft)

    def logits(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "batch target vocab"]:
        """Returns float32 logits; with a key, dropout is on."""
        return self._apply(params, rng)(batch)

    def hidden(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "batch target embed"]:
        """Returns the states before the output head, for losses that never hold all logits."""
        return self._apply(params, rng, "hidden")(batch)

    def head(
        self, params: Params, hidden: Float[Array, "*rest embed"]
    ) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states."""
        return self._apply(params, None, "head")(hidden)

    def prefill(self, params: Params, batch: Batch, max_length: int) -> Any:
        """Reads the input and returns a cache whose leaves all lead with the batch axis."""
        return self._apply(params, None, "prefill")(batch, max_length)

    def step(
        self, params: Params, cache: Any, tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Reads one token a row; returns float32 log-probabilities of the next and the cache."""
        logits, cache = self._apply(params, None, "step")(cache, tokens)
        return jax.nn.log_softmax(logits), cache

    def _init(self, rng: jax.Array) -> Any:
        batch = {
            name: jnp.ones((1, 1), jnp.int32)
            for name in ("encoder_input_tokens", "decoder_input_tokens")
        }
        return self.config.module(self.peft).init(rng, batch)["params"]

    def _apply(
        self, params: Params, rng: jax.Array | None, method: str | None = None
    ) -> Callable[..., Any]:
        module = self.config.module(self.peft).clone(deterministic=rng is None)
        rngs = None if rng is None else {"dropout": rng}
        return lambda *args: module.apply({"params": params}, *args, rngs=rngs, method=method)
