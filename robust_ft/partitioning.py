"""Where arrays live: logical axis names, rules that map them to mesh axes, and the mesh.

Parameters and activations name their axes logically ("batch", "embed", "mlp", ...). Rules say which
mesh axis holds which logical axis; models never mention devices.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robust_ft import multihost
from robust_ft.errors import UserError, nearest
from robust_ft.types import Batch

# From the slowest network to the fastest: devices of one "model" axis talk most.
MESH_AXES = ("data", "fsdp", "sequence", "model")

LogicalAxes = tuple[str | None, ...]
Place = str | tuple[str, ...] | None
Rules = tuple[tuple[str, Place], ...]

# Every logical axis that models use. "embed" is the axis of parameters that full sharding (ZeRO-3)
# splits; activations call theirs "activation_embed" because it must not be split with the
# parameters'. Where two axes of an array are placed on one mesh axis, the earlier rule has it.
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

# JAX's own kind of context: what is traced under other rules is another program.
_active_rules = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh over all devices and the rules that place logical axes on it.

    Devices that no field asks for form the "data" axis: each has whole parameters and a part of the
    batch.

    Attributes:
        model_parallel: Devices on the "model" axis, which split a model's heads, MLP and vocabulary
            (tensor parallelism).
        sequence_parallel: Devices on the "sequence" axis, which split activations along the length.
        fully_sharded: Devices on the "fsdp" axis, which split batches and parameters and gather a
            layer's parameters when it computes (ZeRO-3); -1 is all that the other axes leave.
        slices: Groups of devices with a fast network inside and a slow one between. They split the
            "data" axis: nothing but sums of gradients crosses the slow network.
        rules: Pairs of (logical axis, mesh axis, several, or None) that replace those in
            STANDARD_RULES; of two for one logical axis, the first counts.
    """

    model_parallel: int = 1
    sequence_parallel: int = 1
    fully_sharded: int = 1
    slices: int = 1
    rules: Rules = ()
    _devices: tuple[Any, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # gin gives lists.
        rules = tuple((axis, _frozen(place)) for axis, place in self.rules)
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
        for field in ("model_parallel", "sequence_parallel", "fully_sharded", "slices"):
            value = getattr(self, field)
            if value < 1 and (field, value) != ("fully_sharded", -1):
                raise UserError(f"Partitioner.{field}={value} must be at least 1.")

    def on(self, devices: Sequence[Any]) -> "Partitioner":
        """Returns the same over these devices instead of all that there are."""
        other = dataclasses.replace(self)
        object.__setattr__(other, "_devices", tuple(devices))
        return other

    @functools.cached_property
    def mesh(self) -> Mesh:
        devices = self._devices or tuple(jax.devices())
        shape = self._mesh_shape(len(devices))
        share = len(devices) // self.slices
        inner = (shape[0] // self.slices, *shape[1:])
        groups = sorted(devices, key=lambda device: getattr(device, "slice_index", 0) or 0)
        meshes = [
            # Split axes: a v5e has two, a mesh up to four.
            mesh_utils.create_device_mesh(
                inner, groups[i : i + share], allow_split_physical_axes=True
            )
            for i in range(0, len(devices), share)
        ]
        # Explicit axes, jax.make_mesh's default, would refuse sharding constraints.
        return Mesh(np.concatenate(meshes), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def _mesh_shape(self, devices: int) -> tuple[int, int, int, int]:
        asked = {
            "slices": self.slices,
            "model_parallel": self.model_parallel,
            "sequence_parallel": self.sequence_parallel,
            "fully_sharded": max(self.fully_sharded, 1),
        }
        left = devices
        for field, size in asked.items():
            if left % size:
                taken = "" if left == devices else f" that are left of {devices}"
                raise UserError(
                    f"Partitioner.{field}={size} does not divide the {left} devices{taken}; "
                    f"choose one of {_divisors(left)}."
                )
            left //= size
        if self.fully_sharded == -1:
            return self.slices, left, self.sequence_parallel, self.model_parallel
        data = self.slices * left
        return data, asked["fully_sharded"], self.sequence_parallel, self.model_parallel

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes the mesh and the rules the ones that models traced inside see."""
        with _active_rules(self._rules), jax.set_mesh(self.mesh):
            yield

    def spec(self, axes: LogicalAxes | None) -> PartitionSpec:
        """Returns where an array with these logical axes lives; None is replicated."""
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
        """Into how many parts devices split a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self._batch_axes)

    def data_shard(self) -> tuple[int, int]:
        """Returns (index, count) of the part of each batch that this process has to load.

        It comes from the mesh and not from the process index: processes that share one slice of
        a batch (a model-parallel group across hosts) must read the same examples.
        """
        first = [MESH_AXES.index(axis) for axis in self._batch_axes]
        rest = [axis for axis in range(len(MESH_AXES)) if axis not in first]
        rows = self.mesh.devices.transpose(*first, *rest).reshape(self.batch_shards, -1)
        owners = [tuple(sorted({device.process_index for device in row})) for row in rows]
        groups = list(dict.fromkeys(owners))
        mine = [i for i, group in enumerate(groups) if jax.process_index() in group]
        if len(mine) != 1 or len({owners.count(group) for group in groups}) > 1:
            raise UserError(
                f"Partitioner.model_parallel={self.model_parallel} splits processes unevenly; "
                "choose a divisor or a multiple of a process's number of devices."
            )
        return mine[0], len(groups)

    def put_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Places this process's rows of a batch on the devices that split it."""
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.batch_sharding, rows), batch
        )

    def share_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Places a whole batch, the same on all processes, of which each keeps its rows."""
        return {name: multihost.put(rows, self.batch_sharding) for name, rows in batch.items()}

    def check_batch(self, batch_size: int, whose: str, parts: int = 1) -> None:
        """Raises a UserError unless a batch, cut into so many parts, divides over the devices."""
        shards = self.batch_shards
        if batch_size % (shards * parts):
            cut = f" in {parts} microbatches" if parts > 1 else ""
            raise UserError(
                f"batch_size={batch_size} of {whose}{cut} does not divide over the {shards} "
                f"devices that split batches; choose a multiple of {shards * parts}."
            )

    def check_sizes(self, name: str, axes: LogicalAxes, sizes: Sequence[int]) -> None:
        """Raises a UserError unless the mesh divides the sizes of an array with these axes."""
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
        # Replaced where they stand, so that who has a mesh axis first stays.
        return tuple((dict(STANDARD_RULES) | dict(reversed(self.rules))).items())

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return _mesh_axes(dict(self._rules)["batch"])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the active rules' placement; without active rules, does nothing."""
    rules: Rules | None = _active_rules.value
    if rules is None:
        return x
    return jax.lax.with_sharding_constraint(x, _to_spec(axes, rules))


def locally(function: Callable[..., jax.Array], *axes: LogicalAxes) -> Callable[..., jax.Array]:
    """Returns a function that each device applies to its own parts of arrays.

    It is for what the compiler would gather whole arrays for. Without active rules, on one device,
    or where devices would have unequal parts, it is the function itself.

    Args:
        function: From arrays to one that is placed like the first of them.
        axes: Each array's logical axes.
    """
    rules: Rules | None = _active_rules.value
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.size == 1:
        return function

    def apply(*arrays: jax.Array) -> jax.Array:
        sizes = [size for array in arrays for size in array.shape]
        parts = [count for each in axes for count in shards(*each)]
        if any(size % count for size, count in zip(sizes, parts, strict=True)):
            return function(*arrays)
        specs = tuple(_to_spec(each, rules) for each in axes)
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

    return apply


def shards(*axes: str | None) -> tuple[int, ...]:
    """Returns into how many parts each axis of an activation with these axes is split.

    Without active rules nothing is.
    """
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
    # A mesh axis can split one dimension of an array only.
    free = list(MESH_AXES)
    placed: list[Place] = [None] * len(axes)
    order = {axis: i for i, axis in enumerate(known)}
    named = [(order[axis], i, known[axis]) for i, axis in enumerate(axes) if axis is not None]
    for _, i, place in sorted(named, key=lambda each: each[:2]):
        mine = tuple(axis for axis in _mesh_axes(place) if axis in free)
        free = [axis for axis in free if axis not in mine]
        placed[i] = mine[0] if len(mine) == 1 else mine or None
    return PartitionSpec(*placed)


def _mesh_axes(place: Place) -> tuple[str, ...]:
    if place is None:
        return ()
    return (place,) if isinstance(place, str) else place


def _frozen(place: Any) -> Place:
    return tuple(place) if isinstance(place, list) else place


def _is_axes(x: Any) -> bool:
    # Exactly tuple: optimizer states are named tuples, whose fields can all be None.
    return x is None or (type(x) is tuple and all(a is None or isinstance(a, str) for a in x))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if math.gcd(d, n) == d]
