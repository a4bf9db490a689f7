import logging

import numpy as np
import pytest
from random_checkpoints import random_checkpoint
from tiny_models import VOCAB, example_batch, tiny_config

from robust_ft.checkpoints_io import added_tokens, sources
from robust_ft.errors import UserError
from robust_ft.models.model import Model

TABLE, HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"


def larger(**changes):
    return Model(tiny_config(relative_max_distance=20, vocab_size=VOCAB + 3, **changes))


def test_new_rows_are_the_mean_of_the_old_and_nothing_else_changes(caplog):
    arrays = random_checkpoint().load()
    with caplog.at_level(logging.WARNING):
        extended = added_tokens.extended(larger(), arrays, "model/dir")
    assert "'model/dir' has 40 of the model's 43 tokens; the other 3 start as their mean" in (
        caplog.text
    )
    for path, array in arrays.items():
        if path not in (TABLE, HEAD):
            assert extended[path] is array
    np.testing.assert_array_equal(extended[TABLE][:VOCAB], arrays[TABLE])
    np.testing.assert_array_equal(extended[HEAD][:, :VOCAB], arrays[HEAD])
    mean = arrays[TABLE].astype(np.float64).mean(0)
    np.testing.assert_allclose(extended[TABLE][VOCAB:], [mean] * 3, atol=1e-6)
    mean = arrays[HEAD].astype(np.float64).mean(1)
    np.testing.assert_allclose(extended[HEAD][:, VOCAB:].T, [mean] * 3, atol=1e-6)
    assert extended[TABLE].dtype == arrays[TABLE].dtype


def test_a_checkpoint_that_fits_is_left_alone(caplog):
    arrays = random_checkpoint().load()
    model = Model(tiny_config(relative_max_distance=20))
    with caplog.at_level(logging.WARNING):
        extended = added_tokens.extended(model, arrays, "dir")
    assert all(extended[path] is array for path, array in arrays.items())
    assert not caplog.text


def test_tensors_are_extended_when_they_are_read():
    checkpoint = random_checkpoint(dtype="bfloat16")
    config = {"vocab_size": VOCAB + 3}
    tensors = sources.overridden(checkpoint, config).tensors
    expected = added_tokens.extended(larger(), checkpoint.load(), "dir")
    for path, tensor in tensors.items():
        assert tensor.shape == expected[path].shape
        assert tensor.load().tobytes() == expected[path].tobytes(), path


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"40.*config asks for.*39"):
        sources.overridden(random_checkpoint(), {"vocab_size": VOCAB - 1})


def test_probabilities_of_the_old_tokens_hardly_change():
    import jax

    from robust_ft.trainable import unflatten

    checkpoint = random_checkpoint()
    small, model = Model(checkpoint.config), larger()
    arrays = {path: value * 0.3 for path, value in checkpoint.load().items()}
    batch = example_batch()
    before = jax.nn.log_softmax(jax.jit(small.logits)(unflatten(arrays), batch))
    after = jax.nn.log_softmax(
        jax.jit(model.logits)(unflatten(added_tokens.extended(model, arrays, "dir")), batch)
    )
    # A mean logit is at most log(mean(exp)): 3 such tokens take at most 3 / 43.
    lost = np.asarray(before - after[..., :VOCAB])
    assert lost.min() > 0 and lost.max() < np.log(1 + 3 / VOCAB) + 1e-5
