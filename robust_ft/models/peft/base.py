"""The hooks that a parameter-efficient finetuning (PEFT) method can implement.

`models/layers.py` and the families call these hooks in one line each; a method overrides those it
needs. Inside a hook, `scope` is the Linen module at the hook site: `scope.param` creates the
method's parameters below that module's path, under `self.name`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from robust_ft.errors import UserError
from robust_ft.ranges import check_ranges
from robust_ft.types import Batch, Params

KeyValues = Mapping[str, jax.Array]  # "key" and "value", each [batch, length, heads, head_dim]


@dataclasses.dataclass(frozen=True)
class Peft:
    """One PEFT method; a frozen dataclass of its settings.

    Attributes:
        name: The path component that all of the method's parameters have and no other has.
    """

    name: str

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.name.isidentifier():
            raise UserError(
                f"{type(self).__name__}.name='{self.name}' must be one word of letters, digits "
                "and underscores."
            )

    def embed(
        self,
        scope: nn.Module,
        x: Float[Array, "batch length embed"],
        mask: Bool[Array, "batch length"],
        batch: Batch,
    ) -> tuple[Float[Array, "batch longer embed"], Bool[Array, "batch longer"]]:
        """Changes the embedded input of the encoder (or of a decoder-only model).

        Args:
            scope: The encoder, or the decoder.
            x: The embedded input.
            mask: Which of it is not padding.
            batch: Where it comes from.

        Returns:
            The input with the method's vectors, and its mask.
        """
        return x, mask

    def input_slots(self) -> int:
        """Returns how many vectors `embed` adds to an input."""
        return 0

    def dense_input(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"]
    ) -> Float[Array, "*rest inputs"]:
        """Changes the input of a dense layer."""
        return x

    def dense(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"], y: Float[Array, "*rest outputs"]
    ) -> Float[Array, "*rest outputs"]:
        """Changes the output y of a dense layer with input x."""
        return y

    def kv(
        self,
        scope: nn.Module,
        blocks: Sequence[KeyValues],
        bias: Float[Array, "#batch #heads query key"],
    ) -> tuple[Sequence[KeyValues], Float[Array, "#batch #heads query longer"]]:
        """Changes the keys and values that attention reads.

        Args:
            scope: The attention.
            blocks: Keys and values, see `attention.attend`; rotary keys are already rotated.
            bias: Added to the scores of all blocks' keys. With relative positions, it has columns
                for `decoder_slots` before them.

        Returns:
            The blocks, and a bias with a column for each of their keys.
        """
        return blocks, bias

    def decoder_slots(self) -> int:
        """Returns how many positions the method's keys occupy before the decoder's tokens."""
        return 0

    def residual(
        self, scope: nn.Module, site: str, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        """Changes what a sublayer adds to the residual stream.

        Args:
            scope: The layer.
            site: Which of its sublayers: "attention" (an encoder's), "self_attention",
                "encoder_decoder_attention" or "mlp".
            x: The sublayer's output, after dropout.
        """
        return x

    def initialize(self, rng: jax.Array, params: Params, config: Any) -> Mapping[str, Any]:
        """Returns initial values that depend on the pretrained parameters.

        Args:
            rng: A key.
            params: All parameters, pretrained ones restored, the method's own freshly drawn.
            config: The model's config, whose `module` can be run.

        Returns:
            A map from parameter path to new value; by default nothing is changed.
        """
        return {}

    def check(self, shapes: Params, config: Any) -> None:
        """Raises a UserError if the method does not fit a model, before anything is computed.

        Args:
            shapes: All of the model's parameters as shapes and types, the method's own included.
            config: The model's config.
        """

    def reparameterize(self, rng: jax.Array, params: Params) -> Params:
        """Replaces the method's parameters that the model reads by those that train.

        Args:
            rng: A key.
            params: All parameters as drawn by the modules, leaves boxed with their logical axes.
        """
        return params

    def materialize(self, params: Params) -> Params:
        """Computes the parameters that the model reads; undoes `reparameterize`."""
        return params

    def exported(self) -> "Peft":
        """Returns the method without its reparameterization, as it is used after training."""
        return self

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that have parameters of their own; none if all share them.

        Batches then have a "task_index" [batch], a position in this tuple.
        """
        return ()

    @property
    def is_infix(self) -> bool:
        """Whether it stands behind the input's last token."""
        return False

    def owns(self, path: str) -> bool:
        """Returns whether the parameter at this path belongs to the method."""
        return re.search(rf"(^|/){re.escape(self.name)}(/|$)", path) is not None

    def is_fixed(self, path: str) -> bool:
        """Returns whether a parameter of the method never trains, whatever a pattern says."""
        return False


def decoder_slots(peft: Sequence[Peft]) -> int:
    """Returns how many positions the keys of all methods occupy before the decoder's tokens.

    Raises:
        UserError: Keys without positions would come between these keys and the tokens.
    """
    # Methods that override `kv` add keys; each puts its own before those of the methods before it.
    counts = [method.decoder_slots() for method in peft if type(method).kv is not Peft.kv]
    if counts != sorted(counts, key=lambda count: count == 0):
        raise UserError("In Model.peft, prefixes that are counted must come before those that not.")
    return sum(counts)
