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

from robust_ft.checkpoints_io import hf_gpt2
from robust_ft.checkpoints_io.names import expand
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, merge, split
from robust_ft.vocabulary import ByteVocabulary

VOCAB, EOS, PAD, SEP = 43, 40, 41, 42


def tiny_config(**changes):
    """15 dimensions in 3 heads: no power of two in sight."""
    sizes = {
        "vocab_size": VOCAB,
        "emb_dim": 15,
        "num_heads": 3,
        "mlp_dim": 22,
        "num_layers": 2,
        "num_positions": 48,
    }
    return GPT2Config(**(sizes | changes))


def tiny_model(peft=(), **changes):
    ids = {"pad_id": PAD, "eos_id": EOS, "start_id": EOS, "separator_id": SEP}
    return Model(tiny_config(**changes), peft, **ids)


def params_of(model, seed=0):
    params = flatten(random_params(model, seed))
    scale = model.config.emb_dim**-0.5
    return merge(
        {"token_embedder": {"embedding": params["token_embedder/embedding"] * scale}},
        split(random_params(model, seed), frozenset({"token_embedder/embedding"}))[1],
    )


def batch_of(seed, source_lengths, target_lengths, extra=0):
    batch = random_batch(seed, source_lengths, target_lengths, vocab=EOS, extra=extra)
    return with_start_and_pad(batch, SEP, PAD)


# --- Hugging Face


def hugging_face(seed=0, **changes):
    """Returns GPT-2 in PyTorch with random weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sizes = {
        "vocab_size": VOCAB,
        "n_embd": 15,
        "n_head": 3,
        "n_inner": 22,
        "n_layer": 2,
        "n_positions": 48,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
        "decoder_start_token_id": SEP,
    }
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)), seed)


def sources_of(batch):
    """Yields each row's input without its padding."""
    names = ("encoder_input_tokens", "encoder_input_mask")
    for tokens, mask in zip(*(batch[name] for name in names), strict=True):
        yield tokens[mask]


def reference_logits(reference, batch, prompt=None):
    """Yields each row's logits [target, vocab]: the row alone, without any padding."""
    import torch

    for source, target in zip(sources_of(batch), batch["decoder_input_tokens"], strict=True):
        tokens = torch.from_numpy(np.concatenate([source, target])).long()[None]
        embedded = reference.transformer.wte(tokens)
        if prompt is not None:
            embedded = torch.cat([torch.from_numpy(np.array(prompt))[None], embedded], 1)
        yield reference(inputs_embeds=embedded).logits[0, -len(target) :]


def assert_logits_are(reference, model, params, batch, prompt=None):
    logits = logits_of(model, params, batch)
    for row, expected in zip(logits, reference_logits(reference, batch, prompt), strict=True):
        expected = expected.detach().numpy()
        assert 0.3 < expected.std() < 3
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("changes", "source_lengths", "target_lengths"),
    [
        ({}, [7, 1, 12], [5, 9, 1]),
        ({"n_inner": None, "activation_function": "gelu"}, [0, 3, 0], [8, 2, 4]),
        ({"n_embd": 14, "n_head": 2, "n_layer": 3, "activation_function": "relu"}, [30], [15]),
        ({"n_embd": 16, "n_head": 16, "n_layer": 1}, [5, 4], [1, 1]),
    ],
    ids=["gelu_new", "exact gelu, empty inputs", "all positions", "heads of 1"],
)
def test_logits_are_hugging_faces_of_each_row_alone(
    changes, source_lengths, target_lengths, tmp_path
):
    reference = hugging_face(1, **changes)
    model, params = converted(reference, tmp_path)
    assert (model.pad_id, model.eos_id, model.start_id) == (PAD, EOS, EOS)
    batch = scattered(batch_of(2, source_lengths, target_lengths), pad_id=PAD)
    assert_logits_are(reference, model, params, batch)


@pytest.mark.parity
def test_prompted_logits_are_hugging_faces_with_longer_inputs(tmp_path):
    reference = hugging_face(3)
    plain, params = converted(reference, tmp_path)
    model = dataclasses.replace(plain, peft=(Prompt(length=5),))
    prompt = np.random.default_rng(0).normal(size=(5, 15)).astype(np.float32)
    batch = scattered(batch_of(4, [7, 0, 12], [5, 9, 1]), pad_id=PAD)
    params = merge(params, {"decoder": {"prompt": jnp.asarray(prompt)}})
    assert_logits_are(reference, model, params, batch, prompt)


@pytest.mark.parity
def test_gradients_are_hugging_faces(tmp_path):
    reference = hugging_face(5)
    import torch

    model, params = converted(reference, tmp_path)
    batch = scattered(batch_of(6, [6, 4], [5, 7]), pad_id=PAD)
    losses = [
        torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(targets).long(), ignore_index=PAD, reduction="sum"
        )
        for logits, targets in zip(
            reference_logits(reference, batch), batch["decoder_target_tokens"], strict=True
        )
    ]
    (sum(losses) / batch["decoder_loss_weights"].sum()).backward()
    named = dict(reference.named_parameters())
    gradient = flatten(grad_of(model, params, batch))
    names = expand(hf_gpt2.NAMES, model.config)
    assert_trees_close(
        gradient, {path: named[names[path][0]].grad.numpy() for path in gradient}, rtol=1e-3
    )


@pytest.mark.parity
def test_greedy_decoding_is_hugging_faces(tmp_path):
    reference = hugging_face(7)
    import torch

    model, params = converted(reference, tmp_path)
    lengths = np.random.default_rng(8).integers(0, 20, 20)
    batch = scattered(batch_of(9, lengths, [1] * 20), pad_id=PAD)
    expected = []
    for source in sources_of(batch):
        start = torch.from_numpy(np.append(source, SEP)).long()[None]
        mask, settings = torch.ones_like(start), {"max_new_tokens": 12, "do_sample": False}
        reference.generation_config.eos_token_id = None
        tokens = reference.generate(start, attention_mask=mask, **settings)
        expected.append(tokens[0, start.shape[1] :].numpy())
    # A token that some outputs have ends them.
    counts = [sum(token in row for row in expected) for token in range(VOCAB)]
    eos = min((count, token) for token, count in enumerate(counts) if count > 3)[1]
    model = dataclasses.replace(model, eos_id=eos, separator_id=SEP)
    predictor = Predictor(model, params, ByteVocabulary())
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
        "decoder/position_embedder/embedding": (48, 15),
        "decoder/decoder_norm/scale": (15,),
        "decoder/decoder_norm/bias": (15,),
    }
    dense = {
        "self_attention/qkv": (15, 45),
        "self_attention/out": (15, 15),
        "mlp/wi": (15, 22),
        "mlp/wo": (22, 15),
    }
    for layer in ("decoder/layers_0", "decoder/layers_1"):
        for name, shape in dense.items():
            expected |= {f"{layer}/{name}/kernel": shape, f"{layer}/{name}/bias": shape[1:]}
        for name in ("pre_self_attention_layer_norm", "pre_mlp_layer_norm"):
            expected |= {f"{layer}/{name}/{leaf}": (15,) for leaf in ("scale", "bias")}
    assert shapes == expected


def test_every_parameter_names_its_axes():
    model = tiny_model((Prompt(length=3),))
    axes, shapes = flatten(model.logical_axes()), flatten(model.shapes())
    assert axes.keys() == shapes.keys()
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape), path
    assert axes["decoder/layers_0/self_attention/qkv/bias"] == ("joined_kv",)
    assert axes["decoder/prompt"] == ("prompt", "embed")


def test_a_fresh_model_predicts_nearly_uniformly():
    model = tiny_model()
    logits = logits_of(model, jax.jit(model.init)(jax.random.key(0)), batch_of(0, [5, 3], [4, 6]))
    assert 0.01 < float(np.std(logits)) < 0.5


# --- Padding, packing, causality


def test_padding_changes_nothing_wherever_it_stands():
    model = tiny_model((Prompt(length=3),))
    params = params_of(model)
    batch = batch_of(1, [7, 1, 4], [3, 6, 2])
    expected = logits_of(model, params, batch)
    for seed in range(2):
        moved = logits_of(model, params, scattered(batch, seed, pad_id=PAD))
        np.testing.assert_allclose(moved, expected, atol=1e-5)


def test_the_separator_is_seen_even_where_it_is_the_padding_token():
    model = dataclasses.replace(tiny_model(), pad_id=EOS, separator_id=EOS)
    params = params_of(model)
    batch = with_start_and_pad(random_batch(2, [5, 0], [4, 4], vocab=EOS), EOS, EOS)
    other = batch | {"decoder_input_tokens": batch["decoder_input_tokens"].copy()}
    other["decoder_input_tokens"][:, 0] = SEP
    before, after = (logits_of(model, params, b) for b in (batch, other))
    assert np.abs(before - after)[:, 1:].max() > 0.01


def test_rows_of_padding_stay_finite_forward_and_backward():
    model = tiny_model()
    params, batch = params_of(model), batch_of(3, [6, 4], [5, 7])
    batch["encoder_input_tokens"][:], batch["encoder_input_mask"][:] = PAD, False
    batch["decoder_loss_weights"][1] = 0
    assert np.all(np.isfinite(logits_of(model, params, batch)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grad_of(model, params, batch)))


def test_targets_see_inputs_and_no_later_targets():
    model = tiny_model()
    params, batch = params_of(model), batch_of(4, [6, 4], [5, 7])
    expected = logits_of(model, params, batch)
    changed = {name: rows.copy() for name, rows in batch.items()}
    changed["decoder_input_tokens"][:, 4:] = 3
    logits = logits_of(model, params, changed)
    np.testing.assert_allclose(logits[:, :4], expected[:, :4], atol=1e-6)
    assert np.abs(logits[:, 4:] - expected[:, 4:]).max() > 0.01
    changed["encoder_input_tokens"][:, 0] = 3
    assert np.abs(logits_of(model, params, changed)[:, 0] - expected[:, 0]).max() > 0.01


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
    [((), {}), ((Prompt(length=4),), {}), ((Prompt(length=4),), {"remat": "full"})],
    ids=["plain", "prompt", "remat with prompt"],
)
def test_cached_decoding_is_uncached_decoding(peft, changes):
    model = tiny_model(peft, **changes)
    params = params_of(model)
    batch = scattered(batch_of(5, [6, 0, 9], [9, 9, 4]), pad_id=PAD)
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
    rates = {"dropout_rate": 0.3, "attention_dropout_rate": 0.2, "num_layers": 1}
    params, batch = params_of(tiny_model(num_layers=1)), batch_of(7, [6, 4], [5, 7])
    none, dots, full = (
        grad_of(tiny_model(remat=remat, **rates), params, batch, jax.random.key(5))
        for remat in ("none", "dots", "full")
    )
    assert_trees_close(dots, none, rtol=1e-5)
    assert_trees_close(full, none, rtol=1e-5)


@pytest.mark.parametrize("field", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_is_on_only_with_a_key(field):
    plain, model = tiny_model(), tiny_model(**{field: 0.2})
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
    _, cache = jax.eval_shape(lambda p: half.prefill(p, batch, 4), half.shapes())
    assert cache["layers"][0]["input"]["key"].dtype == jnp.bfloat16
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
    model, batch = tiny_model(), batch_of(0, [40], [9])
    predictor = Predictor(model, params_of(model), ByteVocabulary())
    with pytest.raises(UserError, match=r"40 .* 9 .*num_positions=48"):
        predictor.generate(batch, max_decode_len=9)
    del batch["encoder_input_mask"]
    with pytest.raises(UserError, match=r"40 .* 9 .*num_positions=48"):
        jax.eval_shape(model.logits, model.shapes(), batch)
    # If the target continues the input, its last token takes one position only.
    continued = dataclasses.replace(model, separator_id=None)
    continued.check_lengths(40, 9)
    continued.check_lengths(0, 48)
    for inputs, targets in ((41, 9), (0, 49)):
        with pytest.raises(UserError, match="num_positions=48"):
            continued.check_lengths(inputs, targets)


def test_padding_needs_no_positions():
    model = tiny_model((Prompt(length=3),))
    params, batch = params_of(model), batch_of(0, [36, 4], [9, 9])
    expected = logits_of(model, params, batch)
    wide = batch_of(0, [36, 4], [9, 9], extra=60)
    np.testing.assert_allclose(logits_of(model, params, wide)[:, :9], expected, atol=1e-5)
    generated = [
        Predictor(model, params, ByteVocabulary()).generate(each, max_decode_len=9).tokens
        for each in (batch, wide)
    ]
    np.testing.assert_array_equal(*generated)


def test_a_prompt_longer_than_the_positions_leave_room_for():
    model = tiny_model((Prompt(length=46),))
    model.check()
    assert flatten(model.shapes())["decoder/prompt"].shape == (46, 15)
    with pytest.raises(UserError, match=r"soft prompts included.*num_positions=48"):
        tiny_model((Prompt(length=47),)).check()


def test_prompts_start_from_the_vocabulary():
    model = tiny_model((Prompt(length=4, first_token=0),))
    params = params_of(model)
    prompt = model.initialize_peft(jax.random.key(0), params)["decoder"]["prompt"]
    table = np.asarray(params["token_embedder"]["embedding"])
    assert np.all((np.asarray(prompt)[:, None] == table).all(-1).sum(1) == 1)
