"""OPLoRA: a LoRA that leaves the dominant singular directions of each kernel as they were.

Xiong and Xie, 2025 (arXiv 2510.13003): with the k largest singular triples U_k, S_k, V_k of a
kernel W [inputs, outputs], the update is (I - U_k U_k^T) A B (I - V_k V_k^T). It neither reads nor
writes these directions, so that W keeps its k largest triples exactly.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.models.axes import with_axes
from robust_ft.models.peft.lora import Lora
from robust_ft.ranges import Count
from robust_ft.types import Params


@dataclasses.dataclass(frozen=True)
class OPLora(Lora):
    """A `Lora` whose factors are projected: `a` out of `u`, `b` out of `v`, which never train.

    After training it is a plain LoRA of the same rank, of the projected factors.

    Attributes:
        directions: The paper's k, fewer than a kernel has.
    """

    name: str = "oplora"
    directions: Count = 16

    def is_fixed(self, path: str) -> bool:
        return path.endswith((f"/{self.name}/u", f"/{self.name}/v"))

    def check(self, shapes: Params, config: Any) -> None:
        super().check(shapes, config)
        for layer, (a, b) in self._factors(shapes).items():
            if self.directions >= (full := min(a.shape[0], b.shape[1])):
                raise UserError(
                    f"OPLora.directions={self.directions} leaves nothing to train of '{layer}', "
                    f"whose kernel is [{a.shape[0]}, {b.shape[1]}]; it must be below {full}."
                )

    def reparameterize(self, rng: jax.Array, params: Params) -> Params:
        flat = traverse_util.flatten_dict(params, sep="/")
        zeros = nn.initializers.zeros
        for layer, (a, b) in self._factors(params).items():
            for name, axis, size in (
                ("u", a.names[0], a.value.shape[0]),
                ("v", b.names[1], b.value.shape[1]),
            ):
                draw = with_axes(zeros, axis, None)
                shape = (size, self.directions)
                flat[f"{layer}/{self.name}/{name}"] = draw(rng, shape, jnp.float32)
        return _nested(flat)

    def initialize(self, rng: jax.Array, params: Params, config: Any) -> Mapping[str, Any]:
        del rng, config
        flat = traverse_util.flatten_dict(params, sep="/")
        values: dict[str, jax.Array] = {}
        for layer in self._factors(params):
            kernel = flat[f"{layer}/kernel"].astype(jnp.float32)
            u, _, vt = jnp.linalg.svd(kernel, full_matrices=False)
            values[f"{layer}/{self.name}/u"] = u[:, : self.directions]
            values[f"{layer}/{self.name}/v"] = vt[: self.directions].T
        return values

    def materialize(self, params: Params) -> Params:
        flat = traverse_util.flatten_dict(params, sep="/")
        for layer, (a, b) in self._factors(params).items():
            name = f"{layer}/{self.name}"
            if f"{name}/u" in flat:  # it is not where the factors are projected already
                flat[f"{name}/a"] = _without(flat.pop(f"{name}/u"), a)
                flat[f"{name}/b"] = _without(flat.pop(f"{name}/v"), b.T).T
        return _nested(flat)

    def exported(self) -> Lora:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Lora)}
        return Lora(**fields).exported()

    def merge(self, params: Params) -> Params:
        return self.exported().merge(self.materialize(params))

    def _factors(self, params: Params) -> dict[str, tuple[Any, Any]]:
        """Returns each layer's `a` [inputs, rank] and `b` [rank, outputs]."""
        flat = traverse_util.flatten_dict(params, sep="/")
        ending = f"/{self.name}/a"
        layers = [path.removesuffix(ending) for path in flat if path.endswith(ending)]
        return {each: tuple(flat[f"{each}/{self.name}/{ab}"] for ab in "ab") for each in layers}


def _without(
    basis: Float[Array, "size k"], columns: Float[Array, "size rank"]
) -> Float[Array, "size rank"]:
    """Returns the columns without what lies in an orthonormal basis."""
    # Accelerators would round to fewer digits by default, and the directions would leak.
    highest = lax.Precision.HIGHEST
    inside = jnp.matmul(basis.T, columns, precision=highest)  # [k, rank]
    return columns - jnp.matmul(basis, inside, precision=highest)


def _nested(flat: Mapping[str, Any]) -> Params:
    nested: Params = traverse_util.unflatten_dict(flat, sep="/")
    return nested
