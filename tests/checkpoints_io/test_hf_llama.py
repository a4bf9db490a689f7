"""Llama, Mistral, Qwen2 and Qwen3 against `transformers`: logits, decoding, files and configs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from random_checkpoints import edit_json, same_tensors

from robust_ft.checkpoints_io import hf, hf_llama, native
from robust_ft.checkpoints_io.names import expand
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.convert import convert
from robust_ft.errors import UserError
from robust_ft.models.llama import LlamaConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, unflatten
from robust_ft.vocabulary import ByteVocabulary

PAD, BOS, EOS = 0, 1, 2
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
UNEVEN = {"hidden_size": 20, "num_attention_heads": 3, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
# name: class, settings
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 6}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "tied llama3": (
        "Llama",
        {"num_key_value_heads": 3, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "linear": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": LINEAR},
    ),
    "mistral": ("Mistral", UNEVEN | {"num_key_value_heads": 1, "sliding_window": 5}),
    "mistral without window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "windowed qwen2": (
        "Qwen2",
        {
            "num_key_value_heads": 3,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rms_norm_eps": 1e-5,
        },
    ),
    "qwen3": ("Qwen3", UNEVEN | {"num_key_value_heads": 3}),
    "tied qwen3": (
        "Qwen3",
        {"head_dim": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        | {"attention_bias": True},
    ),
}

logits_of = jax.jit(lambda model, params, batch: model.logits(params, batch), static_argnums=0)


@functools.cache
def reference(name):
    """Returns a random model of `transformers`, all tensors drawn, with logits of scale 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn_like(value)
            if path.endswith("bias"):
                value.copy_(0.3 * noise)
            elif value.ndim == 1:
                value.copy_(1 + 0.2 * noise)
            else:
                value.copy_(noise * value.shape[1] ** -0.5)
    return model


def ours(source, peft=()):
    """Returns our model and its parameters of a directory that was converted."""
    checkpoint = native.read(str(source))
    return (
        dataclasses.replace(native.model(checkpoint), peft=peft),
        unflatten({k: jnp.asarray(v) for k, v in checkpoint.load().items()}),
    )


def random_rows(seed, lengths, source=20, target=8):
    """Inputs of these lengths with padding anywhere, and targets after the start token."""
    rng = np.random.default_rng(seed)
    inputs = np.full((len(lengths), source), PAD, np.int32)
    mask = np.zeros(inputs.shape, bool)
    for row, is_token, length in zip(inputs, mask, lengths, strict=True):
        is_token[rng.choice(source, length, replace=False)] = True
        row[is_token] = rng.integers(3, 40, length)
    targets = rng.integers(3, 40, (len(lengths), target)).astype(np.int32)
    targets[:, 0] = BOS
    return {
        "encoder_input_tokens": inputs,
        "encoder_input_mask": mask,
        "decoder_input_tokens": targets,
    }


def reference_logits(model, batch, prompt=None):
    """Returns the logits at the targets, each row alone and without padding."""
    import torch

    found = []
    for source, mask, target in zip(*batch.values(), strict=True):
        row = torch.from_numpy(np.concatenate([source[mask], target]).astype(np.int64))
        with torch.no_grad():
            embedded = model.get_input_embeddings()(row)
            if prompt is not None:
                embedded = torch.cat([torch.from_numpy(prompt), embedded])
            logits = model(inputs_embeds=embedded[None], use_cache=False).logits
        found.append(logits[0, -len(target) :].numpy())
    return np.stack(found)


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_files_of_transformers(tmp_path, name):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "hf")
    model, params = ours(tmp_path / "ours")
    assert (model.pad_id, model.eos_id, model.start_id) == (PAD, EOS, BOS)
    # Up to 28 tokens: windows are 5 and 6, and the length before stretching is 16.
    batch = random_rows(0, [20, 0, 1, 13, 7])
    expected = reference_logits(theirs, batch)
    assert 0.3 < np.std(expected) < 3
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), output_format="hf")
    before, after = tmp_path / "theirs", tmp_path / "back"
    weights, config = "model.safetensors", "config.json"
    assert (before / weights).read_bytes() == (after / weights).read_bytes()
    assert json.loads((before / config).read_text()) == json.loads((after / config).read_text())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama3", "mistral", "tied qwen3"])
def test_logits_with_a_prompt(tmp_path, name):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "hf")
    model, params = ours(tmp_path / "ours", (Prompt(length=4),))
    width = params["token_embedder"]["embedding"].shape[1]
    prompt = np.random.default_rng(1).normal(0, width**-0.5, (4, width)).astype(np.float32)
    params["decoder"]["prompt"] = jnp.asarray(prompt)
    batch = random_rows(2, [11, 0, 5])
    expected = reference_logits(theirs, batch, prompt)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_long_sequences_keep_their_rotations(tmp_path):
    theirs = reference("llama3")
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "hf")
    model, params = ours(tmp_path / "ours")
    batch = random_rows(3, [700], 700, 20)
    expected = reference_logits(theirs, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["tied llama3", "mistral", "windowed qwen2", "qwen3"])
def test_greedy_decoding_is_transformers_generate(tmp_path, name):
    torch = pytest.importorskip("torch")
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"), "hf")
    model, params = ours(tmp_path / "ours")
    lengths = np.random.default_rng(4).integers(0, 13, 20)
    batch = random_rows(5, lengths, source=12)
    found = Predictor(model, params, ByteVocabulary()).generate(batch, max_decode_len=10)
    found = np.asarray(found.tokens)[:, 0]
    rows = zip(batch["encoder_input_tokens"], batch["encoder_input_mask"], found, strict=True)
    for row, mask, tokens in rows:
        # Nothing stands between input and output; without an input there is BOS.
        prompt = torch.from_numpy(row[mask] if mask.any() else np.array([BOS])).long()[None]
        output = theirs.generate(prompt, max_new_tokens=10, do_sample=False)[0, prompt.shape[1] :]
        expected = np.pad(output.numpy(), (0, 10 - len(output)), constant_values=PAD)
        np.testing.assert_array_equal(tokens, expected)
    assert len({tuple(row) for row in found}) > 10


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_write(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = hf.read(str(tmp_path / "theirs"))
    (tmp_path / "anew").mkdir()
    # Without what is known of the source: config.json is made from our config.
    hf.write(dataclasses.replace(checkpoint, hugging_face={}), tmp_path / "anew")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "anew", attn_implementation="eager"
    ).eval()
    # A Mistral without a window is a Llama.
    assert type(again) is type(theirs) or name == "mistral without window"
    batch = random_rows(6, [19, 4])
    expected = reference_logits(theirs, batch)
    np.testing.assert_array_equal(reference_logits(again, batch), expected)
    assert again.generation_config.eos_token_id == EOS and again.config.pad_token_id == PAD


# --- Without PyTorch


def random_checkpoint(**changes):
    sizes = {"vocab_size": 40, "emb_dim": 16, "mlp_dim": 12, "num_layers": 2}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 6}
    config = LlamaConfig(**(sizes | heads | changes))
    rng = np.random.default_rng(0)
    tensors = {
        path: Tensor.of(rng.normal(size=leaf.shape).astype(np.float32), path)
        for path, leaf in flatten(Model(config).shapes()).items()
    }
    return Checkpoint("random", "llama", config, tensors, {"pad": 0, "eos": EOS, "start": BOS})


VARIANTS = {
    "llama": {"norm_epsilon": 1e-6, "rope_theta": 7.0, "max_length": 9},
    "llama with biases": {"qkv_bias": True, "out_bias": True, "logits_via_embedding": True},
    "llama3": {
        "rope_scaling": "llama3",
        "rope_factor": 3.0,
        "rope_low_freq_factor": 0.5,
        "rope_high_freq_factor": 5.0,
        "rope_original_length": 30,
    },
    "yarn qwen3": {"qk_norm": True, "rope_scaling": "yarn", "rope_attention_factor": 0.8},
    "mistral": {"sliding_window": 7, "rope_scaling": "linear", "rope_factor": 2.0},
    "qwen2": {"qkv_bias": True},
    "windowed qwen2": {"qkv_bias": True, "sliding_window": 4, "first_window_layer": 1},
    "qwen3": {"qk_norm": True, "logits_via_embedding": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(tmp_path, name):
    checkpoint = random_checkpoint(**VARIANTS[name])
    hf.write(checkpoint, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    kind = next(k for k in ("llama", "mistral", "qwen2", "qwen3") if k in name)
    assert settings["model_type"] == kind
    found = hf.read(str(tmp_path))
    assert found.config == checkpoint.config and same_tensors(found, checkpoint)
    assert found.family == "llama" and found.token_ids["eos"] == EOS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True, "sliding_window": 5}, None),
        ({"sliding_window": 5, "first_window_layer": 1}, "Mistral.* no model with first_window"),
        ({"out_bias": True}, "Llama.* no model with out_bias=True"),
        ({"qk_norm": True, "qkv_bias": True}, "Qwen3.* no model with out_bias=False|qkv_bias"),
    ],
)
def test_switches_that_hugging_face_cannot_combine(changes, message):
    config = random_checkpoint(**changes).config
    if message is None:
        assert hf_llama.config_to_hf(config)["model_type"] == "qwen2"
        return
    with pytest.raises(UserError, match=message):
        hf_llama.config_to_hf(config)


def test_classes_defaults():
    """The configs that `transformers` writes leave out what is its classes' default."""
    read = functools.partial(hf_llama.config_from_hf, tensors={})
    llama = read({"model_type": "llama"})
    assert dataclasses.replace(llama, max_length=4096, norm_epsilon=1e-5) == LlamaConfig()
    mistral = read({"model_type": "mistral"})
    assert (mistral.num_kv_heads, mistral.mlp_dim, mistral.sliding_window) == (8, 14336, 4096)
    assert read({"model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen3 = read({"model_type": "qwen3", "hidden_size": 64})
    assert (qwen3.head_dim, qwen3.sliding_window, qwen3.vocab_size) == (128, None, 151936)
    assert qwen3.qk_norm and not qwen3.qkv_bias
    assert read({"model_type": "qwen2"}).qkv_bias and not read({"model_type": "qwen2"}).out_bias
    llama = read({"model_type": "llama", "num_attention_heads": 4, "hidden_size": 24})
    assert (llama.num_kv_heads, llama.head_dim) == (4, 6)


def test_token_ids():
    def ids(model_type="qwen2", **settings):
        return hf_llama.token_ids({"model_type": model_type} | settings)

    assert ids(bos_token_id=1, eos_token_id=2) == {"pad": 2, "eos": 2, "start": 1}
    assert ids(eos_token_id=[5, 6], pad_token_id=-1) == {"pad": 5, "eos": 5, "start": 5}
    assert ids(bos_token_id=None, eos_token_id=3, pad_token_id=0)["pad"] == 0
    assert ids() == ids("llama", bos_token_id=None, eos_token_id=None) == {}
    # The classes' defaults.
    assert ids("llama") == ids("mistral") == {"pad": 2, "eos": 2, "start": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type='dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide"),
        ({"attention_bias": True}, "Places with no tensor: .*model.layers.0.self_attn.k_proj.bias"),
        ({"model_type": "qwen3"}, "q_norm.weight"),
        ({"tie_word_embeddings": True}, None),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    hf.write(random_checkpoint(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    if message is None:
        # The head differs from the embedding: it is one of its own, whatever the flag says.
        assert not hf.read(str(tmp_path)).config.logits_via_embedding
        return
    with pytest.raises(UserError, match=message):
        hf.read(str(tmp_path))


def test_layers_with_a_window_between_others():
    settings = {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True}
    full, sliding = "full_attention", "sliding_attention"
    read = functools.partial(hf_llama.config_from_hf, tensors={})
    assert read(settings | {"layer_types": [full, sliding, sliding]}).first_window_layer == 1
    assert read(settings | {"layer_types": [full] * 3}).sliding_window is None
    with pytest.raises(UserError, match="layer_types"):
        read(settings | {"layer_types": [sliding, full, sliding]})


def test_files_of_base_models_copies_and_buffers(tmp_path):
    checkpoint = random_checkpoint(logits_via_embedding=True)
    names = expand(hf_llama.NAMES, checkpoint.config)
    tensors = {
        theirs: checkpoint.tensors[path].transposed() if turn else checkpoint.tensors[path]
        for path, (theirs, turn) in names.items()
    }
    settings = hf_llama.config_to_hf(checkpoint.config)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    extra = {buffer: Tensor.of(np.zeros(3, np.float32), buffer)}
    hf.safetensors_files.write_sharded(tmp_path, tensors | extra, None, 10**9)
    found = hf.read(str(tmp_path))
    assert same_tensors(found, checkpoint)
    assert found.hugging_face["duplicates"] == {"lm_head.weight": "model.embed_tokens.weight"}
    del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    hf.safetensors_files.write_sharded(tmp_path, bare, None, 10**9)
    found = hf.read(str(tmp_path))
    assert same_tensors(found, checkpoint) and found.hugging_face["stripped"] == "model."


def test_padding_and_end_are_the_vocabularys(tmp_path):
    """As in Qwen's chat models: config.json has no padding, and another end than the vocabulary."""
    hf.write(random_checkpoint(qkv_bias=True), tmp_path)
    changes = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": [5, 6]}
    edit_json(tmp_path / "config.json", **changes)
    assert hf.read(str(tmp_path)).token_ids == {"pad": 5, "eos": 5, "start": 5, "stop": [6]}
    ids = {"<|endoftext|>": 4, "<|im_start|>": 5, "<|im_end|>": 6, "a": 7}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "a"))
    words.add_special_tokens(list(ids)[:3])
    words.save(str(tmp_path / "tokenizer.json"))
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    found = hf.read(str(tmp_path))
    assert found.token_ids == {"pad": 4, "eos": 6, "start": 5, "stop": [5]}
    (tmp_path / "back").mkdir()
    hf.write(found, tmp_path / "back")
    before, after = (f / "config.json" for f in (tmp_path, tmp_path / "back"))
    assert json.loads(before.read_text()) == json.loads(after.read_text())
