"""Partitioning: the mesh, logical axis names, and rules that map them to mesh axes.

Parameters and activations name their axes logically ("batch", "embed", "mlp", ...). Rules map each
logical axis to mesh axes, as in t5x; models never mention devices.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robust_ft import multihost
from robust_ft.errors import UserError, nearest
from robust_ft.ranges import Count, Integer, check_ranges
from robust_ft.types import Batch

# From the slowest network to the fastest: devices along "model" communicate most.
MESH_AXES = ("data", "fsdp", "sequence", "model")

# The logical axis of each dimension of an array; None for a dimension that is never split.
LogicalAxes = tuple[str | None, ...]
# The mesh axis or axes that split a logical axis; None for none.
Place = str | tuple[str, ...] | None
Rules = tuple[tuple[str, Place], ...]

# Every logical axis that models use. "embed" is the parameters' axis that full sharding (ZeRO-3)
# splits. Activations call theirs "activation_embed": "fsdp" splits them along the batch already.
# Where two axes of an array map to one mesh axis, the earlier rule gets it.
STANDARD_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
    ("activation_embed", None),
    ("length", "sequence"),
    ("kv", None),
    ("relpos_buckets", None),
    ("prompt", None),
)

# A user context of JAX's: it is part of the key of jit's cache, so that other rules retrace.
_active_rules = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh over all devices and the rules that place logical axes on it.

    The remaining devices form the "data" axis (data parallelism): each has all parameters and a
    shard of the batch.

    Attributes:
        model_parallel: Size of the "model" axis, which shards heads, MLP and vocabulary (tensor
            parallelism).
        sequence_parallel: Size of the "sequence" axis, which shards activations along the length.
        fully_sharded: Size of the "fsdp" axis, which shards batches and parameters, and gathers
            each layer's parameters when it computes (ZeRO-3); -1 for all remaining devices.
        slices: Number of slices, with a fast network inside and a slow one between them. They are
            along the "data" axis, so that only gradient sums cross the slow network.
        rules: Pairs of a logical axis and its mesh axis, a tuple of several, or None. They replace
            those in STANDARD_RULES; of two for one logical axis, the first counts.
    """

    model_parallel: Count = 1
    sequence_parallel: Count = 1
    fully_sharded: Integer = 1
    slices: Count = 1
    rules: Sequence[Sequence[str | Sequence[str] | None]] = ()
    _devices: tuple[Any, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        rules = _frozen(self.rules)
        object.__setattr__(self, "rules", rules)
        known = [axis for axis, _ in STANDARD_RULES]
        for axis, place in rules:
            if axis not in known:
                raise UserError(
                    f"Partitioner.rules places '{axis}', which no model has; logical axes are "
                    f"{', '.join(known)}." + nearest(axis, known)
                )
            for mesh_axis in _mesh_axes(place):
                if mesh_axis not in MESH_AXES:
                    raise UserError(
                        f"Partitioner.rules puts '{axis}' on '{mesh_axis}', but the mesh has the "
                        f"axes {MESH_AXES}." + nearest(mesh_axis, MESH_AXES)
                    )
        check_ranges(self)
        if self.fully_sharded < 1 and self.fully_sharded != -1:
            raise UserError(
                f"Partitioner.fully_sharded={self.fully_sharded} must be at least 1, or -1 for all "
                "remaining devices."
            )

    def on(self, devices: Sequence[Any]) -> "Partitioner":
        """Returns the partitioner over these devices instead of all."""
        other = dataclasses.replace(self)
        object.__setattr__(other, "_devices", tuple(devices))
        return other

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh, with the axes MESH_AXES."""
        devices = self._devices or tuple(jax.devices())
        shape = self._mesh_shape(len(devices))
        slice_size = len(devices) // self.slices
        slice_shape = (shape[0] // self.slices, *shape[1:])
        by_slice = sorted(devices, key=lambda device: getattr(device, "slice_index", 0) or 0)
        meshes = [
            # A physical axis may be split: a v5e's torus has two axes, the mesh up to four.
            mesh_utils.create_device_mesh(
                slice_shape, by_slice[i : i + slice_size], allow_split_physical_axes=True
            )
            for i in range(0, len(devices), slice_size)
        ]
        # Explicit axes, jax.make_mesh's default, would refuse sharding constraints.
        return Mesh(np.concatenate(meshes), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def _mesh_shape(self, devices: int) -> tuple[int, int, int, int]:
        sizes = {
            "slices": self.slices,
            "model_parallel": self.model_parallel,
            "sequence_parallel": self.sequence_parallel,
            "fully_sharded": max(self.fully_sharded, 1),
        }
        remaining = devices
        for field, size in sizes.items():
            if remaining % size:
                of_all = "" if remaining == devices else f" that are left of {devices}"
                raise UserError(
                    f"Partitioner.{field}={size} does not divide the {remaining} devices{of_all}; "
                    f"choose one of {_divisors(remaining)}."
                )
            remaining //= size
        if self.fully_sharded == -1:
            return self.slices, remaining, self.sequence_parallel, self.model_parallel
        data = self.slices * remaining
        return data, sizes["fully_sharded"], self.sequence_parallel, self.model_parallel

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Activates the mesh and the rules for what is traced inside, such as `constrain`."""
        with _active_rules(self._rules), jax.set_mesh(self.mesh):
            yield

    def spec(self, axes: LogicalAxes | None) -> PartitionSpec:
        """Returns the partition spec of an array with these logical axes; None is replicated."""
        return _to_spec(axes or (), self._rules)

    def sharding(self, axes: LogicalAxes | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def shardings(self, axes: Any) -> Any:
        """Maps a tree of logical axes to a tree of shardings of the same structure."""
        return jax.tree.map(self.sharding, axes, is_leaf=_is_axes)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.sharding(("batch",))

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self._batch_axes)

    def data_shard(self) -> tuple[int, int]:
        """Returns (index, count) of the data shard that this process loads.

        It comes from the mesh and not from the process index: processes of one model-parallel group
        must load the same examples.
        """
        batch_axes = [MESH_AXES.index(axis) for axis in self._batch_axes]
        other_axes = [axis for axis in range(len(MESH_AXES)) if axis not in batch_axes]
        devices = self.mesh.devices.transpose(*batch_axes, *other_axes)
        devices = devices.reshape(self.batch_shards, -1)  # [batch shard, device]
        # The processes that need each batch shard, and the groups of processes that share some.
        owners = [tuple(sorted({device.process_index for device in row})) for row in devices]
        groups = list(dict.fromkeys(owners))
        mine = [i for i, group in enumerate(groups) if jax.process_index() in group]
        # A process in two groups, or groups of unequal size, would need parts of others' examples.
        if len(mine) != 1 or len({owners.count(group) for group in groups}) > 1:
            raise UserError(
                f"Partitioner.model_parallel={self.model_parallel} splits processes unevenly; "
                "choose a divisor or a multiple of a process's number of devices."
            )
        return mine[0], len(groups)

    def put_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Places this process's rows of a batch on its devices; returns the global batch."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, rows)
            for name, rows in batch.items()
        }

    def share_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Places a global batch that all processes have; each keeps its shard."""
        return {name: multihost.put(rows, self.batch_sharding) for name, rows in batch.items()}

    def check_batch(self, field: str, batch_size: int, owner: str, microbatches: int = 1) -> None:
        """Raises a UserError unless a batch, or each of its microbatches, shards evenly.

        Args:
            field: What the batch size is called, for the error message.
            batch_size: Number of examples.
            owner: What has the batch size, for the error message.
            microbatches: Number of microbatches.
        """
        shards = self.batch_shards
        if batch_size % (shards * microbatches):
            in_microbatches = f" in {microbatches} microbatches" if microbatches > 1 else ""
            raise UserError(
                f"{field}={batch_size} of {owner}{in_microbatches} does not divide over the "
                f"{shards} devices that split batches; choose a multiple of "
                f"{shards * microbatches}."
            )

    def check_sizes(self, name: str, axes: LogicalAxes, sizes: Sequence[int]) -> None:
        """Raises a UserError unless the mesh divides the shape of an array evenly.

        Args:
            name: The array's name, for the error message.
            axes: Its logical axes.
            sizes: Its shape.
        """
        for axis, size, place in zip(axes, sizes, self.spec(axes), strict=True):
            parts = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in _mesh_axes(place))
            if size % parts:
                raise UserError(
                    f"{name}: {size} {axis} do not divide over the {parts} devices of the mesh "
                    f"axis {place!r}; choose one of {_divisors(size)} devices, or leave the axis "
                    f"whole with Partitioner.rules=[('{axis}', None)]."
                )

    @property
    def _rules(self) -> Rules:
        # A dict keeps the standard order, and with it which rule gets a mesh axis first.
        return tuple((dict(STANDARD_RULES) | dict(reversed(_frozen(self.rules)))).items())

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return _mesh_axes(dict(self._rules)["batch"])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding to the active rules; without any, returns it as it is.

    An axis that its devices cannot share equally is not sharded. Compilers would fill up the last
    shard, and XLA has then added the filling to the gradient of the first row of a table.
    """
    rules: Rules | None = _active_rules.value
    if rules is None:
        return x
    even = [
        None if size % count else axis
        for axis, size, count in zip(axes, x.shape, shards(*axes), strict=True)
    ]
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, _to_spec(even, rules))
    return constrained


def locally(function: Callable[..., jax.Array], *axes: LogicalAxes) -> Callable[..., jax.Array]:
    """Returns a function that each device applies to its own shards of arrays (`jax.shard_map`).

    It is for what the compiler would gather whole arrays for. Without active rules, on one device,
    or where shards would be unequal, it is the function itself.

    Args:
        function: From arrays to one array, sharded like the first of them.
        axes: Each array's logical axes.
    """
    rules: Rules | None = _active_rules.value
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.size == 1:
        return function

    def apply(*arrays: jax.Array) -> jax.Array:
        sizes = [size for array in arrays for size in array.shape]
        counts = [count for array_axes in axes for count in shards(*array_axes)]
        if any(size % count for size, count in zip(sizes, counts, strict=True)):
            return function(*arrays)
        specs = tuple(_to_spec(array_axes, rules) for array_axes in axes)
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return apply


def shards(*axes: str | None) -> tuple[int, ...]:
    """Returns the number of shards along each logical axis; 1 without active rules."""
    rules: Rules | None = _active_rules.value
    if rules is None:
        return (1,) * len(axes)
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(
        math.prod(sizes[axis] for axis in _mesh_axes(place)) for place in _to_spec(axes, rules)
    )


def _to_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    known = dict(rules)
    for axis in axes:
        if axis is not None and axis not in known:
            raise UserError(
                f"No partitioning rule for the logical axis '{axis}'." + nearest(axis, known)
            )
    # A mesh axis can split only one dimension of an array: dimensions take theirs in the rules'
    # order.
    free = list(MESH_AXES)
    spec: list[Place] = [None] * len(axes)
    order = {axis: i for i, axis in enumerate(known)}
    named = [(order[axis], i, known[axis]) for i, axis in enumerate(axes) if axis is not None]
    for _, i, place in sorted(named, key=lambda item: item[:2]):
        taken = tuple(axis for axis in _mesh_axes(place) if axis in free)
        free = [axis for axis in free if axis not in taken]
        spec[i] = taken[0] if len(taken) == 1 else taken or None
    return PartitionSpec(*spec)


def _mesh_axes(place: Place) -> tuple[str, ...]:
    if place is None:
        return ()
    return (place,) if isinstance(place, str) else place


def _frozen(rules: Iterable[Any]) -> Rules:
    # Config files give lists, which are not hashable.
    return tuple(
        (axis, tuple(place) if isinstance(place, list) else place) for axis, place in rules
    )


def _is_axes(x: Any) -> bool:
    # Exactly tuple: optimizer states are named tuples, whose fields can all be None.
    return x is None or (type(x) is tuple and all(a is None or isinstance(a, str) for a in x))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if math.gcd(d, n) == d]
