"""GPT-2's table and config.json, both ways; logits of converted models are in tests/models."""

import json

import numpy as np
import pytest
from random_checkpoints import edit_json

from robust_ft.checkpoints_io import hf, hf_gpt2, native, sources
from robust_ft.checkpoints_io.names import expand
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

CONFIG = GPT2Config(
    vocab_size=43, emb_dim=15, num_heads=3, mlp_dim=22, num_layers=2, num_positions=9
)
IDS = {"pad": 41, "eos": 40, "start": 42, "stop": [39]}


def checkpoint(config=CONFIG):
    rng = np.random.default_rng(0)
    shapes = flatten(Model(config).shapes())
    tensors = {
        path: Tensor.of(rng.normal(size=leaf.shape).astype(np.float32), path)
        for path, leaf in shapes.items()
    }
    return Checkpoint("random", "gpt2", config, tensors, IDS)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(source, folder, write=hf.write):
    folder.mkdir()
    write(source, folder)
    return folder


def test_to_hugging_face_and_back_is_bit_identical(tmp_path):
    first = written(checkpoint(), tmp_path / "first")
    found = sources.read(str(first))
    assert (found.family, found.config, found.token_ids) == ("gpt2", CONFIG, IDS)
    ours = sources.read(str(written(found, tmp_path / "ours", native.write)))
    assert files(written(ours, tmp_path / "again")) == files(first)


@pytest.mark.parity
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
def test_what_hugging_face_saves_comes_back_bit_identical(tmp_path, head):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=43, n_embd=15, n_head=3, n_layer=2, n_positions=9, eos_token_id=40
    )
    getattr(transformers, head)(config).save_pretrained(tmp_path / "theirs")
    found = sources.read(str(tmp_path / "theirs"))
    assert found.token_ids == {"pad": 40, "eos": 40, "start": 40}
    assert found.token_ids["pad"] == 40 and found.config.mlp_dim == 60
    ours = sources.read(str(written(found, tmp_path / "ours", native.write)))
    again = written(ours, tmp_path / "again")
    theirs = tmp_path / "theirs"
    assert (again / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == (
        json.loads((theirs / "config.json").read_text())
    )
    same = transformers.GPT2LMHeadModel.from_pretrained(again).transformer.state_dict()
    for name, value in transformers.GPT2Model.from_pretrained(theirs).state_dict().items():
        assert torch.equal(same[name], value), name


@pytest.mark.parity
def test_hugging_face_reads_what_has_been_trained_with_added_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")

    changes = {"vocab_size": 45, "pad_id": 44, "dropout_rate": 0.2}
    grown = sources.overridden(checkpoint(), changes)
    folder = written(grown, tmp_path / "grown")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert model.transformer.wte.weight.shape == (45, 15)
    assert model.config.resid_pdrop == 0.2 and model.config.pad_token_id == 44
    assert model.lm_head.weight is model.transformer.wte.weight


def test_masks_and_copies_of_early_files_are_left_out(tmp_path):
    source = checkpoint()
    names = expand(hf_gpt2.NAMES, CONFIG)
    tensors = {names[path][0]: tensor for path, tensor in source.tensors.items()}
    mask = Tensor.of(np.ones((1, 1, 9, 9), np.float32), "mask")
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask}
    extra["lm_head.weight"] = tensors["transformer.wte.weight"]
    folder = written(source, tmp_path / "early")
    hf.safetensors_files.write_sharded(folder, tensors | extra, None, 10**9)
    assert sources.read(str(folder)).tensors.keys() == source.tensors.keys()
    extra["lm_head.weight"] = Tensor.of(np.zeros((43, 15), np.float32), "another head")
    hf.safetensors_files.write_sharded(folder, tensors | extra, None, 10**9)
    with pytest.raises(UserError, match=r"lm_head\.weight.*wte\.weight"):
        sources.read(str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"activation_function": "mish"}, "'mish'.*gelu_new"),
        ({"n_head": 4}, "emb_dim=15"),
        ({"n_layer": 3}, r"12 places have no tensor[\s\S]*transformer\.h\.2\.attn\.c_attn"),
        ({"n_inner": 23}, r"c_fc\.bias.*\(22,\).*\(23,\)"),
    ],
)
def test_configs_that_cannot_be_right(tmp_path, changes, named):
    folder = written(checkpoint(), tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=named):
        sources.read(str(folder))


def test_activations_come_back():
    for theirs, ours in {"gelu_new": "gelu", "gelu": "gelu_exact", "relu": "relu"}.items():
        config = hf_gpt2.config_from_hf({"activation_function": theirs}, {})
        assert config.activation == ours
        assert hf_gpt2.config_to_hf(config)["activation_function"] == theirs
    with pytest.raises(UserError, match="linear"):
        hf_gpt2.config_to_hf(GPT2Config(activation="linear"))


def test_token_ids():
    assert hf_gpt2.token_ids({}) == {"pad": 50256, "eos": 50256, "start": 50256}
    named = {"eos_token_id": [7, 8], "pad_token_id": 0, "bos_token_id": 9, "sep_token_id": 5}
    assert hf_gpt2.token_ids(named) == {"pad": 0, "eos": 7, "start": 9}
    assert hf_gpt2.token_ids({"bos_token_id": None, "eos_token_id": 7})["start"] == 7
