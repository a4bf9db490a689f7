"""The hook sites that a parameter-efficient finetuning (PEFT) method can use.

`models/layers.py` and the models call these hooks in one line each; a method overrides those it
needs. Inside a hook, `scope` is the Linen module at the hook site: `scope.param` creates the
method's parameters below that module's path, under `self.name`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from robust_ft.errors import UserError
from robust_ft.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Peft:
    """One PEFT method; a frozen dataclass of its settings.

    Attributes:
        name: The path component that all of the method's parameters have and no other has.
    """

    name: str

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise UserError(
                f"{type(self).__name__}.name='{self.name}' must be one word of letters, digits "
                "and underscores."
            )

    def embed(
        self,
        scope: nn.Module,
        x: Float[Array, "batch length embed"],
        valid: Bool[Array, "batch length"],
        batch: Batch,
    ) -> tuple[Float[Array, "batch longer embed"], Bool[Array, "batch longer"]]:
        """Changes the embedded input of the encoder (or of a decoder-only model)."""
        return x, valid

    def dense(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"], y: Float[Array, "*rest outputs"]
    ) -> Float[Array, "*rest outputs"]:
        """Changes the output y of a dense layer with input x."""
        return y

    def residual(
        self, scope: nn.Module, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """Changes what a sublayer adds to the residual stream."""
        return x

    def initialize(self, rng: jax.Array, params: Params) -> Mapping[str, Any]:
        """Returns initial values that depend on the pretrained parameters.

        Args:
            rng: A key.
            params: All parameters, pretrained ones restored, the method's own freshly drawn.

        Returns:
            A map from parameter path to new value; by default nothing is changed.
        """
        return {}

    def owns(self, path: str) -> bool:
        """Returns whether the parameter at this path belongs to the method."""
        return re.search(rf"(^|/){re.escape(self.name)}(/|$)", path) is not None
