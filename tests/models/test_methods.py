"""What all finetuning methods have in common, in every family."""

import dataclasses

import jax
import numpy as np
import pytest
from checks import decode_cached, logits_of
from every_method import METHODS, PATTERNS, PLUGGED, batch_of_tasks, small, train
from tiny_families import CONFIGS, model_of, params_of

from robust_ft.models.peft import Lora
from robust_ft.trainable import flatten, trainable_paths, unflatten


def pairs(methods, quick):
    """Parametrizes a test by (family, method): `quick` ones, and in slow tests all others."""
    return pytest.mark.parametrize(
        ("family", "method"),
        [
            pytest.param(f, m, marks=() if (f, m) in quick else pytest.mark.slow, id=f"{m}-{f}")
            for m in methods
            for f in CONFIGS
        ],
    )


# Pairs for quick tests.
EVERYWHERE = {(family, "all together") for family in CONFIGS}
UNPLUGGED = {("t5", "full"), ("bart", "norm only"), ("gpt2", "bitfit"), ("llama", "top layers")}


@pairs(PLUGGED, EVERYWHERE)
def test_patterns_are_what_methods_own(family, method):
    model = model_of(family, *PLUGGED[method].peft)
    shapes = model.shapes()
    owned = model.without_fixed(path for path in flatten(shapes) if model.peft_owns(path))
    assert trainable_paths(shapes, PLUGGED[method].patterns(model.config)) == owned
    for plugged in model.peft:
        alone = trainable_paths(shapes, [PATTERNS[plugged.name]])
        assert alone == {path for path in owned if plugged.owns(path)}


@pairs(PLUGGED, EVERYWHERE)
def test_cached_decoding_is_uncached(family, method):
    model = model_of(family, *PLUGGED[method].peft)
    params, batch = params_of(model), batch_of_tasks()
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    length = batch["decoder_input_tokens"].shape[1]
    cached = decode_cached(model, params, batch, length)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-4)


# --- Training

# Large enough for the parameters to outweigh what is computed from two examples.
LARGE = {"vocab_size": 1500, "emb_dim": 192, "mlp_dim": 1500}


def size_of(leaves):
    return sum(leaf.nbytes for leaf in leaves)


@pairs(METHODS, EVERYWHERE | UNPLUGGED)
def test_what_is_frozen_costs_nothing_and_stays_as_it_is(family, method):
    """Three steps with dropout, and what the compiled step allocates for them."""
    model = small(family, *METHODS[method].peft, **LARGE, dropout_rate=0.1)
    params, batch = params_of(model), batch_of_tasks(2)
    run = train(model, METHODS[method].patterns(model.config), params, batch)
    assert run.before.keys() | run.frozen.keys() == flatten(params).keys()
    for path, leaf in run.frozen_before.items():
        assert run.frozen[path].tobytes() == leaf.tobytes(), path
    for path, leaf in run.after.items():
        assert np.any(leaf != run.before[path]), path

    # AdamW has two moments for each parameter that trains, and counts its steps.
    moments = [leaf for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim]
    shapes = sorted(leaf.shape for leaf in run.before.values())
    assert sorted(leaf.shape for leaf in moments) == sorted(2 * shapes)
    frozen, trained = size_of(run.frozen.values()), size_of(run.before.values())
    allocated = run.memory.temp_size_in_bytes + run.memory.output_size_in_bytes
    # A parameter that trains has a gradient and, in what is returned, a new value and two moments.
    assert allocated < 0.25 * frozen + 4.5 * trained
    if method == "full":
        assert frozen == 0 and allocated > 3 * trained
    elif method not in ("joint", "top layers", "under a prompt"):
        assert trained < 0.1 * frozen


@pairs(METHODS, {("t5", "all together")})
def test_remat_and_microbatches_change_nothing(family, method):
    plain = small(family, *map(without_dropout, METHODS[method].peft))
    patterns, batch = METHODS[method].patterns(plain.config), batch_of_tasks()
    expected = train(plain, patterns, params_of(plain), batch).after
    remat = dataclasses.replace(plain, config=dataclasses.replace(plain.config, remat="full"))
    found = train(remat, patterns, params_of(plain), batch, microbatches=2).after
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5, err_msg=path)


def without_dropout(method):
    # Microbatches draw masks of their own.
    return dataclasses.replace(method, dropout_rate=0.0) if isinstance(method, Lora) else method


# Methods that start as the model, or near it: how far logits of scale 1 may be away.
STARTS = {"houlsby": 1e-2, "pfeiffer": 1e-2, "lora": 0, "ia3": 0}


@pairs(STARTS, {("t5", "houlsby"), ("bart", "lora"), ("gpt2", "ia3"), ("llama", "pfeiffer")})
def test_methods_start_as_the_model_that_they_change(family, method):
    model = small(family, *PLUGGED[method].peft)
    drawn = flatten(jax.jit(model.init)(jax.random.key(0)))
    params = flatten(params_of(model))
    params = unflatten({p: drawn[p] if model.peft_owns(p) else params[p] for p in params})
    batch = batch_of_tasks()
    expected = logits_of(small(family), params, batch)
    found = logits_of(model, params, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=STARTS[method])
    assert np.any(found != expected) == (STARTS[method] > 0)
