"""TPU slices as the compiler knows them; no TPU is needed.

JAX reads the environment when it is imported, so `prepare` must come before, and this module does
not import JAX.
"""

import importlib.util
import os
from typing import Any, NamedTuple

from robust_ft.errors import UserError, nearest
from robust_ft.xla_flags import PRESETS

GIB = 2**30

# What libtpu needs on a machine without a TPU. It opens no chip, so several processes may load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Large models overflow the compiler's default thread stacks of 64 KB. The other flags are those
    # of runs with --xla_flags=tpu.
    "LIBTPU_INIT_ARGS": " ".join(
        ("--fibers_default_thread_stack_size=4194304", *PRESETS["tpu"][1])
    ),
}


class Chip(NamedTuple):
    """A kind of TPU.

    Attributes:
        hbm: Memory that programs can use, in bytes per chip.
        slices: Shapes of its slices, smallest first.
        config: libtpu's `chip_config_name`: "megacore" where a chip's two cores act as one device.
    """

    hbm: int
    slices: tuple[str, ...]
    config: str = "default"


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(32 * GIB, _DEEP, "megacore"),
    "v5e": Chip(int(15.75 * GIB), _FLAT),
    "v5p": Chip(95 * GIB, _DEEP, "megacore"),
    "v6e": Chip(32 * GIB, _FLAT),
}


class Topology(NamedTuple):
    """One or several slices of TPU chips.

    Attributes:
        name: Such as "v5e:2x4" or "2 slices of v5e:2x4".
        chip: The kind of chip.
        devices: JAX devices to compile for, one per chip.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def prepare() -> None:
    """Sets the environment in which JAX compiles for TPUs on a machine without one.

    Raises:
        UserError: libtpu, the compiler, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Preflight compiles with the package libtpu, which is not installed; run "
            "pip install -c requirements.lock -e '.[tpu]'."
        )
    os.environ.update(ENVIRONMENT)


def larger(name: str) -> tuple[str, ...]:
    """Returns the names of this slice and of the larger ones of its kind, smallest first.

    Args:
        name: A slice ("v5e:2x4"), or a kind of chip ("v5e") for all of its slices.

    Raises:
        UserError: There is no such slice.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name} names no TPU; write one of {', '.join(CHIPS)} and a slice's shape, "
            "as v5e:2x4." + nearest(kind, CHIPS)
        )
    shapes = CHIPS[kind].slices
    if shape and shape not in shapes:
        raise UserError(
            f"--topology={name} is no slice of {kind}; there are {', '.join(shapes)}."
            + nearest(shape, shapes)
        )
    return tuple(f"{kind}:{each}" for each in shapes[shapes.index(shape) if shape else 0 :])


def describe(name: str, slices: int = 1) -> Topology:
    """Returns a topology whose devices can be compiled for, but run nothing.

    Args:
        name: Such as "v5e:2x4".
        slices: Number of such slices, connected by a slower network.

    Raises:
        UserError: There is no such slice.
    """
    kind, _, shape = name.partition(":")
    if not shape or larger(name)[0] != name:
        raise UserError(f"--topology={name} lacks a shape; write one of {', '.join(larger(name))}.")
    from jax.experimental import topologies

    chip = CHIPS[kind]
    options: dict[str, Any] = {"chip_config_name": chip.config, "num_slices": slices}
    if shape == "1x1":  # libtpu otherwise assumes hosts with four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    full_name = name if slices == 1 else f"{slices} slices of {name}"
    return Topology(full_name, chip, tuple(described.devices))
