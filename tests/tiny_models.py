"""A T5 of a few thousand parameters, with parameters and batches that hide nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config
from robust_ft.trainable import flatten, unflatten

# Compiling takes nearly all the time of tests on tiny models.
jax.config.update("jax_disable_most_optimizations", True)

VOCAB = 40


def tiny_config(**changes):
    """Sizes that differ from each other, and heads * head_dim that is not emb_dim."""
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "num_heads": 2,
        "head_dim": 6,
        "mlp_dim": 24,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
    }
    return T5Config(**(sizes | changes))


def tiny_model(peft=(), **changes):
    return Model(tiny_config(**changes), peft)


def random_params(model, seed=0):
    """Random values for every parameter, norms included, that give logits of scale about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path.endswith("/scale"):
            values = 1 + 0.2 * values
        elif path.endswith("/kernel"):
            values = values / np.sqrt(leaf.shape[0])
        return jnp.asarray(values, leaf.dtype)

    return unflatten({p: draw(p, leaf) for p, leaf in flatten(model.shapes()).items()})


def random_batch(seed, source_lengths, target_lengths, vocab=VOCAB, extra=0):
    """Uneven examples under t5x's names, padded at the right to the longest plus `extra`."""
    rng = np.random.default_rng(seed)

    def rows(lengths):
        tokens = np.zeros((len(lengths), max(lengths) + extra), np.int32)
        for row, length in zip(tokens, lengths, strict=True):
            row[:length] = rng.integers(3, vocab, length)
        return tokens

    targets, inputs = rows(target_lengths), rows(source_lengths)
    return {
        "encoder_input_tokens": inputs,
        "encoder_input_mask": inputs > 0,
        "decoder_input_tokens": np.pad(targets, [(0, 0), (1, 0)])[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def assert_trees_close(actual, expected, rtol, atol=0.0):
    """Like np.testing.assert_allclose, but relative to each leaf's largest entry."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        value = np.asarray(value)
        tolerance = atol + rtol * np.max(np.abs(value), initial=0.0)
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=tolerance, err_msg=path)


def example_batch(seed=0):
    """Two uneven examples; always the same shapes, so that compiled functions are shared."""
    return random_batch(seed, [6, 4], [5, 7])


def tree_equal(a, b):
    """Returns whether all leaves are the same bit for bit."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))
