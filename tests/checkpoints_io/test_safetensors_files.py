"""Safetensors files: the bytes of the safetensors package, and every way to be broken."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import same_tensors, truncate
from safetensors.numpy import load_file, save_file

from robust_ft.checkpoints_io import safetensors_files as files
from robust_ft.checkpoints_io import tensors as tensors_lib
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError

ARRAYS = {
    "b/half": np.arange(12).reshape(3, 4).astype(jnp.bfloat16),
    "a": np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7),
    "ü": np.arange(5, dtype=np.int64),
    "flags": np.array([True, False]),
    "small": np.arange(3, dtype=np.float16),
    "bytes": np.arange(3, dtype=np.int8),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def wrapped(arrays):
    return {name: Tensor.of(array, name) for name, array in arrays.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_have_the_packages_bytes(tmp_path, metadata):
    save_file(ARRAYS, tmp_path / "theirs", metadata)
    files.write(tmp_path / "ours", wrapped(ARRAYS), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_round_trip(tmp_path):
    files.write(tmp_path / "x", wrapped(ARRAYS))
    assert same_tensors(files.read(tmp_path / "x"), wrapped(ARRAYS))
    for name, array in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_views_and_casts_are_written_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_lib, "BLOCK_BYTES", 40)
    array = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    tensor = Tensor.of(array, "a").transposed().cast("bfloat16")
    assert len(list(tensor.blocks())) > 3
    files.write(tmp_path / "x", {"a": tensor, "i": Tensor.of(np.arange(3), "i").cast("bfloat16")})
    loaded = load_file(tmp_path / "x")
    np.testing.assert_array_equal(loaded["a"], array.T.astype(jnp.bfloat16))
    assert loaded["i"].dtype == np.int64  # only floats are cast


def test_shards_and_their_index(tmp_path):
    files.write_sharded(tmp_path, wrapped(ARRAYS), None, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("model-0*"))) > 1
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    found = files.read_sharded(tmp_path / "model.safetensors.index.json")
    assert same_tensors(found, wrapped(ARRAYS))


def test_a_missing_shard_is_named_with_its_tensors(tmp_path):
    files.write_sharded(tmp_path, wrapped(ARRAYS), None, shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    lost = json.loads(index.read_text())["weight_map"]["a"]
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d shards .*{lost}\.\n.*Tensors in them: a"):
        files.read_sharded(index)


def test_a_shard_without_its_tensor(tmp_path):
    files.write_sharded(tmp_path, wrapped(ARRAYS), None, shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    shard = tmp_path / json.loads(index.read_text())["weight_map"]["a"]
    files.write(shard, wrapped({"other": ARRAYS["a"]}))
    with pytest.raises(UserError, match=f"{shard.name}' has no tensor 'a'"):
        files.read_sharded(index)


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json' is no index"):
        files.read_sharded(tmp_path / "index.json")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path, share):
    big = {"first": np.zeros(1000, np.float32), "last": np.ones(1000, np.float32)}
    files.write(tmp_path / "x.safetensors", wrapped(big))
    truncate(tmp_path / "x.safetensors", share)
    with pytest.raises(UserError, match=r"x.safetensors' is (truncated.*|no readable)"):
        files.read(tmp_path / "x.safetensors")


def test_a_truncated_file_names_the_tensor(tmp_path):
    big = {"first": np.zeros(1000, np.float32), "last": np.ones(1000, np.float32)}
    files.write(tmp_path / "x", wrapped(big))
    truncate(tmp_path / "x", 0.9)
    with pytest.raises(UserError, match=r"truncated.*tensor 'last'"):
        files.read(tmp_path / "x")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not fit its shape"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "has the type F4"),
        ({"dtype": "F32", "shape": [2]}, "no readable entry"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "does not fit"),
        ([], "no readable entry"),
    ],
)
def test_a_broken_header(tmp_path, entry, message):
    text = json.dumps({"name": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(UserError, match=f"'name' in .*{message}"):
        files.read(tmp_path / "x")


def test_more_bytes_than_the_header_says(tmp_path):
    files.write(tmp_path / "x", wrapped(ARRAYS))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes() + b"more")
    with pytest.raises(UserError, match=r"its header says"):
        files.read(tmp_path / "x")


def test_a_type_that_files_cannot_hold(tmp_path):
    with pytest.raises(UserError, match=r"complex64, which safetensors cannot hold"):
        files.write(tmp_path / "x", wrapped({"a": np.zeros(2, np.complex64)}))
