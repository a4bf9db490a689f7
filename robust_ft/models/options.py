"""Options that the configs of all families have, checked and carried out in one way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift

from robust_ft.errors import UserError, nearest
from robust_ft.models import attention_kernels

DTYPES = ("float32", "bfloat16")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,  # with tanh, which Hugging Face calls gelu_new
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "linear": lambda x: x,
}

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_choices(config: Any, **choices: Sequence[str]) -> None:
    """Raises a UserError unless a config's fields have one of their valid values.

    Args:
        config: A family's config; its `attention`, `remat`, `dtype` and `param_dtype` are checked
            too.
        **choices: For further fields, of a string or of several, the valid ones.
    """
    common = {
        "attention": attention_kernels.CHOICES,
        "remat": tuple(REMAT_POLICIES),
        "dtype": DTYPES,
        "param_dtype": DTYPES,
    }
    for field, known in {**common, **choices}.items():
        values = getattr(config, field)
        for value in (values,) if isinstance(values, str) else values:
            if value not in known:
                raise UserError(
                    f"{type(config).__name__}.{field}='{value}' is not one of {tuple(known)}."
                    + nearest(value, known)
                )


def rematerialized(layer_class: Any, remat: str) -> Any:
    """Returns the layer whose backward pass keeps what the policy `remat` says.

    Where devices share its parameters, they gather them when the layer's turn has come: compilers
    may gather those of all layers at the start.
    """
    if remat == "none":
        return layer_class
    late = nn.transforms.lift_transform(_in_turn, layer_class)
    return nn.remat(late, policy=REMAT_POLICIES[remat])


def _in_turn(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Lifts a layer to one that reads no parameters before its first input is there."""

    def run(
        scope_fn: Any, repack: Any, variables: Any, rngs: Any, x: jax.Array, *rest: Any
    ) -> tuple[Any, Any]:
        seen = jax.lax.stop_gradient(x)
        scope = scope_fn(jax.tree.map(lambda leaf: _after(leaf, seen), variables), rngs)
        return layer(scope, x, *rest), repack(scope)

    return lift.pack(run, (True,), (True,), (True,))


@jax.custom_jvp
def _after(leaf: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((leaf, seen))[0]


@_after.defjvp
def _after_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _after(*primals), tangents[0]
