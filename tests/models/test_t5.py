import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import decode_cached, grad_of, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    VOCAB,
    assert_trees_close,
    example_batch,
    random_batch,
    random_params,
    tiny_config,
    tiny_model,
)

from robust_ft.errors import UserError
from robust_ft.models.layers import relative_position_bucket
from robust_ft.models.peft import Prompt
from robust_ft.trainable import flatten

T5_1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}


# --- Hugging Face


@pytest.mark.parametrize(
    ("changes", "source_lengths", "target_lengths"),
    [
        ({}, [7, 1, 12], [5, 9, 1]),
        (T5_1_0, [7, 1, 12], [5, 9, 1]),
        ({}, [300, 9], [4, 280]),
        (T5_1_0 | {"relative_num_buckets": 8, "relative_max_distance": 20}, [30, 45], [50, 3]),
        ({"num_encoder_layers": 1, "num_decoder_layers": 3}, [3], [3]),
    ],
    ids=["1.1", "1.0", "beyond the maximum distance", "other buckets", "uneven depths"],
)
def test_logits_are_hugging_faces(changes, source_lengths, target_lengths):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hugging_face import hugging_face_logits, hugging_face_t5

    model = tiny_model(**changes)
    params = random_params(model, seed=1)
    batch = random_batch(2, source_lengths, target_lengths, extra=2)
    expected = hugging_face_logits(hugging_face_t5(model.config, params), batch)
    expected = expected.detach().numpy()
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)


def test_gradients_are_hugging_faces():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hugging_face import hugging_face_logits, hugging_face_name, hugging_face_t5, to_torch

    model = tiny_model()
    params = random_params(model, seed=3)
    batch = example_batch(4)
    reference = hugging_face_t5(model.config, params)
    logits = hugging_face_logits(reference, batch)
    targets = torch.from_numpy(batch["decoder_target_tokens"]).long()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=0
    ).backward()
    named = dict(reference.named_parameters())
    gradient = flatten(grad_of(model, params, batch))
    assert_trees_close(
        {path: to_torch(path, value) for path, value in gradient.items()},
        {path: named[hugging_face_name(path)].grad.numpy() for path in gradient},
        rtol=1e-3,
    )


# --- Names and shapes


def test_parameters_have_t5x_names_and_shapes():
    shapes = {path: leaf.shape for path, leaf in flatten(tiny_model().shapes()).items()}
    attention = {"query": (16, 12), "key": (16, 12), "value": (16, 12), "out": (12, 16)}
    expected = {
        "token_embedder/embedding": (VOCAB, 16),
        "decoder/logits_dense/kernel": (16, VOCAB),
    }
    sublayers = {
        "encoder": ["attention"],
        "decoder": ["self_attention", "encoder_decoder_attention"],
    }
    norms = {
        "encoder": ["attention", "mlp"],
        "decoder": ["self_attention", "cross_attention", "mlp"],
    }
    for stack in ("encoder", "decoder"):
        expected[f"{stack}/relpos_bias/rel_embedding"] = (2, 32)
        expected[f"{stack}/{stack}_norm/scale"] = (16,)
        for layer in (f"{stack}/layers_{i}" for i in range(2)):
            for name in sublayers[stack]:
                expected |= {f"{layer}/{name}/{k}/kernel": v for k, v in attention.items()}
            expected |= {f"{layer}/pre_{n}_layer_norm/scale": (16,) for n in norms[stack]}
            mlp = {"wi_0": (16, 24), "wi_1": (16, 24), "wo": (24, 16)}
            expected |= {f"{layer}/mlp/{k}/kernel": v for k, v in mlp.items()}
    assert shapes == expected


def test_t5_1_0_has_one_input_kernel_and_no_head():
    paths = set(flatten(tiny_model(**T5_1_0).shapes()))
    assert "encoder/layers_1/mlp/wi/kernel" in paths
    assert not any("logits_dense" in path or "wi_" in path for path in paths)


def test_every_parameter_names_its_axes():
    model = tiny_model((Prompt(length=3),))
    axes = flatten(model.logical_axes())
    shapes = flatten(model.shapes())
    assert axes.keys() == shapes.keys()
    for path, names in axes.items():
        assert type(names) is tuple and len(names) == len(shapes[path].shape), path
    assert axes["encoder/layers_0/mlp/wo/kernel"] == ("mlp", "embed")
    assert axes["encoder/prompt"] == ("prompt", "embed")


@pytest.mark.parametrize("changes", [{}, T5_1_0], ids=["1.1", "1.0"])
def test_initial_values_have_t5s_scales(changes):
    sizes = {"emb_dim": 64, "head_dim": 16, "mlp_dim": 128, "vocab_size": 400}
    model = tiny_model(num_encoder_layers=1, num_decoder_layers=1, **sizes, **changes)
    drawn = jax.jit(model.init)(jax.random.key(0))
    params = flatten(drawn)
    std = {path: float(np.std(value)) for path, value in params.items()}
    assert std["token_embedder/embedding"] == pytest.approx(1, rel=0.05)
    layer = "decoder/layers_0/encoder_decoder_attention"
    assert std[f"{layer}/query/kernel"] == pytest.approx((64 * 16) ** -0.5, rel=0.1)
    assert std[f"{layer}/key/kernel"] == pytest.approx(64**-0.5, rel=0.1)
    assert std[f"{layer}/out/kernel"] == pytest.approx(32**-0.5, rel=0.1)
    assert std["encoder/layers_0/mlp/wo/kernel"] == pytest.approx(128**-0.5, rel=0.1)
    assert np.all(params["encoder/encoder_norm/scale"] == 1)
    # The model at initialization predicts with logits of scale about 1.
    batch = random_batch(0, [9, 5], [7, 8], vocab=400)
    assert 0.5 < float(np.std(logits_of(model, drawn, batch))) < 2


def test_head_of_hidden_is_logits():
    model = tiny_model(**T5_1_0)
    params, batch = random_params(model), example_batch(1)
    composed = jax.jit(lambda p, b: model.head(p, model.hidden(p, b)))(params, batch)
    np.testing.assert_allclose(composed, logits_of(model, params, batch), atol=1e-6)


# --- Padding, packing, causality


def test_more_padding_changes_nothing():
    model = tiny_model((Prompt(length=3),))
    params = random_params(model)
    batch = random_batch(5, [7, 1, 4], [3, 6, 2])
    longer = random_batch(5, [7, 1, 4], [3, 6, 2], extra=5)
    longer["encoder_input_tokens"][:, :7] = batch["encoder_input_tokens"]
    longer["decoder_input_tokens"][:, :6] = batch["decoder_input_tokens"]
    expected = logits_of(model, params, batch)
    np.testing.assert_allclose(logits_of(model, params, longer)[:, :6], expected, atol=1e-5)


def test_a_row_of_padding_stays_finite_forward_and_backward():
    model = tiny_model()
    params = random_params(model)
    batch = example_batch(6)
    for rows in batch.values():
        rows[1] = 0
    assert np.all(np.isfinite(logits_of(model, params, batch)))
    gradient = jax.tree.leaves(grad_of(model, params, batch))
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient)


def test_targets_see_no_later_targets():
    model = tiny_model()
    params = random_params(model)
    batch = example_batch(7)
    changed = batch | {"decoder_input_tokens": batch["decoder_input_tokens"].copy()}
    changed["decoder_input_tokens"][:, 4:] = 3
    before, after = (logits_of(model, params, b) for b in (batch, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.1


def test_packed_examples_get_the_logits_they_get_alone():
    model = tiny_model()
    params = random_params(model)
    lengths = [(5, 3), (2, 6), (7, 1)]
    alone = [random_batch(10 + i, [s], [t]) for i, (s, t) in enumerate(lengths)]
    packed = {}
    for name in alone[0]:
        row = np.concatenate([example[name][0] for example in alone])
        packed[name] = np.pad(row, (0, 3))[None]
    for side, column in (("encoder", 0), ("decoder", 1)):
        ids = np.repeat([1, 2, 3, 0], [*(pair[column] for pair in lengths), 3])
        packed[f"{side}_segment_ids"] = ids[None].astype(np.int32)
    logits = logits_of(model, params, packed)[0]
    start = 0
    for (_, length), example in zip(lengths, alone, strict=True):
        expected = logits_of(model, params, example)[0]
        np.testing.assert_allclose(logits[start : start + length], expected, atol=1e-5)
        start += length


# --- Cached decoding


@pytest.mark.parametrize(
    ("peft", "changes"),
    [
        ((), {}),
        ((Prompt(length=4),), T5_1_0),
        (
            (Prompt(length=4),),
            {"remat": "full", "relative_num_buckets": 6, "relative_max_distance": 5},
        ),
    ],
    ids=["1.1", "1.0 with prompt", "remat with prompt"],
)
def test_cached_decoding_is_uncached_decoding(peft, changes):
    model = tiny_model(peft, **changes)
    params = random_params(model)
    batch = random_batch(8, [6, 1, 9], [9, 9, 4])
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    actual = decode_cached(model, params, batch, 12)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_cache_rows_are_independent_and_keep_their_own_positions():
    model = tiny_model((Prompt(length=2),))
    params = random_params(model)
    batch = random_batch(9, [6, 3], [7, 7])
    tokens = jnp.asarray(batch["decoder_input_tokens"])
    step = jax.jit(lambda cache, tokens: model.step(params, cache, tokens))
    caches = [jax.jit(lambda b: model.prefill(params, b, 5)[1])(batch)]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(caches[0]))
    for i in range(4):
        caches.append(step(caches[-1], tokens[:, i])[1])
    # The rows change places, and one of them goes on at position 1, the other at position 3.
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[1], b[0]]), caches[1], caches[3])
    log_probs, after = step(mixed, jnp.stack([tokens[1, 1], tokens[0, 3]]))
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    np.testing.assert_allclose(log_probs[0], expected[1, 1], atol=1e-5)
    np.testing.assert_allclose(log_probs[1], expected[0, 3], atol=1e-5)
    np.testing.assert_array_equal(after["position"], [2, 4])


# --- Rematerialization, dropout, types


@pytest.mark.slow
def test_remat_gives_the_same_gradients_also_with_dropout():
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.3}
    params, batch = random_params(tiny_model(**sizes)), example_batch(11)
    none, dots, full = (
        grad_of(tiny_model(remat=remat, **sizes), params, batch, jax.random.key(5))
        for remat in ("none", "dots", "full")
    )
    assert_trees_close(dots, none, rtol=1e-5)
    assert_trees_close(full, none, rtol=1e-5)


def test_dropout_is_on_only_with_a_key():
    plain, model = tiny_model(), tiny_model(dropout_rate=0.2)
    params, batch = random_params(plain), example_batch(12)
    expected = logits_of(plain, params, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, atol=1e-6)
    np.testing.assert_allclose(
        logits_of(plain, params, batch, jax.random.key(0)), expected, atol=1e-6
    )
    first, again, other = (
        logits_of(model, params, batch, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - expected).max() > 0.1


@pytest.mark.slow
def test_dropout_roughly_preserves_the_expectation():
    # A low rate: the mean over masks of a function that is not linear has a bias.
    model = tiny_model(dropout_rate=0.01)
    params, batch = random_params(model), example_batch(13)
    keys = jax.random.split(jax.random.key(0), 300)
    draws = jax.jit(jax.vmap(lambda key: model.logits(params, batch, key)))(keys)
    expected = logits_of(model, params, batch)
    assert np.mean(draws.std(0)) > 0.05
    assert np.std(draws.mean(0) - expected) < 0.1 * np.std(expected)


@pytest.mark.parametrize("changes", [{}, T5_1_0], ids=["1.1", "1.0"])
def test_bfloat16_stays_near_float32_and_logits_are_not_rounded(changes):
    model = tiny_model(**changes)
    half = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    params, batch = random_params(model), example_batch(14)
    exact, logits = logits_of(model, params, batch), logits_of(half, params, batch)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.15
    assert np.abs(logits - exact).mean() < 0.03
    assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
    stepwise = jax.eval_shape(functools.partial(decode_cached, half, max_length=7), params, batch)
    assert stepwise.dtype == jnp.float32


def test_bfloat16_parameters_are_drawn_and_kept_as_such():
    model = tiny_model((Prompt(length=2),), param_dtype="bfloat16", dtype="bfloat16")
    types = {path: leaf.dtype for path, leaf in flatten(model.shapes()).items()}
    assert types.pop("encoder/prompt") == jnp.float32
    assert set(types.values()) == {jnp.dtype("bfloat16")}
    shapes = jax.eval_shape(model.logits, model.shapes(), example_batch())
    assert shapes.dtype == jnp.float32


def test_model_is_a_static_argument():
    assert hash(tiny_model()) == hash(tiny_model())
    assert tiny_config(mlp_activations=["relu"]) == tiny_config(mlp_activations=("relu",))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"remat": "ful"}, "full"),
        ({"mlp_activations": ("gleu", "linear")}, "gelu"),
        ({"dtype": "bfloat"}, "bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype"),
        ({"relative_num_buckets": 3}, "relative_num_buckets"),
        ({"relative_max_distance": 16}, "relative_max_distance"),
    ],
)
def test_settings_that_no_model_has(changes, named):
    with pytest.raises(UserError, match=named):
        tiny_config(**changes)


# --- Relative positions


def slow_bucket(distance, bidirectional, num_buckets, max_distance):
    """One distance, in integers only: a bucket begins where the logarithm reaches its edge."""
    behind, offset = -distance, 0
    if bidirectional:
        num_buckets //= 2
        if behind < 0:
            behind, offset = -behind, num_buckets
    behind = max(behind, 0)
    exact = num_buckets // 2
    if behind < exact:
        return offset + behind
    # behind >= exact * (max_distance / exact) ** (k / wide), with both sides to the power of wide
    wide, k = num_buckets - exact, 0
    while k + 1 < wide and (
        behind**wide * exact ** (k + 1) >= max_distance ** (k + 1) * exact**wide
    ):
        k += 1
    return offset + exact + k


@given(
    bidirectional=st.booleans(),
    half=st.integers(2, 24),
    more=st.integers(1, 150),
)
@settings(max_examples=40, deadline=None)
def test_buckets_against_integers(bidirectional, half, more):
    num_buckets, max_distance = 2 * half, half + more
    distances = np.arange(-400, 400)
    buckets = relative_position_bucket(
        jnp.asarray(distances), bidirectional, num_buckets, max_distance
    )
    expected = [slow_bucket(int(d), bidirectional, num_buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(buckets, expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (32, 256), (8, 20), (16, 64)])
def test_buckets_are_hugging_faces(bidirectional, sizes):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-600, 600)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, *sizes
    )
    buckets = jax.jit(relative_position_bucket, static_argnums=(1, 2, 3))(
        distances, bidirectional, *sizes
    )
    np.testing.assert_array_equal(buckets, expected)
