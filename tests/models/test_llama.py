"""The decoder of Llama, Mistral and Qwen; tests/checkpoints_io/test_hf_llama.py compares logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import decode_cached, logits_of
from tiny_models import assert_trees_close, random_params

from robust_ft.errors import UserError
from robust_ft.models.llama import LlamaConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.models.rotary import attention_factor, rotary_frequencies
from robust_ft.objectives import CrossEntropy
from robust_ft.text_batches import padded
from robust_ft.trainable import flatten

VOCAB = 40
SEPARATOR, PAD = 1, 0
# Every switch, in few models.
VARIANTS = {
    "llama2": {"num_kv_heads": 4},
    "llama3": {
        "num_kv_heads": 2,
        "logits_via_embedding": True,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_length": 16,
    },
    "mistral": {"num_kv_heads": 1, "sliding_window": 5},
    "qwen2": {"qkv_bias": True, "sliding_window": 6, "first_window_layer": 1},
    "qwen3": {"qk_norm": True, "rope_scaling": "linear", "rope_factor": 3.0},
}


def tiny_model(peft=(), **changes):
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "mlp_dim": 24,
        "num_layers": 2,
    }
    return Model(LlamaConfig(**(sizes | changes)), peft, separator_id=SEPARATOR)


def holes(seed, source=9, target=7, rows=4):
    """A batch with padding anywhere in its inputs, whose id tokens have too; the last is empty."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(8, VOCAB, (rows, source))
    inputs[rng.random(inputs.shape) < 0.2] = PAD
    mask = rng.random(inputs.shape) > 0.4
    mask[-1] = False
    inputs[~mask] = PAD
    targets = rng.integers(8, VOCAB, (rows, target))
    return {
        "encoder_input_tokens": inputs.astype(np.int32),
        "encoder_input_mask": mask,
        "decoder_input_tokens": np.pad(
            targets[:, :-1], [(0, 0), (1, 0)], constant_values=SEPARATOR
        ).astype(np.int32),
        "decoder_target_tokens": targets.astype(np.int32),
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }


def closed_up(batch, extra=0):
    """The same batch with its padding at the right, and more of it."""
    tokens, mask = batch["encoder_input_tokens"], batch["encoder_input_mask"]
    rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    inputs, mask = padded(rows, tokens.shape[1] + extra, PAD)
    return batch | {"encoder_input_tokens": inputs, "encoder_input_mask": mask}


def test_parameters_have_names_and_shapes():
    model = tiny_model((Prompt(length=3),), qkv_bias=True, out_bias=True, qk_norm=True)
    shapes = {path: leaf.shape for path, leaf in flatten(model.shapes()).items()}
    expected = {
        "token_embedder/embedding": (VOCAB, 16),
        "decoder/decoder_norm/scale": (16,),
        "decoder/logits_dense/kernel": (16, VOCAB),
        "decoder/prompt": (3, 16),
    }
    for layer in ("decoder/layers_0", "decoder/layers_1"):
        for name, sizes in {"query": 24, "key": 12, "value": 12}.items():
            expected[f"{layer}/self_attention/{name}/kernel"] = (16, sizes)
            expected[f"{layer}/self_attention/{name}/bias"] = (sizes,)
        expected[f"{layer}/self_attention/out/kernel"] = (24, 16)
        expected[f"{layer}/self_attention/out/bias"] = (16,)
        expected[f"{layer}/self_attention/query_norm/scale"] = (6,)
        expected[f"{layer}/self_attention/key_norm/scale"] = (6,)
        expected |= {f"{layer}/mlp/{name}/kernel": (16, 24) for name in ("wi_0", "wi_1")}
        expected[f"{layer}/mlp/wo/kernel"] = (24, 16)
        for name in ("self_attention", "mlp"):
            expected[f"{layer}/pre_{name}_layer_norm/scale"] = (16,)
    assert shapes == expected
    axes = flatten(model.logical_axes())
    assert axes.keys() == shapes.keys()
    assert all(len(names) == len(shapes[path]) for path, names in axes.items())
    assert axes["decoder/layers_0/self_attention/key_norm/scale"] == ("kv",)
    assert axes["decoder/layers_1/self_attention/query/bias"] == ("joined_kv",)


@pytest.mark.parametrize("tied", [True, False])
def test_drawn_models_predict_with_logits_of_scale_1(tied):
    model = tiny_model(
        emb_dim=64, head_dim=16, mlp_dim=128, num_layers=1, logits_via_embedding=tied
    )
    params = jax.jit(model.init)(jax.random.key(0))
    assert 0.1 < float(np.std(logits_of(model, params, holes(0)))) < 2


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    model = tiny_model((Prompt(length=2),), **VARIANTS[name])
    params, batch = random_params(model), holes(1)
    expected = logits_of(model, params, closed_up(batch, extra=3))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits_of(model, params, batch), expected, atol=1e-5)
    alone = {field: rows[-1:] for field, rows in batch.items()}
    alone |= {"encoder_input_tokens": np.zeros((1, 0), np.int32)}
    alone |= {"encoder_input_mask": np.zeros((1, 0), bool)}
    np.testing.assert_allclose(logits_of(model, params, alone), expected[-1:], atol=1e-5)


def test_targets_see_no_later_targets():
    model = tiny_model()
    params, batch = random_params(model), holes(2)
    changed = batch | {"decoder_input_tokens": batch["decoder_input_tokens"].copy()}
    changed["decoder_input_tokens"][:, 4:] = 3
    before, after = (logits_of(model, params, b) for b in (batch, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.1


def test_one_layer_sees_no_further_than_its_window():
    model = tiny_model(sliding_window=3, num_layers=1)
    params, batch = random_params(model), closed_up(holes(3, target=5))
    inputs = np.full_like(batch["encoder_input_tokens"], 9)
    changed = batch | {"encoder_input_tokens": inputs, "encoder_input_mask": inputs > 0}
    before, after = (logits_of(model, params, b) for b in (batch, changed))
    # Two tokens before, and itself: from the third target on, no input is seen.
    np.testing.assert_allclose(before[:, 2:], after[:, 2:], atol=1e-5)
    assert np.abs(before[:, 1] - after[:, 1]).max() > 0.1


def test_packed_examples_get_the_logits_they_get_alone():
    model = tiny_model(**VARIANTS["mistral"])
    params = random_params(model)
    lengths = [(5, 3), (2, 6), (7, 1)]
    alone = [
        {k: rows[:1] for k, rows in holes(10 + i, s, t).items() if k != "encoder_input_mask"}
        for i, (s, t) in enumerate(lengths)
    ]
    names = ("encoder_input_tokens", "decoder_input_tokens")
    packed = {
        name: np.pad(np.concatenate([e[name][0] for e in alone]), (0, 3))[None] for name in names
    }
    for side, column in (("encoder", 0), ("decoder", 1)):
        ids = np.repeat([1, 2, 3, 0], [*(pair[column] for pair in lengths), 3])
        packed[f"{side}_segment_ids"] = ids[None].astype(np.int32)
    logits = logits_of(model, params, packed)[0]
    start = 0
    for (_, length), example in zip(lengths, alone, strict=True):
        expected = logits_of(model, params, example)[0]
        np.testing.assert_allclose(logits[start : start + length], expected, atol=1e-5)
        start += length


@pytest.mark.parametrize("peft", [(), (Prompt(length=4),)], ids=["", "prompt"])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_uncached_decoding(name, peft):
    model = tiny_model(peft, **VARIANTS[name], remat="full")
    params, batch = random_params(model), holes(4, target=10)
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    actual = decode_cached(model, params, batch, 12)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_cache_rows_are_independent_and_keep_their_own_positions():
    model = tiny_model((Prompt(length=2),), **VARIANTS["mistral"])
    params, batch = random_params(model), holes(5, rows=3)
    tokens = jnp.asarray(batch["decoder_input_tokens"])
    step = jax.jit(lambda cache, tokens: model.step(params, cache, tokens))
    caches = [jax.jit(lambda b: model.prefill(params, b, 5)[1])(batch)]
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(caches[0]))
    for i in range(4):
        caches.append(step(caches[-1], tokens[:, i])[1])
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[1], b[0]]), caches[1], caches[3])
    log_probs, _ = step(mixed, jnp.stack([tokens[1, 1], tokens[0, 3]]))
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    np.testing.assert_allclose(log_probs[0], expected[1, 1], atol=1e-5)
    np.testing.assert_allclose(log_probs[1], expected[0, 3], atol=1e-5)


def test_the_inputs_keys_are_returned_as_they_came():
    model = tiny_model(num_layers=1)

    def step(params, batch):
        _, cache = model.prefill(params, batch, 3)
        _, after = model.step(params, cache, batch["decoder_input_tokens"][:, 0])
        # The same object: so beam search knows that it need not reorder it.
        assert after["layers"][0]["input"]["key"] is cache["layers"][0]["input"]["key"]

    jax.eval_shape(step, model.shapes(), holes(6))


@pytest.mark.slow
def test_remat_gives_the_same_gradients_also_with_dropout():
    def gradient(remat):
        model = tiny_model(remat=remat, dropout_rate=0.3, num_layers=1, **VARIANTS["qwen3"])

        def loss(params):
            return CrossEntropy()(model, params, holes(7), jax.random.key(5))[0]

        return jax.jit(jax.grad(loss))(random_params(model))

    none = gradient("none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(none))
    for remat in ("dots", "full"):
        assert_trees_close(gradient(remat), none, rtol=1e-5)


def test_bfloat16_stays_near_float32_and_logits_are_not_rounded():
    model = tiny_model(**VARIANTS["qwen3"])
    half = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    params, batch = random_params(model), holes(8)
    exact, logits = logits_of(model, params, batch), logits_of(half, params, batch)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).mean() < 0.03
    assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
    stepwise = jax.eval_shape(functools.partial(decode_cached, half, max_length=7), params, batch)
    assert stepwise.dtype == jnp.float32


def test_a_prompt_starts_from_token_embeddings():
    model = tiny_model((Prompt(length=3, vocabulary_top=30),))
    params = random_params(model)
    drawn = model.initialize_peft(jax.random.key(0), params)["decoder"]["prompt"]
    table = np.asarray(params["token_embedder"]["embedding"])
    assert all((table == row).all(1).any() for row in np.asarray(drawn))


def test_frequencies_by_hand():
    config = tiny_model(**VARIANTS["llama3"], head_dim=8, rope_theta=100.0).config
    plain = np.array([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    # 16 positions hold 2.5, 0.8, 0.25 and 0.08 waves: from 4 up they stay, from 1 down stretch.
    share = (16 / (2 * np.pi) - 1) / 3
    expected = np.append(plain[0] * (share + (1 - share) / 8), plain[1:] / 8)
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=1e-6)
    linear = dataclasses.replace(config, rope_scaling="linear")
    np.testing.assert_allclose(rotary_frequencies(linear), plain / 8, rtol=1e-6)
    none = dataclasses.replace(config, rope_scaling="none")
    np.testing.assert_allclose(rotary_frequencies(none), plain, rtol=1e-6)
    assert attention_factor(none) == attention_factor(linear) == 1


def test_yarn_by_hand():
    config = tiny_model(head_dim=8, rope_theta=100.0, rope_scaling="yarn", rope_factor=4.0).config
    config = dataclasses.replace(config, rope_original_length=64, rope_beta_fast=8.0)
    plain = np.array([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    # Pairs 0.21 and 2.02 have 8 periods and 1 in 64 positions: rounded outwards, 0 and 3.
    kept = np.array([1, 2 / 3, 1 / 3, 0])
    expected = kept * plain + (1 - kept) * plain / 4
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=1e-6)
    exact = dataclasses.replace(config, rope_truncate=False)
    low, high = (8 * np.log(64 / (n * 2 * np.pi)) / (2 * np.log(100)) for n in (8, 1))
    kept = 1 - np.clip((np.arange(4) - low) / (high - low), 0, 1)
    expected = kept * plain + (1 - kept) * plain / 4
    np.testing.assert_allclose(rotary_frequencies(exact), expected, rtol=1e-6)
    assert attention_factor(config) == pytest.approx(1 + 0.1 * np.log(4))
    assert attention_factor(dataclasses.replace(config, rope_attention_factor=0.7)) == 0.7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"remat": "ful"}, "full"),
        ({"dtype": "bfloat"}, "bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype"),
        ({"rope_scaling": "lama3"}, "Did you mean 'llama3'"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor"),
        ({"rope_scaling": "llama3", "rope_low_freq_factor": 4.0}, "rope_high_freq_factor"),
        ({"rope_scaling": "yarn", "rope_beta_slow": 40.0}, "rope_beta_fast=32.0"),
    ],
)
def test_settings_that_no_model_has(changes, named):
    with pytest.raises(UserError, match=named):
        tiny_model(**changes)
