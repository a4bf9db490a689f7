import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    converted,
    decode_cached,
    grad_of,
    logits_of,
    randomize,
    scattered,
    with_start_and_pad,
)
from tiny_models import assert_trees_close, random_batch, random_params

from robust_ft.checkpoints_io import hf_bart
from robust_ft.checkpoints_io.names import expand
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.models.bart import BartConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, merge
from robust_ft.vocabulary import ByteVocabulary

VOCAB, PAD, EOS = 43, 1, 2


def tiny_config(**changes):
    """15 dimensions in 3 heads: no power of two in sight."""
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 15,
        "num_heads": 3,
        "mlp_dim": 22,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_positions": 32,
        "final_logits_bias": True,
    }
    return BartConfig(**(sizes | changes))


def tiny_model(peft=(), **changes):
    return Model(tiny_config(**changes), peft, pad_id=PAD, eos_id=EOS, start_id=EOS)


def params_of(model, seed=0):
    params = random_params(model, seed)
    table = params["token_embedder"]["embedding"] * model.config.emb_dim**-0.5
    return {**params, "token_embedder": {"embedding": table}}


def batch_of(seed, source_lengths, target_lengths, extra=0):
    batch = random_batch(seed, source_lengths, target_lengths, vocab=VOCAB, extra=extra)
    return with_start_and_pad(batch, EOS, PAD)


# --- Hugging Face


def hugging_face(seed=0, **changes):
    """Returns BART in PyTorch with random weights, the bias of the logits included."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 15,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 22,
        "decoder_ffn_dim": 22,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": 32,
        "forced_eos_token_id": None,
    }
    config = transformers.BartConfig(**sizes | changes)
    return randomize(transformers.BartForConditionalGeneration(config), seed)


def mask_of(batch):
    """Returns the mask of the inputs as PyTorch's models take it."""
    import torch

    return torch.from_numpy(batch["encoder_input_mask"]).long()


def reference_logits(reference, batch, **inputs):
    import torch

    tokens = torch.from_numpy(batch["encoder_input_tokens"]).long()
    inputs = inputs or {"input_ids": tokens, "attention_mask": mask_of(batch)}
    targets = torch.from_numpy(batch["decoder_input_tokens"]).long()
    return reference(decoder_input_ids=targets, use_cache=False, **inputs).logits


def assert_close(logits, expected):
    expected = expected.detach().numpy()
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "source_lengths", "target_lengths"),
    [
        ({}, [7, 1, 12], [5, 9, 1]),
        ({"scale_embedding": True, "activation_function": "gelu_new"}, [3, 8], [8, 2]),
        ({"d_model": 14, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, [29], [32]),
        ({"encoder_layers": 1, "decoder_layers": 3, "activation_function": "relu"}, [5], [4]),
    ],
    ids=["exact gelu", "scaled embedding", "all positions", "uneven depths"],
)
def test_logits_are_hugging_faces(changes, source_lengths, target_lengths, tmp_path):
    reference = hugging_face(1, **changes)
    model, params = converted(reference, tmp_path)
    assert (model.pad_id, model.eos_id, model.start_id) == (PAD, EOS, EOS)
    batch = scattered(batch_of(2, source_lengths, target_lengths), pad_id=PAD)
    assert_close(logits_of(model, params, batch), reference_logits(reference, batch))


@pytest.mark.parity
@pytest.mark.parametrize("scale", [False, True])
def test_prompted_logits_are_hugging_faces_with_longer_inputs(scale, tmp_path):
    reference = hugging_face(3, scale_embedding=scale)
    import torch

    plain, params = converted(reference, tmp_path)
    model = dataclasses.replace(plain, peft=(Prompt(length=5),))
    prompt = np.random.default_rng(0).normal(size=(5, 15)).astype(np.float32)
    batch = scattered(batch_of(4, [7, 2, 12], [5, 9, 1]), pad_id=PAD)
    params = merge(params, {"encoder": {"prompt": jnp.asarray(prompt)}})
    tokens = torch.from_numpy(batch["encoder_input_tokens"]).long()
    expected = reference_logits(
        reference,
        batch,
        inputs_embeds=torch.cat(
            [torch.from_numpy(prompt).expand(3, -1, -1), reference.model.shared(tokens)], 1
        ),
        attention_mask=torch.nn.functional.pad(mask_of(batch), (5, 0), value=1),
    )
    assert_close(logits_of(model, params, batch), expected)


@pytest.mark.parity
def test_gradients_are_hugging_faces(tmp_path):
    reference = hugging_face(5)
    import torch

    model, params = converted(reference, tmp_path)
    batch = scattered(batch_of(6, [6, 4], [5, 7]), pad_id=PAD)
    logits = reference_logits(reference, batch)
    targets = torch.from_numpy(batch["decoder_target_tokens"]).long()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PAD
    ).backward()
    named = dict(reference.named_parameters())
    gradient = flatten(grad_of(model, params, batch))
    # A buffer in PyTorch.
    assert not np.any(gradient.pop("decoder/final_logits_bias"))
    names = expand(hf_bart.NAMES, model.config)
    expected = {}
    for path in gradient:
        name, transposed = names[path]
        value = named[name].grad.numpy()
        expected[path] = value.T if transposed else value
    # A key's bias adds the same to all scores of a query: its gradient is rounding noise.
    noise = {path for path in gradient if path.endswith("key/bias")}
    assert len(noise) == 6
    for path in noise:
        assert np.abs(gradient.pop(path)).max() < 1e-6 and np.abs(expected.pop(path)).max() < 1e-6
    assert_trees_close(gradient, expected, rtol=1e-3)


@pytest.mark.parity
def test_greedy_decoding_is_hugging_faces(tmp_path):
    reference = hugging_face(7)
    import torch

    model, params = converted(reference, tmp_path)
    lengths = np.random.default_rng(8).integers(1, 20, 20)
    batch = batch_of(9, lengths, [1] * 20)
    inputs = torch.from_numpy(batch["encoder_input_tokens"]).long()
    mask, settings = mask_of(batch), {"max_new_tokens": 12, "do_sample": False}
    reference.generation_config.eos_token_id = None
    expected = reference.generate(inputs, attention_mask=mask, **settings)[:, 1:].numpy()
    # A token that some outputs have ends them.
    counts = [int(np.any(expected == token, axis=1).sum()) for token in range(VOCAB)]
    eos = min((count, token) for token, count in enumerate(counts) if count > 3)[1]
    predictor = Predictor(dataclasses.replace(model, eos_id=eos), params, ByteVocabulary())
    decoded = predictor.generate(batch, Decoder(max_decode_len=12))
    for row, tokens in zip(expected, np.asarray(decoded.tokens)[:, 0], strict=True):
        length = list(row).index(eos) + 1 if eos in row else 12
        np.testing.assert_array_equal(tokens[:length], row[:length])
        assert np.all(tokens[length:] == PAD)


# --- Names, shapes, initial values


def test_parameters_have_these_names_and_shapes():
    shapes = {path: leaf.shape for path, leaf in flatten(tiny_model().shapes()).items()}
    expected = {
        "token_embedder/embedding": (VOCAB, 15),
        "decoder/final_logits_bias": (1, VOCAB),
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
        expected[f"{stack}/position_embedder/embedding"] = (34, 15)
        dense, normed = {}, [f"{stack}/embedding_layer_norm"]
        for layer in (f"{stack}/layers_{i}" for i in range(2)):
            for name in sublayers[stack]:
                dense |= {f"{layer}/{name}/{k}": (15, 15) for k in ("query", "key", "value", "out")}
            dense |= {f"{layer}/mlp/wi": (15, 22), f"{layer}/mlp/wo": (22, 15)}
            normed += [f"{layer}/{name}_layer_norm" for name in norms[stack]]
        for name, shape in dense.items():
            expected |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
        for name in normed:
            expected |= {f"{name}/scale": (15,), f"{name}/bias": (15,)}
    assert shapes == expected
    without = flatten(tiny_model(final_logits_bias=False).shapes())
    assert expected.keys() - without.keys() == {"decoder/final_logits_bias"}


def test_every_parameter_names_its_axes():
    model = tiny_model((Prompt(length=3),))
    axes, shapes = flatten(model.logical_axes()), flatten(model.shapes())
    assert axes.keys() == shapes.keys()
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape), path
    assert axes["decoder/final_logits_bias"] == (None, "vocab")
    assert axes["encoder/layers_0/attention/query/bias"] == ("joined_kv",)
    assert axes["encoder/prompt"] == ("prompt", "embed")


def test_a_fresh_model_predicts_nearly_uniformly():
    model = tiny_model()
    logits = logits_of(model, jax.jit(model.init)(jax.random.key(0)), batch_of(0, [5, 3], [4, 6]))
    assert 0.01 < float(np.std(logits)) < 0.5


# --- Padding, packing, causality


def test_more_padding_changes_nothing():
    model = tiny_model((Prompt(length=3),))
    params = params_of(model)
    batch = batch_of(1, [7, 1, 4], [3, 6, 2])
    expected = logits_of(model, params, batch)
    for extra in (5, 60):  # also where it takes more than all positions
        longer = batch_of(1, [7, 1, 4], [3, 6, 2], extra=extra)
        np.testing.assert_allclose(logits_of(model, params, longer)[:, :6], expected, atol=1e-5)


def test_a_row_of_padding_stays_finite_forward_and_backward():
    model = tiny_model()
    params, batch = params_of(model), batch_of(3, [6, 4], [5, 7])
    batch["encoder_input_tokens"][1] = batch["decoder_input_tokens"][1] = PAD
    batch["encoder_input_mask"][1] = False
    batch["decoder_loss_weights"][1] = 0
    assert np.all(np.isfinite(logits_of(model, params, batch)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grad_of(model, params, batch)))


def test_targets_see_no_later_targets():
    model = tiny_model()
    params, batch = params_of(model), batch_of(4, [6, 4], [5, 7])
    changed = batch | {"decoder_input_tokens": batch["decoder_input_tokens"].copy()}
    changed["decoder_input_tokens"][:, 4:] = 3
    before, after = (logits_of(model, params, b) for b in (batch, changed))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.01


def test_packed_examples_get_the_logits_they_get_alone():
    model = tiny_model()
    params = params_of(model)
    lengths = [(5, 3), (2, 6), (7, 1)]
    alone = [batch_of(10 + i, [s], [t]) for i, (s, t) in enumerate(lengths)]
    packed = {}
    for name in alone[0]:
        row = np.concatenate([example[name][0] for example in alone])
        fill = 0 if name == "decoder_loss_weights" else PAD
        packed[name] = np.pad(row, (0, 3), constant_values=fill)[None]
    for side, column in (("encoder", 0), ("decoder", 1)):
        ids = np.repeat([1, 2, 3, 0], [*(pair[column] for pair in lengths), 3])
        packed[f"{side}_segment_ids"] = ids[None].astype(np.int32)
    logits, start = logits_of(model, params, packed)[0], 0
    for (_, length), example in zip(lengths, alone, strict=True):
        expected = logits_of(model, params, example)[0]
        np.testing.assert_allclose(logits[start : start + length], expected, atol=1e-5)
        start += length


# --- Cached decoding


@pytest.mark.parametrize(
    ("peft", "changes"),
    [
        ((), {}),
        ((Prompt(length=4),), {"scale_embedding": True}),
        ((Prompt(length=4),), {"remat": "full"}),
    ],
    ids=["plain", "scaled with prompt", "remat with prompt"],
)
def test_cached_decoding_is_uncached_decoding(peft, changes):
    model = tiny_model(peft, **changes)
    params = params_of(model)
    batch = scattered(batch_of(5, [6, 1, 9], [9, 9, 4]), pad_id=PAD)
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    actual = decode_cached(model, params, batch, 12)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_cache_rows_are_independent_and_keep_their_own_positions():
    model = tiny_model((Prompt(length=2),))
    params, batch = params_of(model), batch_of(6, [6, 3], [7, 7])
    tokens = jnp.asarray(batch["decoder_input_tokens"])
    step = jax.jit(lambda cache, tokens: model.step(params, cache, tokens))
    caches = [jax.jit(lambda b: model.prefill(params, b, 5)[1])(batch)]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(caches[0]))
    for i in range(4):
        caches.append(step(caches[-1], tokens[:, i])[1])
    # The rows change places, and one of them goes on at position 1, the other at position 3.
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[1], b[0]]), caches[1], caches[3])
    log_probs, _ = step(mixed, jnp.stack([tokens[1, 1], tokens[0, 3]]))
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    np.testing.assert_allclose(log_probs[0], expected[1, 1], atol=1e-5)
    np.testing.assert_allclose(log_probs[1], expected[0, 3], atol=1e-5)


# --- Rematerialization, dropout, types


@pytest.mark.slow
def test_remat_gives_the_same_gradients_also_with_dropout():
    small = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    rates = {"dropout_rate": 0.3, "attention_dropout_rate": 0.2, "activation_dropout_rate": 0.2}
    params, batch = params_of(tiny_model(**small)), batch_of(7, [6, 4], [5, 7])
    none, dots, full = (
        grad_of(tiny_model(remat=remat, **small, **rates), params, batch, jax.random.key(5))
        for remat in ("none", "dots", "full")
    )
    assert_trees_close(dots, none, rtol=1e-5, atol=1e-6)
    assert_trees_close(full, none, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_on_only_with_a_key(rate):
    plain, model = tiny_model(), tiny_model(**{f"{rate}_rate": 0.2})
    params, batch = params_of(plain), batch_of(8, [6, 4], [5, 7])
    expected = logits_of(plain, params, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, atol=1e-6)
    first, again, other = (
        logits_of(model, params, batch, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - expected).max() > 0.01


def test_bfloat16_stays_near_float32_and_logits_are_not_rounded():
    model, half = tiny_model(), tiny_model(dtype="bfloat16")
    params, batch = params_of(model), batch_of(9, [6, 4], [5, 7])
    exact, logits = logits_of(model, params, batch), logits_of(half, params, batch)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.15
    assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
    _, cache = jax.eval_shape(lambda p, b: half.prefill(p, b, 4), half.shapes(), batch)
    assert cache["layers"][0]["memory"]["key"].dtype == jnp.bfloat16
    kept = flatten(tiny_model(dtype="bfloat16", param_dtype="bfloat16").shapes())
    assert {leaf.dtype for leaf in kept.values()} == {jnp.dtype("bfloat16")}


# --- Mistakes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"remat": "ful"}, "Did you mean 'full'"),
        ({"activation": "gelu_new"}, "activation='gelu_new'.*gelu"),
        ({"dtype": "bfloat"}, "bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype"),
        ({"num_heads": 4}, "emb_dim=15.*num_heads=4"),
    ],
)
def test_settings_that_no_model_has(changes, named):
    with pytest.raises(UserError, match=named):
        tiny_config(**changes)


def test_inputs_and_targets_beyond_the_positions():
    model, prompted = tiny_model(), tiny_model((Prompt(length=5),))
    for inputs, targets, what in ((33, 9, "Inputs"), (5, 33, "Targets")):
        batch = batch_of(0, [inputs], [targets])
        predictor = Predictor(model, params_of(model), ByteVocabulary())
        with pytest.raises(UserError, match=f"{what}.* of 33 .*num_positions=32"):
            predictor.generate(batch, max_decode_len=targets)
        del batch["encoder_input_mask"]
        with pytest.raises(UserError, match=f"{what}.* of 33 .*num_positions=32"):
            jax.eval_shape(model.logits, model.shapes(), batch)
    # Padding before a token takes positions, padding behind all tokens does not.
    batch = batch_of(0, [5], [9], extra=28)
    predictor.generate(batch, max_decode_len=9)
    left = {name: batch[name][:, ::-1] for name in ("encoder_input_tokens", "encoder_input_mask")}
    with pytest.raises(UserError, match=r"Inputs.* of 33 .*num_positions=32"):
        predictor.generate(left, max_decode_len=9)
    with pytest.raises(UserError, match=r"soft prompts included, of 33 .*num_positions=32"):
        prompted.check_lengths(28, 9)
    with pytest.raises(UserError, match=r"soft prompts included, of 33 .*num_positions=32"):
        tiny_model((Prompt(length=32),)).check()
