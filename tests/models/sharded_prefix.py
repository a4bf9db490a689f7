"""Checks a reparameterized prefix on a mesh of 2 x 2 devices; run in a process of its own."""

import jax
import numpy as np
from test_prefix import TEXT, prefix_of
from tiny_families import batch_of, model_of, params_of

from robust_ft.models.peft import Prefix
from robust_ft.partitioning import Partitioner
from robust_ft.restore import place_params
from robust_ft.trainable import flatten


def shards(array):
    return {shard.data.shape for shard in array.addressable_shards}


def main():
    partitioner = Partitioner(model_parallel=2)
    assert (partitioner.mesh.shape["data"], partitioner.mesh.shape["model"]) == (2, 2)
    method = prefix_of(TEXT, mid_dim=8)
    model, plain_model = model_of("t5", method), model_of("t5", Prefix(length=method.length))
    known = {
        path: leaf for path, leaf in flatten(params_of(model)).items() if not method.owns(path)
    }
    rngs = jax.random.split(jax.random.key(0))
    params = place_params(model, partitioner, known, *rngs)
    out = params["prefix"]["decoder"]["out"]
    # [mid, layers, key or value, heads, head_dim]: one of two heads a device
    assert shards(out["kernel"]) == {(8, 2, 2, 1, 6)} and shards(out["bias"]) == {(2, 2, 1, 6)}
    assert shards(params["prefix"]["decoder"]["hidden"]["kernel"]) == {(16, 8)}
    with partitioner.activate():
        plain = jax.jit(model.export)(params)
        batch = partitioner.put_batch(batch_of())
        found = jax.jit(model.logits)(params, batch)
    for path, leaf in flatten(plain).items():
        if method.owns(path):
            assert shards(leaf) == {(4, 1, 6)}, path
    # Words give the prefix that they give on one device, which the MLP does not change.
    local = {path: np.asarray(leaf) for path, leaf in known.items()}
    alone = place_params(
        model_of("t5", prefix_of(TEXT)), Partitioner().on(jax.devices()[:1]), local, *rngs
    )
    expected = jax.jit(plain_model.logits)(alone, batch_of())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


if __name__ == "__main__":
    main()
