"""What configs name by a string: types, activations, and what a layer's backward pass keeps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift

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


def rematerialized(layer_class: Any, remat: str) -> Any:
    """Returns the layer whose backward pass keeps what the policy `remat` names.

    With fully sharded parameters, each layer gathers its own just before it runs. Compilers may
    otherwise gather those of all layers at the start, and hold them all at once.
    """
    if remat == "none":
        return layer_class
    late = nn.transforms.lift_transform(_after_input, layer_class)
    return nn.remat(late, policy=REMAT_POLICIES[remat])


def _after_input(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Lifts a layer to one that reads no parameters before its first input is computed."""

    def run(
        scope_fn: Any, repack: Any, variables: Any, rngs: Any, x: jax.Array, *rest: Any
    ) -> tuple[Any, Any]:
        # Parameters wait for x, and no gradient flows to x on this way.
        x_value = jax.lax.stop_gradient(x)
        scope = scope_fn(jax.tree.map(lambda leaf: _after(leaf, x_value), variables), rngs)
        return layer(scope, x, *rest), repack(scope)

    return lift.pack(run, (True,), (True,), (True,))


@jax.custom_jvp
def _after(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `leaf`, which exists only once `x` does."""
    waited: jax.Array = jax.lax.optimization_barrier((leaf, x))[0]
    return waited


# The barrier has no derivative of its own; the leaf's is that of the identity.
@_after.defjvp
def _after_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _after(*primals), tangents[0]
