"""Rotary positions in config.json against `transformers`, spelled as its versions spell them."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import edit_json

from robust_ft.checkpoints_io import hf, hf_llama, hf_rope, native
from robust_ft.errors import UserError
from robust_ft.models.llama import LlamaConfig
from robust_ft.trainable import unflatten

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SPELLINGS = {
    "nothing": {},
    "theta beside": {"rope_theta": 300.0},
    "theta within": {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}},
    "theta twice": {"rope_parameters": {"rope_theta": 300.0}, "rope_theta": 70.0},
    "null scaling": {"rope_scaling": None, "rope_parameters": {"rope_theta": 300.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 300.0}},
    "factor without a type": {"rope_scaling": {"factor": 3.0}},
    "old linear": {"rope_scaling": {"type": "linear", "factor": 3}, "rope_theta": 300.0},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}},
    "both types": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 3.0}},
    "scaling wins": {
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "scaling wins, theta beside": {
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
        "rope_scaling": YARN,
        "rope_theta": 70.0,
    },
    "scaling wins, theta within": {
        "rope_parameters": {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "default", "rope_theta": 20.0},
        "rope_theta": 70.0,
    },
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "new llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "llama3, length beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 9},
    "llama3 without its length": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        "max_position_embeddings": 12,
    },
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e4},
    "old yarn": {"rope_scaling": {"type": "yarn"} | YARN, "rope_theta": 1e4},
    "new yarn": {"rope_parameters": YARN | {"rope_theta": 50.0}},
    "yarn without its length": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn, length beside": {"rope_scaling": YARN, "original_max_position_embeddings": 9},
    "yarn without a factor": {"rope_scaling": YARN | {"factor": None}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 0.5}},
    "yarn, no betas": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
    "yarn, one beta": {"rope_scaling": YARN | {"beta_fast": 1.0 + 1e-9, "truncate": False}},
    "yarn, not truncated": {"rope_scaling": YARN | {"truncate": False, "beta_fast": 6.0}},
    "yarn, attention": {"rope_scaling": YARN | {"attention_factor": 0.6, "mscale": 2.0}},
    "yarn, mscale": {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}},
    "yarn, half of mscale": {"rope_scaling": YARN | {"mscale": 2.0}},
    "yarn, short": {"rope_scaling": YARN | {"original_max_position_embeddings": 2}},
    "yarn, factor of 1": {"rope_scaling": YARN | {"factor": 1.0}},
    "whole heads": {"partial_rotary_factor": 1.0, "rope_scaling": YARN},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns {class: folder} of models whose attention depends much on positions."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    folders = {}
    for kind in FAMILIES:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES, head_dim=16)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        edit_json(folders[kind] / "config.json", rope_parameters=None)
    return folders


@pytest.mark.parity
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(saved, tmp_path, kind, name):
    """On 60 positions, more than the models were made for."""
    import torch
    import transformers

    if kind not in ("Llama", "Qwen3") and not name.startswith(("scaling", "yarn")):
        return  # the same code in all classes of `transformers`
    settings = json.loads((saved[kind] / "config.json").read_text()) | SPELLINGS[name]
    for file in saved[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 40, (2, 60))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = hf.read(str(tmp_path), vocabulary=False)
    batch = {"encoder_input_tokens": tokens[:, :7], "decoder_input_tokens": tokens[:, 7:]}
    params = jax.tree.map(jnp.asarray, unflatten(found.load()))
    logits = native.model(found).logits(params, {k: v.astype(np.int32) for k, v in batch.items()})
    np.testing.assert_allclose(np.asarray(logits), expected[:, 7:], rtol=0, atol=2e-4)
    # Written anew, in the words of all versions, it is the same model.
    again = hf_llama.config_from_hf(hf_llama.config_to_hf(found.config), {})
    assert {f: v for f, v in vars(again).items() if f.startswith("rope")} == {
        f: v for f, v in vars(found.config).items() if f.startswith("rope")
    }


@pytest.mark.parity
def test_every_rope_type_of_transformers_is_read_or_refused_by_name():
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    everything = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    refused = set()
    for kind in (*modeling.ROPE_INIT_FUNCTIONS, "default", "mrope", "axial"):
        settings = {"max_position_embeddings": 32, "rope_scaling": everything | {"type": kind}}
        try:
            assert hf_rope.from_hf(settings)["rope_scaling"].replace("none", "default") == kind
        except UserError as error:
            assert f"rope_type='{kind}'" in str(error) and "'yarn'" in str(error)
            refused.add(kind)
    assert refused == {"dynamic", "longrope", "proportional", "mrope", "axial"}


def test_spellings_by_hand():
    """What the comparison with `transformers` has shown, for installations without it."""

    def read(name):
        found = hf_rope.from_hf(SIZES | SPELLINGS[name])
        return {name.removeprefix("rope_"): value for name, value in found.items()}

    assert read("nothing") == {"scaling": "none", "theta": 10000.0}
    assert read("theta twice")["theta"] == 300
    assert read("old linear") == {"scaling": "linear", "theta": 300.0, "factor": 3}
    assert read("scaling wins") == {"scaling": "linear", "theta": 10000.0, "factor": 4.0}
    assert read("scaling wins, theta beside")["theta"] == 70
    assert read("scaling wins, theta within") == {"scaling": "none", "theta": 20.0}
    assert read("yarn, length beside")["original_length"] == 9
    assert read("yarn without its length")["original_length"] == 32
    assert read("yarn without a factor")["factor"] == 2
    assert read("yarn, attention")["attention_factor"] == 0.6
    assert "attention_factor" not in read("yarn, half of mscale")
    log4 = np.log(4)
    ratio = (1 + 0.2 * log4) / (1 + 0.05 * log4)
    assert read("yarn, mscale")["attention_factor"] == pytest.approx(ratio)


def test_a_theta_that_is_lost_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        hf_rope.from_hf(SIZES | SPELLINGS["scaling wins, theta beside"] | {"rope_theta": 300.0})
        assert not caplog.text
        hf_rope.from_hf(SIZES | SPELLINGS["scaling wins"])
    assert "rope_theta is 10000.0, not 300.0; say rope_theta in rope_scaling, too" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "'dynamic'.*without it, up to max_"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'.*length of each sequence"),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}}, "rope_type=None"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' but not its factor"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' but not its factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor='4'.*not a number"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor=None"),
        ({"rope_scaling": "yarn"}, "rotary positions are yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "in all layers"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"rope_theta": None}, "rope_theta=None"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": None}, "_embeddings=None"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        hf_rope.from_hf(SIZES | settings)


def test_written_for_all_versions():
    found = hf_rope.to_hf(LlamaConfig(rope_theta=5.0))
    assert found == {
        "rope_theta": 5.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},
    }
    found = hf_rope.to_hf(LlamaConfig(rope_scaling="linear", rope_factor=3.0))
    assert found["rope_scaling"] == found["rope_parameters"]
    assert found["rope_scaling"] == {"rope_theta": 1e4, "rope_type": "linear", "factor": 3.0}
