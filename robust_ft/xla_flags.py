"""Named presets of compiler flags, which XLA reads from the environment when JAX starts.

Does not import JAX. An unknown flag ends the process, so a test checks each against the pinned
release.
"""

import os
from collections.abc import Sequence

from robust_ft.errors import UserError, nearest

# Advised by NVIDIA's and JAX's guides to GPUs and off by default in the release (Triton fusions,
# command buffers and asynchronous collectives are on). These overlap collectives with more of the
# computation: several GPUs gain, and one GPU neither gains nor loses.
_GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
)
# A windowed einsum gathers parameters while it multiplies, with buffers that live for the whole
# step. No product is as large as this threshold, so parameters are gathered before the product.
_TPU = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

# By name: the variable that the compiler reads, and flags.
PRESETS = {"gpu": ("XLA_FLAGS", _GPU), "tpu": ("LIBTPU_INIT_ARGS", _TPU)}


def use(preset: str) -> None:
    """Adds a preset's flags to their environment variable, before JAX starts.

    Args:
        preset: One of PRESETS; flags that the variable already has win.

    Raises:
        UserError: There is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(
            f"--xla_flags={preset} is not one of {', '.join(PRESETS)}; other flags of the compiler "
            "go into the environment variable XLA_FLAGS." + nearest(preset, PRESETS)
        )
    variable, flags = PRESETS[preset]
    os.environ[variable] = merged(os.environ.get(variable, ""), flags)


def merged(given: str, flags: Sequence[str]) -> str:
    """Returns the given flags, followed by those of `flags` that are not among them by name."""
    names = {flag.split("=")[0] for flag in given.split()}
    return " ".join([*given.split(), *(flag for flag in flags if flag.split("=")[0] not in names)])
