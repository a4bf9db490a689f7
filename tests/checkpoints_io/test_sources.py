"""One entrance to all formats: what INITIAL_CHECKPOINT_PATH and --input may name."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import edit_json, random_checkpoint, same_tensors, truncate

from robust_ft.checkpoints_io import hf, native, safetensors_files, sources, t5x
from robust_ft.errors import UserError
from robust_ft.restore import load_params
from robust_ft.stage_checkpoints import StageCheckpoints
from robust_ft.train_step import TrainState
from robust_ft.trainable import unflatten
from robust_ft.vocabulary import ByteVocabulary

DISTANCE = {"relative_max_distance": 20}


def save(name, checkpoint, folder):
    """Writes a checkpoint in one of all formats and returns the path to name it by."""
    folder.mkdir()
    if name == "file":
        safetensors_files.write(folder / "x.safetensors", checkpoint.tensors)
        return folder / "x.safetensors"
    if name == "checkpoint_3":
        params = unflatten({path: jnp.asarray(a) for path, a in checkpoint.load().items()})
        saved = StageCheckpoints(folder)
        saved.save(TrainState(jnp.asarray(3), params, {}), {}, None)
        saved.close()
        return folder / name
    {"hf": hf, "t5x": t5x, "robust_ft": native}[name].write(checkpoint, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["hf", "t5x", "robust_ft", "file", "checkpoint_3"])
def test_every_format_gives_the_same_parameters(tmp_path, name, dtype):
    checkpoint = random_checkpoint(dtype=dtype)
    path = save(name, checkpoint, tmp_path / "x")
    expected = checkpoint.load()
    assert same_tensors(sources.weights(str(path)), checkpoint)
    loaded = load_params(str(path))
    assert loaded.keys() == expected.keys()
    for parameter, array in loaded.items():
        assert array.dtype == jnp.dtype(dtype)
        assert array.tobytes() == expected[parameter].tobytes()


@pytest.mark.parametrize("name", ["hf", "t5x", "robust_ft"])
def test_formats_are_told_apart(tmp_path, name):
    path = save(name, random_checkpoint(), tmp_path / "x")
    assert sources.detect(str(path)) == name
    assert sources.read(str(path), None, DISTANCE).config == random_checkpoint().config


def test_prompts(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 16))
    np.save(tmp_path / "prompt.npy", array)
    np.testing.assert_array_equal(
        load_params(str(tmp_path / "prompt.npy"))["encoder/prompt"], array
    )
    np.save(tmp_path / "wrong.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"float64 \(3,\), not a soft prompt"):
        load_params(str(tmp_path / "wrong.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    truncate(tmp_path / "prompt.npy", 0.5)
    for name in ("prompt.npy", "objects.npy"):
        with pytest.raises(UserError, match=rf"{name}' is no readable .npy"):
            load_params(str(tmp_path / name))


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"is no checkpoint: neither a .safetensors"):
        load_params(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"no checkpoint at .*modle.* Did you mean .*model"):
        load_params(str(tmp_path / "modle"))
    with pytest.raises(UserError, match=r"is no model directory"):
        sources.read(str(tmp_path / "model"))


def test_overlaid_parameters_have_to_fit():
    base, trained = random_checkpoint(0), random_checkpoint(1)
    path = "decoder/decoder_norm/scale"
    mixed = sources.overlaid(base, {path: trained.tensors[path]}, "stage")
    assert mixed.tensors[path] is trained.tensors[path] and len(mixed.tensors) == len(base.tensors)
    with pytest.raises(UserError, match=r"'stage' does not fit .*\n.*no place: encoder/prompt"):
        sources.overlaid(base, {"encoder/prompt": trained.tensors[path]}, "stage")
    with pytest.raises(UserError, match=r"has shape \(16,\), in 'random 0' it has"):
        sources.overlaid(base, {"token_embedder/embedding": trained.tensors[path]}, "stage")


def test_overrides_have_to_exist_and_to_fit():
    checkpoint = random_checkpoint()
    changed = sources.overridden(checkpoint, {"relative_max_distance": 30})
    assert changed.config.relative_max_distance == 30
    with pytest.raises(UserError, match=r"no field 'max_distance', .*Did you mean 'relative_max_d"):
        sources.overridden(checkpoint, {"max_distance": 30})
    with pytest.raises(UserError, match=r"has shape"):
        sources.overridden(checkpoint, {"mlp_dim": 25})


# --- Our own directories


def test_our_directories_hold_config_ids_and_vocabulary(tmp_path):
    checkpoint = random_checkpoint()
    vocabulary = {"kind": "ByteVocabulary", "extra_ids": 7}
    native.write(native.dataclasses.replace(checkpoint, vocabulary=vocabulary), tmp_path)
    found = native.read(str(tmp_path))
    assert found.config == checkpoint.config and same_tensors(found, checkpoint)
    assert native.vocabulary(found) == ByteVocabulary(extra_ids=7)
    model = native.model(found)
    assert (model.pad_id, model.eos_id, model.start_id) == (0, 1, 0)
    assert native.vocabulary(checkpoint) is None


def test_our_directories_in_shards(tmp_path):
    checkpoint = random_checkpoint()
    native.write(checkpoint, tmp_path, shard_bytes=10_000)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert same_tensors(native.read(str(tmp_path)), checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 2}, "newer robust_ft"),
        ({"family": "t6"}, "'t6' is no model family"),
        ({"family": None}, "lacks version, family, config or files"),
        ({"config": {"emb_dims": 3}}, r"T5Config.emb_dims, which does not exist. .*'emb_dim'"),
        ({"config": {"emb_dim": 16}}, r"Places with no tensor: .*encoder/layers_7"),
        ({"files": ["spiece.model"]}, "lacks spiece.model, which its robust_ft.json names"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    native.write(random_checkpoint(), tmp_path)
    edit_json(tmp_path / "robust_ft.json", **settings)
    with pytest.raises(UserError, match=message):
        native.read(str(tmp_path))


def test_vocabularies_that_do_not_exist(tmp_path):
    checkpoint = random_checkpoint()
    for vocabulary, message in (
        ({"kind": "ByteVocabluary"}, r"kind 'ByteVocabluary'.* Did you mean 'ByteVocabulary'"),
        ({"kind": "ByteVocabulary", "ids": 3}, r"unexpected keyword argument 'ids'"),
    ):
        wrong = native.dataclasses.replace(checkpoint, vocabulary=vocabulary)
        with pytest.raises(UserError, match=message):
            native.vocabulary(wrong)


def test_weights_are_missing(tmp_path):
    native.write(random_checkpoint(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index"):
        native.read(str(tmp_path))
