import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from robust_ft.errors import UserError
from robust_ft.partitioning import STANDARD_RULES, Partitioner, constrain

HERE = Path(__file__).parent


# --- Training on meshes


def train_on(data, model_parallel, folder):
    """Returns losses and parameters of `sharded_training` on a mesh of CPU devices."""
    output = folder / f"{data}x{model_parallel}.npz"
    flags = f"--xla_force_host_platform_device_count={data * model_parallel}"
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(paths),
    }
    command = [sys.executable, HERE / "sharded_training.py", output, data, model_parallel]
    process = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    with np.load(output) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return train_on(1, 1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(("data", "model_parallel"), [(8, 1), (4, 2)])
def test_meshes_train_as_one_device_does(data, model_parallel, on_one_device, tmp_path):
    actual = train_on(data, model_parallel, tmp_path)
    assert actual.keys() == on_one_device.keys()
    losses = [name for name in actual if name.endswith("/loss")]
    assert len(losses) == 4
    for name in losses:
        assert on_one_device[name][-1] < on_one_device[name][0] or "prompt" in name
    for name, expected in on_one_device.items():
        np.testing.assert_allclose(actual[name], expected, rtol=0, atol=1e-5, err_msg=name)


# --- The mesh, without devices


def test_mesh_has_auto_axes_over_all_devices():
    partitioner = Partitioner()
    assert partitioner.mesh.axis_names == ("data", "model")
    assert set(partitioner.mesh.axis_types) == {AxisType.Auto}
    assert partitioner.mesh.size == jax.device_count()
    assert partitioner.mesh is partitioner.mesh


@pytest.mark.parametrize("model_parallel", [0, -1, -8, 3, 16])
def test_model_parallel_has_to_divide_the_devices(model_parallel):
    with (
        mock.patch.object(jax, "device_count", return_value=8),
        pytest.raises(UserError, match=rf"model_parallel={model_parallel} .*\[1, 2, 4, 8\]"),
    ):
        _ = Partitioner(model_parallel).mesh


class FakePartitioner(Partitioner):
    """A mesh of devices that are only known by their process."""

    @classmethod
    def on(cls, processes):
        partitioner = cls()
        make = np.vectorize(lambda index: types.SimpleNamespace(process_index=index), otypes="O")
        devices = make(np.array(processes))
        shape = dict(zip(("data", "model"), devices.shape, strict=True))
        mesh = types.SimpleNamespace(devices=devices, shape=shape)
        partitioner.__dict__["mesh"] = mesh
        return partitioner


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        # one process
        ([[0, 0], [0, 0]], [(0, 1)]),
        # each process has its own rows, in whatever order
        ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
        ([[1, 1], [1, 1], [0, 0], [0, 0]], [(1, 2), (0, 2)]),
        ([[0], [1], [0], [1]], [(0, 2), (1, 2)]),
        # all processes hold one model together: all of them read everything
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),
        ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),
        # pairs of processes hold a model together: each pair reads the same
        ([[0, 1], [0, 1], [2, 3], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[0, 2], [3, 1]], [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_processes_of_one_model_read_the_same_shard(processes, expected):
    partitioner = FakePartitioner.on(processes)
    for process, shard in enumerate(expected):
        with mock.patch.object(jax, "process_index", return_value=process):
            assert partitioner.data_shard() == shard


@pytest.mark.parametrize(
    "processes",
    [
        [[0, 0], [0, 1], [1, 1]],  # process 0 has a row of its own and a share in another
        [[0], [0], [0], [1]],  # shards of different sizes
    ],
)
def test_rows_that_processes_cannot_share_evenly(processes):
    partitioner = FakePartitioner.on(processes)
    with (
        mock.patch.object(jax, "process_index", return_value=0),
        pytest.raises(UserError, match="model_parallel"),
    ):
        partitioner.data_shard()


def test_batches_have_to_divide_over_the_data_axis():
    partitioner = FakePartitioner.on([[0]] * 4)
    partitioner.check_batch(8, "batch_size")
    for size in (6, 2):
        with pytest.raises(UserError, match=f"eval_size={size} .* 4 devices .* multiple of 4"):
            partitioner.check_batch(size, "eval_size")


# --- Rules


def test_first_rule_counts_and_a_mesh_axis_is_used_once():
    rules = (("embed", "data"), ("embed", "model"), ("mlp", "model"), ("vocab", "model"))
    partitioner = Partitioner(rules=rules)
    assert partitioner.spec(("embed", "mlp")) == PartitionSpec("data", "model")
    assert partitioner.spec(("vocab", "mlp")) == PartitionSpec("model", None)
    assert partitioner.spec((None, "mlp")) == PartitionSpec(None, "model")
    assert partitioner.spec(None) == partitioner.spec(()) == PartitionSpec()


def test_an_axis_without_a_rule():
    with pytest.raises(UserError, match=r"'embd'.*Did you mean 'embed'"):
        Partitioner().spec(("embd",))


def test_a_rule_for_a_mesh_axis_that_is_none():
    with pytest.raises(UserError, match=r"'modle'.*Did you mean 'model'"):
        Partitioner(rules=(("embed", "modle"),))


def test_rules_may_be_lists_as_gin_gives_them():
    rules = [list(rule) for rule in STANDARD_RULES]
    assert Partitioner(rules=rules) == Partitioner()
    assert hash(Partitioner(rules=rules)) == hash(Partitioner())


def test_shardings_keep_a_trees_structure():
    partitioner = Partitioner()
    tree = {"a": ("embed", "mlp"), "b": (None, {"c": ()})}
    shardings = partitioner.shardings(tree)
    assert shardings["a"].spec == PartitionSpec(None, "model")
    assert shardings["b"][0].spec == shardings["b"][1]["c"].spec == PartitionSpec()


def test_constrain_does_nothing_outside_and_checks_names_inside():
    x = np.ones((2, 3), np.float32)
    assert constrain(x, "batch", "no axis") is x
    partitioner = Partitioner()
    with partitioner.activate():
        placed = jax.jit(lambda x: constrain(x, "batch", "length"))(x)
        np.testing.assert_array_equal(placed, x)
        with pytest.raises(UserError, match="'no axis'"):
            jax.eval_shape(lambda x: constrain(x, "batch", "no axis"), x)
    assert constrain(x, "batch", "no axis") is x


def test_put_batch_keeps_values_and_types():
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.ones(2)}
    placed = Partitioner().put_batch(batch)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["tokens"].dtype == np.int32
    assert placed["tokens"].sharding.spec == PartitionSpec("data")
