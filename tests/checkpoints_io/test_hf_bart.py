"""BART's table and config.json, both ways; logits of converted models are in tests/models."""

import dataclasses
import json

import numpy as np
import pytest
from random_checkpoints import edit_json

from robust_ft.checkpoints_io import hf, hf_bart, native, safetensors_files, sources
from robust_ft.checkpoints_io.names import expand
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.bart import BartConfig
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

CONFIG = BartConfig(
    vocab_size=43,
    emb_dim=15,
    num_heads=3,
    mlp_dim=22,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_positions=9,
    final_logits_bias=True,
    activation_dropout_rate=0.1,
)
IDS = {"pad": 1, "eos": 2, "start": 2}


def checkpoint(config=CONFIG):
    rng = np.random.default_rng(0)
    tensors = {
        path: Tensor.of(rng.normal(size=leaf.shape).astype(np.float32), path)
        for path, leaf in flatten(Model(config).shapes()).items()
    }
    return Checkpoint("random", "bart", config, tensors, IDS)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(source, folder, write=hf.write):
    folder.mkdir()
    write(source, folder)
    return folder


def theirs(source):
    """Returns the tensors under Hugging Face's names."""
    names = expand(hf_bart.NAMES, source.config)
    return {
        name: source.tensors[path].transposed() if transpose else source.tensors[path]
        for path, (name, transpose) in names.items()
    }


@pytest.mark.parametrize("bias", [True, False])
def test_to_hugging_face_and_back_is_bit_identical(tmp_path, bias):
    config = dataclasses.replace(CONFIG, final_logits_bias=bias)
    first = written(checkpoint(config), tmp_path / "first")
    found = sources.read(str(first))
    assert (found.family, found.config, found.token_ids) == ("bart", config, IDS)
    ours = sources.read(str(written(found, tmp_path / "ours", native.write)))
    assert files(written(ours, tmp_path / "again")) == files(first)


@pytest.mark.parity
@pytest.mark.parametrize("head", ["BartForConditionalGeneration", "BartModel"])
def test_what_hugging_face_saves_comes_back_bit_identical(tmp_path, head):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=43,
        d_model=15,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=22,
        decoder_ffn_dim=22,
        max_position_embeddings=9,
    )
    first = tmp_path / "theirs"
    getattr(transformers, head)(config).save_pretrained(first)
    found = sources.read(str(first))
    assert found.token_ids == IDS
    assert found.config.final_logits_bias == (head == "BartForConditionalGeneration")
    ours = sources.read(str(written(found, tmp_path / "ours", native.write)))
    again = written(ours, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (again, first)]
    assert configs[0] == configs[1]
    same = transformers.BartModel.from_pretrained(again).state_dict()
    for name, value in transformers.BartModel.from_pretrained(first).state_dict().items():
        assert torch.equal(same[name], value), name


@pytest.mark.parity
def test_hugging_face_reads_a_config_of_ours(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")

    grown = sources.overridden(checkpoint(), {"vocab_size": 45, "dropout_rate": 0.2})
    model = transformers.BartForConditionalGeneration.from_pretrained(
        written(grown, tmp_path / "grown")
    )
    assert model.model.shared.weight.shape == (45, 15)
    assert model.final_logits_bias.shape == (1, 45)
    assert (model.config.dropout, model.config.activation_dropout) == (0.2, 0.1)
    assert model.lm_head.weight is model.model.shared.weight


def test_copies_of_the_embedding_are_written_back(tmp_path):
    source = checkpoint()
    tensors = theirs(source)
    shared = tensors["model.shared.weight"]
    for copy in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        tensors[f"{copy}.weight"] = shared
    folder = written(source, tmp_path / "early")
    safetensors_files.write_sharded(folder, tensors, None, 10**9)
    found = sources.read(str(folder))
    assert found.tensors.keys() == source.tensors.keys()
    again = safetensors_files.read(written(found, tmp_path / "again") / "model.safetensors")
    assert {name: tensor.digest() for name, tensor in again.items()} == {
        name: tensor.digest() for name, tensor in tensors.items()
    }
    tensors["lm_head.weight"] = Tensor.of(np.zeros((43, 15), np.float32), "another head")
    safetensors_files.write_sharded(folder, tensors, None, 10**9)
    with pytest.raises(UserError, match=r"lm_head\.weight.*shared\.weight"):
        sources.read(str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"normalize_before": True}, "normalize_before=True"),
        ({"decoder_ffn_dim": 23}, "encoder_ffn_dim=22 and decoder_ffn_dim=23"),
        ({"activation_function": "mish"}, r"'mish'.*gelu_new"),
        ({"d_model": 16}, "emb_dim=16"),
        ({"encoder_layers": 2}, r"16 places have no tensor[\s\S]*model\.encoder\.layers\.1\.fc1"),
        ({"decoder_layers": 1}, r"26 tensors have no place[\s\S]*model\.decoder\.layers\.1\.fc1"),
        ({"max_position_embeddings": 10}, r"embed_positions.*\(11, 15\).*\(12, 15\)"),
    ],
)
def test_configs_that_cannot_be_right(tmp_path, changes, named):
    folder = written(checkpoint(), tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=named):
        sources.read(str(folder))


def test_activations_come_back():
    for name, ours in {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}.items():
        config = hf_bart.config_from_hf({"activation_function": name}, {})
        assert config.activation == ours
        assert hf_bart.config_to_hf(config)["activation_function"] == name
    with pytest.raises(UserError, match="linear"):
        hf_bart.config_to_hf(BartConfig(activation="linear"))
