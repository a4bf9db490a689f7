"""Settings of the compiler, by name; it reads them from the environment when JAX starts.

Light to import, and no importer of JAX. A name that the compiler does not know would end the
process, so each stands here only as long as the pinned release knows it (a test asks it).
"""

import os
from collections.abc import Sequence

from robust_ft.errors import UserError, nearest

# What NVIDIA's and JAX's guides to GPUs advise and the release does not do by itself; it already
# fuses products by Triton, records command buffers and runs collectives beside computation. All of
# these let collectives overlap more: several GPUs gain, and one GPU neither gains nor loses.
_GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
)
# Products of parameters that are gathered while they multiply would have buffers from the start to
# the end of a step. No product is as large as this, so parameters are gathered before.
_TPU = ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

# By name: the variable that the compiler reads, and flags.
PRESETS = {"gpu": ("XLA_FLAGS", _GPU), "tpu": ("LIBTPU_INIT_ARGS", _TPU)}


def use(preset: str) -> None:
    """Adds flags to their variable, to be called before JAX is used; what is set there wins.

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
    """Returns the given flags and behind them those of ours whose names are not among them."""
    names = {flag.split("=")[0] for flag in given.split()}
    return " ".join([*given.split(), *(flag for flag in flags if flag.split("=")[0] not in names)])
