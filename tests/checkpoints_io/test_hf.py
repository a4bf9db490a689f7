"""Hugging Face directories against `transformers`, and every way to be broken."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import IDS, VARIANTS, edit_json, random_checkpoint, same_tensors, truncate
from tiny_models import random_batch

from robust_ft.checkpoints_io import hf, native
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.convert import convert
from robust_ft.errors import UserError
from robust_ft.trainable import unflatten

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
UNSCALED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# name: class, settings, whether the head is made a tensor of its own
MODELS = {
    "t5_1_0": ("T5", {"feed_forward_proj": "relu"}, False),
    "t5_1_1": ("T5", UNSCALED, True),
    "tied without scale": ("T5", UNSCALED, False),
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu"}, True),
    "tied mt5": ("MT5", {"feed_forward_proj": "gated-gelu"}, False),
    "gated silu": ("T5", UNSCALED | {"feed_forward_proj": "gated-silu"}, True),
}


def reference(name, seed=0, **changes):
    """Returns a random model of `transformers` with logits of scale about 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    kind, settings, own_head = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings | changes)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        if own_head:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) / 4)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + torch.randn_like(parameter) / 5)
    return model


def reference_logits(model, batch):
    import torch

    source, target = (
        torch.from_numpy(batch[f"{side}_input_tokens"].astype(np.int64))
        for side in ("encoder", "decoder")
    )
    mask = (source != 0).long()
    with torch.no_grad():
        output = model(
            input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False
        )
    return output.logits.float().numpy()


def our_logits(checkpoint, batch):
    model = native.model(checkpoint)
    params = jax.tree.map(jnp.asarray, unflatten(checkpoint.load()))
    return np.asarray(model.logits(params, batch))


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_files_of_transformers(tmp_path, name):
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs")
    batch = random_batch(0, [30, 4, 1], [5, 28, 1])
    expected = reference_logits(model, batch)
    assert 0.05 < np.std(expected) < 20
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "hf")
    converted = native.read(str(tmp_path / "ours"))
    np.testing.assert_allclose(our_logits(converted, batch), expected, rtol=0, atol=1e-4)
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), output_format="hf")
    weights, config = "model.safetensors", "config.json"
    before, after = tmp_path / "theirs", tmp_path / "back"
    assert (before / weights).read_bytes() == (after / weights).read_bytes()
    settings = json.loads((before / config).read_text())
    # Version 5 says of every T5 that its head is tied, also of one that differs.
    assert json.loads((after / config).read_text()) == settings | {
        "tie_word_embeddings": not MODELS[name][2]
    }
    again = type(model).from_pretrained(tmp_path / "back").eval()
    np.testing.assert_array_equal(reference_logits(again, batch), expected)


@pytest.mark.parity
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_what_we_write(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    checkpoint = random_checkpoint(**VARIANTS[name])
    hf.write(checkpoint, tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = random_batch(1, [9, 4], [5, 8])
    # Random norms make large logits; compare at their scale.
    ours, theirs = our_logits(checkpoint, batch), reference_logits(model, batch)
    scale = np.std(theirs)
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_shards_of_transformers(tmp_path):
    model = reference("t5_1_1")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "one")
    assert len(list((tmp_path / "shards").glob("*-of-*"))) > 2
    one, shards = hf.read(str(tmp_path / "one")), hf.read(str(tmp_path / "shards"))
    assert same_tensors(one, shards) and one.config == shards.config


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_pytorch_files(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    model = reference("t5_1_0").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "safe")
    shutil.copytree(tmp_path / "safe", tmp_path / "bin", ignore=lambda *_: ["model.safetensors"])
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    safe, binary = hf.read(str(tmp_path / "safe")), hf.read(str(tmp_path / "bin"))
    assert same_tensors(safe, binary)
    assert next(iter(binary.tensors.values())).dtype == jnp.dtype(dtype)
    # The state holds the tied tensors under all their names; they are written back.
    assert set(binary.hugging_face["duplicates"]) == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    (tmp_path / "back").mkdir()
    hf.write(binary, tmp_path / "back")
    assert hf.read_weights(tmp_path / "back").keys() == model.state_dict().keys()
    truncate(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin' is no readable"):
        hf.read(str(tmp_path / "bin"))


@pytest.mark.parity
def test_pickled_objects_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"shared.weight": truncate}, tmp_path / "pytorch_model.bin")  # any function
    with pytest.raises(UserError, match=r"pytorch_model.bin' is no readable"):
        hf.read(str(tmp_path))


# --- What config.json says, and what the tensors say


def written(folder, settings=None, **changes):
    """Writes a random checkpoint into a folder and edits its config.json."""
    folder.mkdir(exist_ok=True)
    checkpoint = random_checkpoint(**changes)
    hf.write(checkpoint, folder)
    edit_json(folder / "config.json", **settings or {})
    return checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(tmp_path, name, dtype):
    checkpoint = written(tmp_path, dtype=dtype, **VARIANTS[name])
    found = hf.read(str(tmp_path))
    assert found.config == checkpoint.config
    assert same_tensors(found, checkpoint) and found.token_ids == IDS


@pytest.mark.parametrize("scaled", [None, False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_a_head_that_differs_is_untied_whatever_the_flags_say(tmp_path, flag, scaled):
    flags = {"tie_word_embeddings": flag, "scale_decoder_outputs": scaled}
    written(tmp_path, flags)
    assert not hf.read(str(tmp_path)).config.logits_via_embedding


@pytest.mark.parametrize("flag", [None, True])
def test_a_head_that_repeats_the_embedding_is_tied(tmp_path, flag):
    checkpoint = written(tmp_path, {"tie_word_embeddings": flag}, logits_via_embedding=True)
    weights = hf.read_weights(tmp_path)
    weights["lm_head.weight"] = weights["shared.weight"]
    weights = {name: Tensor.of(t.load(), name) for name, t in weights.items()}
    hf.safetensors_files.write(tmp_path / "model.safetensors", weights)
    found = hf.read(str(tmp_path))
    assert found.config == checkpoint.config and same_tensors(found, checkpoint)
    assert found.hugging_face["duplicates"] == {"lm_head.weight": "shared.weight"}
    (tmp_path / "back").mkdir()
    hf.write(found, tmp_path / "back")
    before, after = (tmp_path / d / "model.safetensors" for d in (".", "back"))
    assert hf.read_weights(tmp_path / "back").keys() == weights.keys()
    assert len(before.read_bytes()) < len(after.read_bytes())  # the metadata that PyTorch asks for


def test_no_head_where_the_flag_says_untied(tmp_path):
    written(tmp_path, {"tie_word_embeddings": False}, logits_via_embedding=True)
    with pytest.raises(UserError, match=r"with no tensor: lm_head.weight"):
        hf.read(str(tmp_path))


def test_a_trained_head_is_no_longer_tied(tmp_path):
    """Version 5's tied head without scale, written back after training."""
    flags = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    written(tmp_path, flags, logits_via_embedding=True)
    found = hf.read(str(tmp_path))
    path = "decoder/logits_dense/kernel"
    np.testing.assert_array_equal(
        found.tensors[path].load().T, found.tensors["token_embedder/embedding"].load()
    )
    for change, expected in ((0, False), (1, True)):
        changed = Tensor.of(found.tensors[path].load() + change, path)
        folder = tmp_path / f"back{change}"
        folder.mkdir()
        hf.write(dataclasses.replace(found, tensors=dict(found.tensors) | {path: changed}), folder)
        assert ("lm_head.weight" in hf.read_weights(folder)) is expected
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] != expected


def test_config_defaults_are_those_of_the_class(tmp_path):
    config = hf.families.get("t5").config_from_hf({"model_type": "mt5"}, {})
    assert (config.vocab_size, config.mlp_dim, config.num_heads) == (250112, 1024, 6)
    config = hf.families.get("t5").config_from_hf({"model_type": "t5"}, {})
    assert (config.mlp_dim, config.num_encoder_layers, config.num_decoder_layers) == (2048, 6, 6)
    assert config.mlp_activations == ("relu",) and config.logits_via_embedding


def test_a_vocabulary_is_carried_along(tmp_path):
    written(tmp_path, {"tokenizer_class": "ByT5Tokenizer"})
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    convert(str(tmp_path), str(tmp_path / "ours"))
    found = native.read(str(tmp_path / "ours"))
    vocabulary = native.vocabulary(found)
    assert vocabulary.vocab_size == 384 and vocabulary.decode(vocabulary.encode("ü")) == "ü"
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), output_format="hf")
    assert (tmp_path / "back" / "tokenizer_config.json").is_file()


# --- Bad input


def test_missing_weights(tmp_path):
    written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights are in it; looked for model.safetensors"):
        hf.read(str(tmp_path))


def test_shards_without_an_index(tmp_path):
    hf.write(random_checkpoint(), tmp_path, shard_bytes=10_000)
    (tmp_path / hf.INDEX).unlink()
    with pytest.raises(UserError, match=r"it has \d shards but no model.safetensors.index.json"):
        hf.read(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t6"}, "model_type='t6', an architecture .* Did you mean 't5'"),
        ({"model_type": None}, "model_type=None"),
        ({"feed_forward_proj": "gated-elu"}, "feed_forward_proj='gated-elu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ({"d_model": 17}, r"has shape .*config asks for"),
        ({"num_layers": 3}, "with no tensor: encoder.block.2.layer.0"),
        ({"num_layers": 1}, "with no place: encoder.block.1.layer.0"),
        ({"feed_forward_proj": "relu"}, r"DenseReluDense.wi_0.weight.*\n.*DenseReluDense.wi.we"),
        ({"relative_attention_num_buckets": 2}, "relative_num_buckets=2"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, settings, message):
    written(tmp_path, settings)
    with pytest.raises(UserError, match=message) as caught:
        hf.read(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_config_that_is_none(tmp_path, text):
    written(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json' is not (JSON|a JSON object)"):
        hf.read(str(tmp_path))


def test_no_such_directory(tmp_path):
    with pytest.raises(UserError, match=r"There is no directory"):
        hf.read(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no config.json"):
        hf.read(str(tmp_path))


def test_a_hub_name_without_network(tmp_path, monkeypatch):
    """The real client, sent to a port where nothing listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"no directory 'google/mt5-small', and .* cannot be reach"):
        hf.read("google/mt5-small")
