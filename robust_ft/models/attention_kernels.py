"""What computes attention: plain products and a softmax, or, on GPUs, cuDNN's fused kernel.

The fused kernel never holds all scores in memory, and computes its softmax in float32. It rounds
the bias to the activations' type, as T5's published code does with all scores.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.models.peft.base import KeyValues
from robust_ft.partitioning import constrain, shards

KERNELS = ("auto", "xla", "cudnn")
# Larger heads are for Hopper alone, and none of our models has any.
MAX_HEAD_DIM = 128
# Compute capability of Ampere (A100).
OLDEST_GPU = 8.0


def uses_cudnn(
    choice: str,
    query: Float[Array, "batch query heads head_dim"],
    blocks: Sequence[KeyValues],
    dropped: bool,
) -> bool:
    """Returns whether cuDNN computes an attention.

    Args:
        choice: A config's `attention`: "auto" takes cuDNN where it applies, "xla" never, "cudnn"
            insists. The single query of a decode step never needs it.
        query: The queries.
        blocks: Keys and values, as `attention.attend` gets them.
        dropped: Whether dropout changes the attention weights.

    Raises:
        UserError: "cudnn" where it does not apply.
    """
    if choice == "xla" or query.shape[1] == 1:
        return False
    reason = obstacle(query, blocks, dropped)
    if reason and choice == "cudnn":
        raise UserError(
            f"attention='cudnn' does not apply: {reason}; 'auto' takes it where it does."
        )
    return reason is None


def obstacle(query: Any, blocks: Sequence[Any], dropped: bool) -> str | None:
    """Returns why cuDNN cannot compute an attention, None if it can; see `uses_cudnn`."""
    gpu = nvidia_gpu()
    length, head_dim = query.shape[1], query.shape[3]
    keys = sum(block["key"].shape[1] for block in blocks)
    if gpu is None:
        return "there is no NVIDIA GPU"
    if float(gpu.compute_capability) < OLDEST_GPU:
        return f"{gpu.device_kind} is older than Ampere"
    if query.dtype != jnp.bfloat16:
        return f"activations are {query.dtype}, and it needs dtype='bfloat16'"
    if dropped:
        return "it knows no dropout of the attention weights"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} are not a multiple of 8 up to {MAX_HEAD_DIM}"
    if length % 2 or keys % 2:
        # The kernel's gradient takes even lengths only.
        return f"{length} queries and {keys} keys are not both even, as its gradient needs them"
    if shards("length") != (1,):
        return "the mesh splits sequences (Partitioner.sequence_parallel)"
    return None


def nvidia_gpu() -> Any:
    """Returns the first GPU if JAX computes on NVIDIA's, else None."""
    device = jax.local_devices()[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return device if is_cuda else None


def fused(
    query: Float[Array, "batch query heads head_dim"],
    blocks: Sequence[KeyValues],
    bias: Float[Array, "#batch #heads #query key"],
    scale: float,
    implementation: Any = "cudnn",
) -> Float[Array, "batch query joined"]:
    """Returns the values that each query attends to, heads joined, as `attention.attend` does.

    Args:
        query: The queries.
        blocks: Keys and values, each [batch, block, kv_heads, head_dim]; consecutive heads may
            share keys and values.
        bias: Added to the scores.
        scale: Factor of the scores.
        implementation: "cudnn" or, for comparison anywhere, "xla".
    """
    key, value = (
        jnp.concatenate([block[name] for block in blocks], 1) for name in ("key", "value")
    )  # [batch, key, kv_heads, head_dim]
    # Each device runs the kernel on its own shards, so all operands must be sharded alike.
    query, key, value = (
        constrain(x.astype(query.dtype), "batch", "length", "heads", "kv")
        for x in (query, key, value)
    )
    # The kernel broadcasts over examples and heads itself, but not over queries.
    bias = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[1], key.shape[1]))
    axes = (
        axis if size > 1 else None
        for axis, size in zip(("batch", "heads"), bias.shape[:2], strict=True)
    )
    bias = constrain(bias.astype(query.dtype), *axes, None, None)
    mixed = jax.nn.dot_product_attention(
        query, key, value, bias, scale=scale, implementation=implementation
    )
    return jnp.reshape(mixed, (*query.shape[:2], -1))
