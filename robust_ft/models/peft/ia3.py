"""(IA)³: learned vectors that rescale what attention and the feed-forward sublayer compute.

Liu et al., 2022, section 3.3: keys and values are multiplied by l_k and l_v, what the last
feed-forward kernel reads by l_ff, where only these vectors train.
"""

import dataclasses
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
from robust_ft.types import Params


@dataclasses.dataclass(frozen=True)
class IA3(Peft):
    """One vector `<layer>/ia3` for some dense layers, of their outputs' or their inputs' size.

    It starts at 1 and is float32 whatever the kernels are. Patterns match paths of dense layers
    in full, such as "decoder/layers_0/mlp/wo".

    Attributes:
        outputs: Which layers' outputs are rescaled. GPT-2 has query, key and value in one layer,
            `qkv`, whose output is rescaled as a whole, as in PEFT.
        inputs: Which layers' inputs are rescaled, and their outputs not.
    """

    name: str = "ia3"
    outputs: str = r".*attention/(key|value|qkv)"
    inputs: str = r".*mlp/wo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern("IA3.outputs", self.outputs)
        check_pattern("IA3.inputs", self.inputs)

    def dense_input(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"]
    ) -> Float[Array, "*rest inputs"]:
        return self._rescaled(scope, x, 0) if self._reads(scope) else x

    def dense(
        self, scope: nn.Module, x: Float[Array, "*rest inputs"], y: Float[Array, "*rest outputs"]
    ) -> Float[Array, "*rest outputs"]:
        del x
        if self._reads(scope) or not re.fullmatch(self.outputs, "/".join(scope.path)):
            return y
        return self._rescaled(scope, y, 1)

    def check(self, shapes: Params, config: Any) -> None:
        del config
        paths = traverse_util.flatten_dict(shapes, sep="/")
        layers = {path.removesuffix(f"/{self.name}") for path in paths if self.owns(path)}
        check_match("IA3.inputs", self.inputs, layers, shapes)
        layers -= {layer for layer in layers if re.fullmatch(self.inputs, layer)}
        check_match("IA3.outputs", self.outputs, layers, shapes)

    def _reads(self, scope: nn.Module) -> bool:
        return re.fullmatch(self.inputs, "/".join(scope.path)) is not None

    def _rescaled(
        self, scope: nn.Module, x: Float[Array, "*rest size"], side: int
    ) -> Float[Array, "*rest size"]:
        """Multiplies a layer's input (side 0) or output (side 1) by the layer's vector."""
        axes: Any = getattr(scope, "axes", (None, None))
        init = with_axes(nn.initializers.ones, axes[side])
        vector: jax.Array = scope.param(self.name, init, (x.shape[-1],), jnp.float32)
        return x * vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)
