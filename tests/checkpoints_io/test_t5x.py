"""t5x checkpoints: real ones, what we write, and every way to be broken."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorstore as ts
from random_checkpoints import VARIANTS, random_checkpoint, same_tensors, truncate
from tiny_models import random_batch

from robust_ft.checkpoints_io import native, t5x
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.convert import convert
from robust_ft.errors import UserError
from robust_ft.restore import load_params
from robust_ft.trainable import unflatten

DISTANCE = {"relative_max_distance": 20}
KERNEL = "encoder/layers_0/mlp/wo/kernel"


@pytest.fixture
def real():
    """The folder with published checkpoints."""
    if "ROBUST_FT_DATA_DIR" not in os.environ:
        pytest.skip("ROBUST_FT_DATA_DIR is not set")
    return Path(os.environ["ROBUST_FT_DATA_DIR"]) / "checkpoints"


@pytest.fixture
def written(tmp_path):
    """A random T5 as t5x would have saved it, and its folder."""
    checkpoint = random_checkpoint(relative_num_buckets=8)
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    t5x.write(checkpoint, folder)
    return folder, checkpoint


def edit_index(folder, change):
    """Applies `change` to the index's map."""
    file = folder / "checkpoint"
    index = msgpack.unpackb(file.read_bytes(), ext_hook=msgpack.ExtType)
    change(index)
    file.write_bytes(msgpack.packb(index))


def kernel_folder(folder):
    return folder / f"target.{KERNEL.replace('/', '.')}"


# --- Published checkpoints


def test_a_real_checkpoint(real, tmp_path):
    source = str(real / "test_t5_1_1_tiny" / "checkpoint_3")
    tiny = t5x.read(source, {"relative_max_distance": 8})
    config = tiny.config
    assert (config.emb_dim, config.num_heads, config.head_dim, config.mlp_dim) == (4, 2, 2, 8)
    assert (config.num_encoder_layers, config.relative_num_buckets) == (2, 4)
    assert not config.logits_via_embedding and config.vocab_size == 32128
    assert len(tiny.tensors) == 52  # and nothing of the optimizer's state
    batch = random_batch(0, [30, 3], [12, 20], vocab=32100)
    logits = native.model(tiny).logits(jax.tree.map(jnp.asarray, unflatten(tiny.load())), batch)
    assert logits.shape == (2, 20, 32128) and np.isfinite(logits).all() and np.std(logits) > 0
    convert(source, str(tmp_path / "ours"), "t5x", config={"relative_max_distance": 8})
    convert(str(tmp_path / "ours"), str(tmp_path / "hf"), output_format="hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "again"))
    convert(str(tmp_path / "again"), str(tmp_path / "back"), output_format="t5x")
    back = t5x.read(str(tmp_path / "back"), {"relative_max_distance": 8})
    assert same_tensors(tiny, back) and back.config == config
    # The same tensors lie inside the index and outside.
    before, after = ({p.name for p in Path(d).iterdir()} for d in (source, tmp_path / "back"))
    assert before == after


def test_a_real_checkpoint_does_not_tell_its_distance(real):
    with pytest.raises(UserError, match=r"4 buckets .* --config=relative_max_distance=NUMBER"):
        t5x.read(str(real / "test_t5_1_1_tiny" / "checkpoint_3"))


def test_initial_checkpoint_path_reads_it_and_a_prompt(real):
    tiny = real / "test_t5_1_1_tiny" / "checkpoint_3"
    prompt = real / "prompts" / "rte.npy"
    assert len(load_params(str(tiny))) == 52
    assert load_params(str(prompt))["encoder/prompt"].shape == (100, 768)
    both = load_params(f"{tiny},{prompt}")
    assert len(both) == 53 and "encoder/prompt" in both


@pytest.mark.parametrize("name", ["t5x_tiny_t5/checkpoint_1", "t5x_tiny_orbax/1"])
def test_real_states_without_parameters(real, name):
    """Saved without a model, with optimizer states under `_optimizer` and `optimizer`."""
    with pytest.raises(UserError, match=r"holds no parameters \(nothing under 'target'\)"):
        t5x.read_weights(real / name)


@pytest.mark.parametrize(
    ("name", "at"),
    [("t5x_tiny_t5/checkpoint_1", "optimizer"), ("t5x_tiny_orbax/1", "_optimizer")],
    ids=["gzip", "zstd"],
)
def test_real_chunks(real, tmp_path, name, at):
    """The arrays of both, taken for parameters; one gzip, one zstd, neither with its .zarray."""
    shutil.copytree(real / name, tmp_path / "x", copy_function=shutil.copyfile)
    for folder in (tmp_path / "x", *(p for p in (tmp_path / "x").iterdir() if p.is_dir())):
        folder.chmod(0o755)
    if at == "_optimizer":  # the index describes only those of the other
        for leaf, shape, dtype in (("bias", [5], "<f4"), ("kernel", [10, 5], "<f8")):
            metadata = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": dtype}
            metadata |= {"compressor": {"id": "zstd", "level": 1}, "order": "C"}
            metadata |= {"fill_value": None, "filters": None}
            file = tmp_path / "x" / f"_optimizer.state.param_states.{leaf}" / ".zarray"
            file.write_text(json.dumps(metadata))

    def move(index):
        states = index[at]["state"]["param_states"]
        del states["step"]
        index[at]["target"] = states

    edit_index(tmp_path / "x", move)
    found = {path: tensor.load() for path, tensor in t5x.read_weights(tmp_path / "x").items()}
    assert found["kernel"].shape == (10, 5) and found["kernel"].dtype == np.float64
    assert found["bias"].shape == (5,) and np.isfinite(found["kernel"]).all()
    assert 0 < np.std(found["kernel"]) < 10


# --- What we write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(tmp_path, name, dtype):
    checkpoint = random_checkpoint(dtype=dtype, **VARIANTS[name])
    t5x.write(checkpoint, tmp_path)
    found = t5x.read(str(tmp_path), DISTANCE)
    assert same_tensors(found, checkpoint) and found.config == checkpoint.config


def test_chunks_of_several_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "CHUNK_BYTES", 200)
    checkpoint = random_checkpoint()
    t5x.write(checkpoint, tmp_path)
    assert len(list((tmp_path / "target.token_embedder.embedding").glob("*.0"))) == 14
    assert same_tensors(t5x.read(str(tmp_path), DISTANCE), checkpoint)


def test_zeros_are_data(tmp_path):
    checkpoint = random_checkpoint()
    zeros = Tensor.of(np.zeros(checkpoint.tensors[KERNEL].shape, np.float32), KERNEL)
    changed = dict(checkpoint.tensors) | {KERNEL: zeros}
    t5x.write(t5x.Checkpoint("x", "t5", checkpoint.config, changed), tmp_path)
    assert same_tensors(t5x.read_weights(tmp_path), changed)


@pytest.mark.parametrize("compressor", [{"id": "zstd", "level": 3}, {"id": "gzip"}, None])
@pytest.mark.parametrize("fill", [None, 0.0])
def test_other_writers_arrays(written, compressor, fill):
    folder, checkpoint = written
    array = np.zeros((24, 16), np.float32)
    array[:5] = checkpoint.tensors[KERNEL].load()[:5]
    shutil.rmtree(kernel_folder(folder))
    metadata = {"chunks": [7, 5], "compressor": compressor, "dtype": "<f4", "shape": [24, 16]}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{kernel_folder(folder)}/"},
        "metadata": metadata | {"fill_value": fill},
    }
    ts.open(spec, create=True).result().write(array).result()
    np.testing.assert_array_equal(t5x.read_weights(folder)[KERNEL].load(), array)


@pytest.mark.parametrize("layout", ["placeholder", "gfile", "absolute"])
@pytest.mark.parametrize("keys", [("optimizer", "target"), ("_optimizer", "target"), ("target",)])
def test_other_writers_indices(written, layout, keys):
    folder, checkpoint = written

    def change(index):
        tree = index.pop("optimizer")["target"]
        leaf = tree["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        name = leaf["kvstore"]["path"]
        if layout == "placeholder":
            tree["encoder"]["layers_0"]["mlp"]["wo"]["kernel"] = f"PLACEHOLDER://{name}"
        elif layout == "gfile":
            leaf["kvstore"] = {"driver": "gfile", "path": f"{name}/"}
        else:
            leaf["kvstore"] = {"driver": "gcs", "bucket": "b", "path": f"/far/away/{name}"}
        place = index
        for key in keys[:-1]:
            place = place.setdefault(key, {"state": {"param_states": "PLACEHOLDER://none"}})
        place[keys[-1]] = tree

    edit_index(folder, change)
    assert same_tensors(t5x.read(str(folder), DISTANCE), checkpoint)


def test_optimizer_state_is_ignored(written):
    folder, checkpoint = written
    state = {"m": {"driver": "zarr", "kvstore": {"path": "state.lost"}}, "x": [1, "a"]}
    edit_index(folder, lambda index: index["optimizer"].update(state=state))
    assert same_tensors(t5x.read(str(folder), DISTANCE), checkpoint)


def test_arrays_that_flax_cut_in_pieces(written):
    folder, checkpoint = written
    array = checkpoint.tensors[KERNEL].load()

    def change(index):
        pieces = np.array_split(array.reshape(-1), 3)
        index["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"] = {
            "__msgpack_chunked_array__": True,
            "shape": {"0": 24, "1": 16},
            "chunks": {str(i): t5x._packed(piece) for i, piece in enumerate(pieces)},
        }

    edit_index(folder, change)
    assert same_tensors(t5x.read(str(folder), DISTANCE), checkpoint)


def test_distances(written, tmp_path):
    folder, checkpoint = written
    gin = "import t5x\nrelative_position_biases.RelativePositionBiases.max_distance = 20\n"
    (tmp_path / "config.gin").write_text(gin)
    assert t5x.read(str(folder)).config == checkpoint.config
    published = random_checkpoint(relative_num_buckets=32)
    (tmp_path / "b").mkdir()
    (tmp_path / "config.gin").unlink()
    t5x.write(published, tmp_path / "b")
    assert t5x.read(str(tmp_path / "b")).config.relative_max_distance == 128


# --- Bad input


def drop(*keys):
    def change(index):
        tree = index["optimizer"]["target"]
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("encoder", "layers_1", "mlp"), r"no tensor: encoder/layers_1/mlp/wi_0/kernel, "),
        (drop("token_embedder"), r"is no T5: it has no matrix 'token_embedder/embedding'.\n"),
        (lambda index: index.update(version=4), "of version 4"),
        (lambda index: index["optimizer"]["target"].update(more=t5x._packed(np.ones(3))), "more"),
        (lambda index: index["optimizer"]["target"].update(more=7), "'more' in .* is neither"),
        (lambda index: index["optimizer"]["target"].update(x={"driver": "n5"}), "way .*'n5'"),
        (lambda index: index.pop("optimizer"), "holds no parameters .* it has version"),
    ],
)
def test_an_index_that_does_not_fit(written, change, message):
    folder, _ = written
    edit_index(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        t5x.read(str(folder), DISTANCE)
    assert str(folder) in str(caught.value)


def test_a_wrong_shape(written):
    folder, checkpoint = written
    wrong = dict(checkpoint.tensors) | {KERNEL: Tensor.of(np.zeros((24, 17), np.float32), KERNEL)}
    shutil.rmtree(folder)
    folder.mkdir()
    t5x.write(t5x.Checkpoint("x", "t5", checkpoint.config, wrong), folder)
    with pytest.raises(UserError, match=rf"{KERNEL}' in .* has shape \(24, 17\)"):
        t5x.read(str(folder), DISTANCE)


def test_a_shape_that_the_index_tells_otherwise(written):
    folder, _ = written

    def change(index):
        leaf = index["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        leaf["metadata"]["shape"] = [24, 15]

    edit_index(folder, change)
    with pytest.raises(UserError, match=r"\(24, 15\) in the index, \(24, 16\) in its .zarray"):
        t5x.read(str(folder), DISTANCE)


def test_a_lost_array(written):
    folder, _ = written
    shutil.rmtree(kernel_folder(folder))
    with pytest.raises(UserError, match=rf"'{KERNEL}' in .* should be in .*missing"):
        t5x.read(str(folder), DISTANCE)


def test_a_lost_chunk_is_no_zeros(written):
    folder, _ = written
    (kernel_folder(folder) / "0.0").unlink()
    with pytest.raises(UserError, match=rf"0.0' is missing, a chunk of '{KERNEL}'"):
        t5x.read(str(folder), DISTANCE).load()


@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_truncated_chunk(written, share):
    folder, _ = written
    truncate(kernel_folder(folder) / "0.0", share)
    with pytest.raises(UserError, match=rf"0.0' is broken or truncated, a chunk of '{KERNEL}'"):
        t5x.read(str(folder), DISTANCE).load()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_index(written, share):
    folder, _ = written
    truncate(folder / "checkpoint", share)
    with pytest.raises(UserError, match=r"checkpoint' is no t5x index or is truncated"):
        t5x.read(str(folder), DISTANCE)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is no t5x checkpoint"):
        t5x.read(str(tmp_path))


def test_index_types_of_flax():
    array = np.arange(6).reshape(2, 3).astype(jnp.bfloat16)
    packed = t5x._packed(array)
    np.testing.assert_array_equal(t5x._unpacked(packed.code, packed.data), array)
    assert t5x._unpacked(2, msgpack.packb((1.0, 2.0))) == 1 + 2j
