"""cuDNN's attention on 8 simulated devices, the kernel replaced; says "same" for every mesh.

All of JAX's way to the kernel runs: derivative, partitioning, sums over devices. Only the innermost
call, for one device's part, is NumPy-like code on CPUs.
"""

import os
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir

from robust_ft.models import attention, attention_kernels
from robust_ft.partitioning import Partitioner

BATCH, LENGTH, HEADS, HEAD_DIM = 8, 6, 4, 8
MESHES = [
    Partitioner(fully_sharded=4),
    Partitioner(model_parallel=2),
    Partitioner(fully_sharded=2, model_parallel=4),
]


def reference(query, key, value, bias, scale):
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale + bias)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


parts = set()  # the shapes that devices got


def forward(query, key, value, bias, *_, scale, **__):
    parts.add(query.shape)
    mixed = reference(query, key, value, bias, scale)
    statistics = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]))
    return mixed, statistics


def backward(query, key, value, bias, *rest, scale, **_):
    _, pull = jax.vjp(lambda *x: reference(*x, scale), query, key, value, bias)
    return pull(rest[-1])


cudnn.check_cudnn_version = lambda: 91000
attention_kernels.nvidia_gpu = lambda: SimpleNamespace(compute_capability="9.0")
for primitive, function in (
    (cudnn._dot_product_attention_fwd_p, forward),
    (cudnn._dot_product_attention_bwd_p, backward),
):
    lowering = mlir.lower_fun(function, multiple_results=True)
    mlir.register_lowering(primitive, lowering, platform="cpu")


def loss(kernel, inputs, weights):
    keys = {name: attention.split_heads(inputs[name], HEADS) for name in ("key", "value")}
    query = attention.split_heads(inputs["query"], HEADS)
    bias = inputs["positions"] + inputs["padding"]
    # Encoders' bias has both axes, decoders' heads alone, decoder-only models' examples alone.
    mixed = [
        attention.attend(query, [keys], each, None, 0.5, kernel)
        for each in (bias, inputs["positions"], inputs["padding"])
    ]
    return jnp.sum(jnp.stack(mixed).astype(jnp.float32) * weights)


def main():
    rng = np.random.default_rng(0)
    joined = (BATCH, LENGTH, HEADS * HEAD_DIM)
    inputs = {name: rng.normal(size=joined) for name in ("query", "key", "value")}
    inputs = {name: value.astype(jnp.bfloat16) for name, value in inputs.items()}
    inputs["positions"] = rng.normal(size=(1, HEADS, LENGTH, LENGTH)).astype(np.float32)
    inputs["padding"] = rng.normal(size=(BATCH, 1, LENGTH, LENGTH)).astype(np.float32)
    weights = rng.normal(size=(3, *joined)).astype(np.float32)
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    expected = gradient("xla", inputs, weights)
    for partitioner in MESHES:
        by_row = dict.fromkeys(inputs, partitioner.batch_sharding)
        by_row["positions"] = partitioner.replicated
        with partitioner.activate():
            parts.clear()
            found = gradient("cudnn", jax.device_put(inputs, by_row), weights)
        rows, heads = partitioner.batch_shards, partitioner.model_parallel
        assert parts == {(BATCH // rows, LENGTH, HEADS // heads, HEAD_DIM)}, parts
        for name, value in expected.items():
            scale = np.abs(np.float32(value)).max()
            difference = np.abs(np.float32(found[name]) - np.float32(value)).max()
            assert difference < 0.02 * scale, (partitioner, name, difference, scale)
        print("same")


if __name__ == "__main__":
    main()
