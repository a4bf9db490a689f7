"""Adapters: small bottlenecks behind the sublayers of every layer.

Houlsby et al., 2019, section 2: what a sublayer adds to the residual stream becomes
y + W_up f(W_down y + b_down) + b_up, where only the adapter trains.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from robust_ft.errors import UserError, nearest
from robust_ft.models.axes import with_axes
from robust_ft.models.options import ACTIVATIONS
from robust_ft.models.peft.base import Peft
from robust_ft.models.product import product
from robust_ft.ranges import Count
from robust_ft.types import Params

# The sublayers that there are: an encoder's attention, a decoder's two, and the feed-forward one.
SITES = ("attention", "self_attention", "encoder_decoder_attention", "mlp")

# Two adapters a layer, after self-attention and after the feed-forward sublayer.
HOULSBY = ("attention", "self_attention", "mlp")
# One a layer, after the feed-forward sublayer (Pfeiffer et al., 2021).
PFEIFFER = ("mlp",)


@dataclasses.dataclass(frozen=True)
class Adapter(Peft):
    """Bottlenecks `<layer>/adapter_<site>/down` [embed, size] and `up` [size, embed].

    They start near the identity and are float32 whatever the model's parameters are.

    Attributes:
        size: Width of the bottleneck.
        sites: The sublayers that get one, of `SITES`: by default Houlsby's, `PFEIFFER` for
            Pfeiffer's. A family has those of its own sublayers.
        activation: A name in `robust_ft.models.options.ACTIVATIONS`.
    """

    name: str = "adapter"
    size: Count = 200
    sites: Sequence[str] = HOULSBY
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        # gin gives lists; a frozen method has to be hashable.
        object.__setattr__(self, "sites", tuple(self.sites))
        for site in self.sites:
            if site not in SITES:
                raise UserError(
                    f"Adapter.sites has '{site}', which is not one of {SITES}."
                    + nearest(site, SITES)
                )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"Adapter.activation='{self.activation}' is not one of {tuple(ACTIVATIONS)}."
                + nearest(self.activation, ACTIVATIONS)
            )

    def residual(
        self, scope: nn.Module, site: str, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        if site not in self.sites:
            return x
        return x + _Bottleneck(self.size, self.activation, name=f"{self.name}_{site}")(x)

    def check(self, shapes: Params, config: Any) -> None:
        del config
        paths = traverse_util.flatten_dict(shapes, sep="/")
        if not any(self.owns(path) for path in paths):
            parts = {part for path in paths for part in path.split("/")}
            here = tuple(site for site in SITES if site in parts)
            raise UserError(
                f"Adapter.sites={self.sites} has none of this model's sublayers, which are {here}."
            )

    def owns(self, path: str) -> bool:
        # A layer has several adapters, whose parameters stand beside each other and need different
        # names.
        sites = "|".join(SITES)
        return re.search(rf"(^|/){re.escape(self.name)}_({sites})(/|$)", path) is not None


class _Bottleneck(nn.Module):
    """W_up f(W_down x + b_down) + b_up."""

    size: Count
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "*rest embed"]) -> Float[Array, "*rest embed"]:
        hidden = _Affine(self.size, ("embed", None), name="down")(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        return _Affine(x.shape[-1], (None, "embed"), name="up")(hidden)


class _Affine(nn.Module):
    """x W + b; W is drawn as Houlsby et al. draw it, within two standard deviations; b is 0."""

    features: int
    axes: tuple[str | None, str | None]

    @nn.compact
    def __call__(self, x: Float[Array, "*rest inputs"]) -> Float[Array, "*rest features"]:
        kernel_init = with_axes(nn.initializers.truncated_normal(1e-3), *self.axes)
        bias_init = with_axes(nn.initializers.zeros, self.axes[1])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias: jax.Array = self.param("bias", bias_init, (self.features,), jnp.float32)
        y = product(x, kernel.astype(x.dtype))
        bias = bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
        return y + bias
