import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from robust_ft.errors import UserError
from robust_ft.partitioning import MESH_AXES, Partitioner, constrain

# --- The mesh, without devices


def test_mesh_has_auto_axes_over_all_devices():
    partitioner = Partitioner()
    assert partitioner.mesh.axis_names == ("data", "fsdp", "sequence", "model")
    assert set(partitioner.mesh.axis_types) == {AxisType.Auto}
    assert partitioner.mesh.size == jax.device_count()
    assert partitioner.mesh is partitioner.mesh


class FakeDevice(types.SimpleNamespace):
    """A device that is only known by its numbers."""

    def __hash__(self):
        return id(self)


def devices(count, slices=1):
    return [
        FakeDevice(
            id=i,
            platform="cpu",
            device_kind="cpu",
            process_index=0,
            **({"slice_index": i * slices // count} if slices > 1 else {}),
        )
        for i in range(count)
    ]


def shape_of(count, **fields):
    return tuple(Partitioner(**fields).on(devices(count)).mesh.shape.values())


def test_devices_that_no_field_asks_for_split_the_batch():
    assert shape_of(8) == (8, 1, 1, 1)
    assert shape_of(8, model_parallel=2) == (4, 1, 1, 2)
    assert shape_of(8, model_parallel=2, sequence_parallel=2) == (2, 1, 2, 2)
    assert shape_of(8, fully_sharded=4) == (2, 4, 1, 1)
    assert shape_of(8, fully_sharded=-1) == (1, 8, 1, 1)
    assert shape_of(8, fully_sharded=-1, model_parallel=2) == (1, 4, 1, 2)
    assert shape_of(8, fully_sharded=-1, slices=2) == (2, 4, 1, 1)
    assert shape_of(16, fully_sharded=2, slices=4) == (8, 2, 1, 1)


def test_slices_split_the_data_axis_alone():
    # In an order that does not keep slices together.
    mixed = sorted(devices(8, slices=2), key=lambda device: device.id % 4)
    mesh = Partitioner(slices=2, model_parallel=2).on(mixed).mesh
    assert mesh.devices.shape == (4, 1, 1, 2)
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_parallel": 3}, r"model_parallel=3 does not divide the 8 .*\[1, 2, 4, 8\]"),
        ({"model_parallel": 16}, r"model_parallel=16 does not divide the 8 .*\[1, 2, 4, 8\]"),
        (
            {"model_parallel": 4, "fully_sharded": 4},
            r"fully_sharded=4 does not divide the 2 devices that are left of 8; .*\[1, 2\]",
        ),
        ({"slices": 3}, "slices=3 does not divide the 8"),
        ({"sequence_parallel": 5}, "sequence_parallel=5 does not divide the 8"),
        ({"model_parallel": 0}, "model_parallel=0 must be at least 1"),
        ({"model_parallel": -1}, "model_parallel=-1 must be at least 1"),
        ({"fully_sharded": -2}, "fully_sharded=-2 must be at least 1"),
    ],
)
def test_meshes_that_do_not_divide_the_devices(fields, message):
    with pytest.raises(UserError, match=message):
        _ = Partitioner(**fields).on(devices(8)).mesh


def on_processes(processes, **fields):
    """Returns a partitioner over devices that are known by their process, data by model."""
    numbers = np.array(processes)
    owners = [FakeDevice(process_index=int(index)) for index in numbers.flat]
    placed = np.array(owners, "O").reshape(len(numbers), 1, 1, -1)
    partitioner = Partitioner(**fields)
    shape = dict(zip(MESH_AXES, placed.shape, strict=True))
    partitioner.__dict__["mesh"] = types.SimpleNamespace(devices=placed, shape=shape)
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
    partitioner = on_processes(processes)
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
    partitioner = on_processes(processes)
    with (
        mock.patch.object(jax, "process_index", return_value=0),
        pytest.raises(UserError, match="model_parallel"),
    ):
        partitioner.data_shard()


def test_processes_that_share_parameters_read_their_own_shards():
    devices = [FakeDevice(process_index=i // 2) for i in range(8)]
    partitioner = Partitioner(fully_sharded=2)
    placed = np.array(devices, "O").reshape(4, 2, 1, 1)
    shape = dict(zip(MESH_AXES, placed.shape, strict=True))
    partitioner.__dict__["mesh"] = types.SimpleNamespace(devices=placed, shape=shape)
    for process in range(4):
        with mock.patch.object(jax, "process_index", return_value=process):
            assert partitioner.data_shard() == (process, 4)


def test_batches_have_to_divide_over_the_devices_that_split_them():
    partitioner = Partitioner(fully_sharded=2, model_parallel=2).on(devices(8))
    partitioner.check_batch("Stage.batch_size", 8, "stage")
    partitioner.check_batch("Stage.batch_size", 8, "stage", microbatches=2)
    for size in (6, 2):
        with pytest.raises(
            UserError, match=f"batch_size={size} of stage .* 4 devices .* multiple of 4"
        ):
            partitioner.check_batch("Stage.batch_size", size, "stage")
    with pytest.raises(UserError, match=r"size=12 of stage in 2 microbatches .* multiple of 8"):
        partitioner.check_batch("Stage.batch_size", 12, "stage", microbatches=2)


def test_sizes_have_to_divide_over_the_devices_that_split_them():
    partitioner = Partitioner(fully_sharded=2, model_parallel=4).on(devices(8))
    partitioner.check_sizes("kernel", ("embed", "mlp"), (6, 8))
    partitioner.check_sizes("kernel", (None, "kv"), (7, 7))
    with pytest.raises(UserError, match=r"num_heads: 6 heads .* 4 devices .* 'model'; .*2, 3, 6"):
        partitioner.check_sizes("T5Config.num_heads", ("heads",), (6,))
    whole = Partitioner(model_parallel=4, rules=(("vocab", None),)).on(devices(8))
    whole.check_sizes("embedding", ("vocab", "embed"), (50257, 768))


# --- Rules


def test_first_rule_counts_and_a_mesh_axis_is_used_once():
    partitioner = Partitioner(rules=(("embed", "data"), ("embed", "model"), ("kv", "model")))
    assert partitioner.spec(("embed", "mlp")) == PartitionSpec("data", "model")
    # Rules that are given stand where those did that they replace: "vocab" comes before "mlp".
    assert partitioner.spec(("mlp", "vocab")) == PartitionSpec(None, "model")
    assert partitioner.spec(("kv", "heads")) == PartitionSpec(None, "model")
    assert partitioner.spec((None, "mlp")) == PartitionSpec(None, "model")
    assert partitioner.spec(None) == partitioner.spec(()) == PartitionSpec()


def test_an_axis_can_be_split_by_several_mesh_axes():
    partitioner = Partitioner(rules=(("mlp", ("model", "fsdp")),))
    assert partitioner.spec(("batch",)) == PartitionSpec(("data", "fsdp"))
    assert partitioner.spec(("mlp",)) == PartitionSpec(("model", "fsdp"))
    # "mlp" has the earlier rule, but "batch" an earlier one still.
    assert partitioner.spec(("batch", "mlp")) == PartitionSpec(("data", "fsdp"), "model")


def test_an_axis_without_a_rule():
    with pytest.raises(UserError, match=r"'embd'.*Did you mean 'embed'"):
        Partitioner().spec(("embd",))


def test_a_rule_for_a_mesh_axis_that_is_none():
    with pytest.raises(UserError, match=r"'modle'.*Did you mean 'model'"):
        Partitioner(rules=(("embed", "modle"),))


def test_a_rule_for_a_logical_axis_that_is_none():
    with pytest.raises(UserError, match=r"'hed'.*Did you mean 'heads'"):
        Partitioner(rules=(("hed", "model"),))


def test_rules_may_be_lists_as_gin_gives_them():
    rules = [["batch", ["data", "fsdp"]], ["mlp", None]]
    same = Partitioner(rules=(("batch", ("data", "fsdp")), ("mlp", None)))
    assert Partitioner(rules=rules) == same
    assert hash(Partitioner(rules=rules)) == hash(same)


def test_shardings_keep_a_trees_structure():
    partitioner = Partitioner()
    tree = {"a": ("embed", "mlp"), "b": (None, {"c": ()})}
    shardings = partitioner.shardings(tree)
    assert shardings["a"].spec == PartitionSpec("fsdp", "model")
    assert shardings["b"][0].spec == shardings["b"][1]["c"].spec == PartitionSpec()


def test_constrain_does_nothing_outside_and_checks_names_inside():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "no axis") is x
    partitioner = Partitioner()
    with partitioner.activate():
        placed = jax.jit(lambda x: constrain(x, "batch", "length"))(x)
        np.testing.assert_array_equal(placed, x)
        with pytest.raises(UserError, match="'no axis'"):
            jax.eval_shape(lambda x: constrain(x, "batch", "no axis"), x)
    assert constrain(x, "batch", "no axis") is x


def test_other_rules_on_the_same_mesh_are_another_program():
    inner = jax.jit(lambda x: constrain(x, "batch", "mlp"))
    jitted = jax.jit(jax.checkpoint(inner))
    partitioners = [Partitioner(), Partitioner(rules=(("mlp", None),))]
    assert partitioners[0].mesh == partitioners[1].mesh
    programs = []
    for partitioner in partitioners * 2:
        with partitioner.activate():
            programs.append(str(jitted.trace(np.ones((2, 3), np.float32)).jaxpr))
    split, whole, *again = programs
    assert "spec=P(('data', 'fsdp'), 'model')" in split
    assert "spec=P(('data', 'fsdp'), None)" in whole
    assert again == [split, whole]


def test_put_batch_keeps_values_and_types():
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.ones(2)}
    placed = Partitioner().put_batch(batch)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["tokens"].dtype == np.int32
    assert placed["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"))
