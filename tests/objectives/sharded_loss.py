"""Computes the chunked loss on meshes and the unchunked one on one device; run in a process alone.

The 4 devices that XLA_FLAGS asks for split examples and the vocabulary in two each, or all
parameters in four. Prints each case that comes out the same, and raises an error for another.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import assert_trees_close, random_batch, random_params, tiny_model

from robust_ft.objectives import Teacher, chunked_loss
from robust_ft.partitioning import Partitioner

VOCAB, EMBED, TOP = 600, 16, 5
MODEL = tiny_model(vocab_size=VOCAB, num_encoder_layers=1, num_decoder_layers=1)
TEACHER = tiny_model(
    vocab_size=VOCAB, num_encoder_layers=1, num_decoder_layers=1, logits_via_embedding=True
)
BATCH = random_batch(0, [6, 4, 2, 5], [5, 7, 1, 3])


def gradient_of(params, teacher, batch, temperature):
    """Returns (gradient, statistics) of a sum of all statistics, and the compiled program."""

    def loss(params, teacher, batch):
        statistics = chunked_loss.logit_statistics(
            MODEL, params, batch, None, Teacher(TEACHER, teacher), temperature, TOP
        )
        log_z, target_logit, logit_sum, _, kl, _ = statistics
        terms = (log_z, target_logit / 2, logit_sum / 300, kl)
        return functools.reduce(jnp.add, [jnp.sum(jnp.sin(term)) for term in terms]), statistics

    jitted = jax.jit(jax.grad(loss, has_aux=True))
    compiled = jitted.lower(params, teacher, batch).compile()
    return compiled(params, teacher, batch), compiled.as_text()


def check(partitioner, most, temperature):
    """Raises an error unless the mesh finds what one device does.

    Args:
        partitioner: The mesh.
        most: The most elements that a device gathers from others at once.
        temperature: Of the KL divergence.
    """
    params, teacher = random_params(MODEL), random_params(TEACHER, seed=1)
    (expected, wanted), _ = gradient_of(params, teacher, BATCH, temperature)
    with partitioner.activate():
        params, teacher = (
            jax.device_put(each, partitioner.shardings(model.logical_axes()))
            for model, each in ((MODEL, params), (TEACHER, teacher))
        )
        # Of at least 128 tokens, where logits or gathered weights would allow fewer.
        limit, chunked_loss.MAX_CHUNK_ELEMENTS = chunked_loss.MAX_CHUNK_ELEMENTS, EMBED * 100
        batch = partitioner.put_batch(BATCH)
        (gradient, statistics), program = gradient_of(params, teacher, batch, temperature)
        chunked_loss.MAX_CHUNK_ELEMENTS = limit
    assert_trees_close(gradient, expected, rtol=1e-5)
    for name in statistics._fields:
        value, exact = getattr(statistics, name), getattr(wanted, name)
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5, err_msg=name)
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", program)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in gathered]
    assert max(sizes, default=0) <= most, gathered
    assert f"f32[2,7,{VOCAB // 2}]" not in program and f"f32[1,7,{VOCAB}]" not in program


if __name__ == "__main__":
    assert jax.device_count() == 4
    # Devices that split the vocabulary exchange a few numbers of each position.
    check(Partitioner(model_parallel=2), 2 * 7 * 2 * TOP, temperature=2.0)
    print("split", flush=True)
    # Devices that split weights along the hidden size gather those of one chunk.
    check(Partitioner(fully_sharded=4), EMBED * 128, temperature=1.0)
    print("sharded", flush=True)
