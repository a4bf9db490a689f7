"""LoRA: a trainable product of two thin matrices beside the kernels of dense layers.

Hu et al., 2021, section 4.1: y = x W + alpha / rank * x A B, where only A and B train.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from robust_ft.models.axes import with_axes
from robust_ft.models.peft.base import Peft
from robust_ft.models.peft.targets import check_match, check_pattern
from robust_ft.models.product import product
from robust_ft.ranges import Count, Positive, Rate
from robust_ft.types import Params


@dataclasses.dataclass(frozen=True)
class Lora(Peft):
    """A low-rank update of some dense layers, `<layer>/lora/a` [inputs, rank] and `b`.

    The update starts at zero. It is float32 whatever the kernels are.

    Attributes:
        rank: Inner size of the product.
        alpha: The product is scaled by alpha / rank.
        dropout_rate: Of what goes into the product.
        target: Which dense layers get one: a pattern that matches their path in full, such as
            "decoder/layers_0/mlp/wo". GPT-2 has query, key and value in one layer, `qkv`.
    """

    name: str = "lora"
    rank: Count = 8
    alpha: Positive = 8.0
    dropout_rate: Rate = 0.0
    target: str = r".*attention/(query|value|qkv)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern("Lora.target", self.target)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def dense(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"], y: Float[Array, "*rest outputs"]
    ) -> Float[Array, "*rest outputs"]:
        if not re.fullmatch(self.target, "/".join(scope.path)):
            return y
        axes: Any = getattr(scope, "axes", (None, None))
        update = _Product(self.rank, y.shape[-1], axes, self.dropout_rate, name=self.name)(x)
        return y + (self.scale * update).astype(y.dtype)

    def check(self, shapes: Params, config: Any) -> None:
        del config
        paths = traverse_util.flatten_dict(shapes, sep="/")
        layers = [p.removesuffix(f"/{self.name}/a") for p in paths if self.owns(p)]
        check_match("Lora.target", self.target, layers, shapes)

    def exported(self) -> "Lora":
        """Returns it without dropout, which only training has."""
        return dataclasses.replace(self, dropout_rate=0.0)

    def merge(self, params: Params) -> Params:
        """Returns parameters of the model without LoRA that computes the same.

        Sums are made in float32 and rounded to the kernels' type.
        """
        flat = traverse_util.flatten_dict(params, sep="/")
        merged = {path: leaf for path, leaf in flat.items() if not self.owns(path)}
        for path, a in flat.items():
            if path.endswith(ending := f"/{self.name}/a"):
                layer = path.removesuffix(ending)
                b, kernel = flat[f"{layer}/{self.name}/b"], merged[f"{layer}/kernel"]
                merged[f"{layer}/kernel"] = self.merged_kernel(kernel, a, b)
        merged_params: Params = traverse_util.unflatten_dict(merged, sep="/")
        return merged_params

    def merged_kernel(self, kernel: Any, a: Any, b: Any) -> Any:
        """Returns one kernel with its update; NumPy and JAX arrays stay what they are."""
        update = self.scale * (a.astype("float32") @ b.astype("float32"))
        return (kernel.astype("float32") + update).astype(kernel.dtype)


class _Product(nn.Module):
    """x A B, where A is drawn as PEFT draws it, uniformly within inputs^-0.5, and B is zero."""

    rank: Count
    features: int
    axes: tuple[str | None, str | None]
    dropout_rate: Rate

    @nn.compact
    def __call__(self, x: Float[Array, "*rest inputs"]) -> Float[Array, "*rest features"]:
        a_init = with_axes(_bounded, self.axes[0], None)
        b_init = with_axes(nn.initializers.zeros, None, self.axes[1])
        a = self.param("a", a_init, (x.shape[-1], self.rank), jnp.float32)
        b = self.param("b", b_init, (self.rank, self.features), jnp.float32)
        # Without randomness the model is deterministic (`Model.logits`).
        deterministic = not self.has_rng("dropout")
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return product(product(x, a.astype(x.dtype)), b.astype(x.dtype))


def _bounded(rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(rng, shape, dtype, -bound, bound)
