"""Settings of the compiler, by name; it reads them from the environment when JAX starts.

Light to import, and no importer of JAX. A name that the compiler does not know would end the
process, so each stands here only as long as the pinned release knows it (a test asks it).
"""

import os

from robust_ft.errors import UserError, nearest

# What NVIDIA's and JAX's guides to GPUs advise and the release does not do by itself; it already
# fuses products by Triton, records command buffers and runs collectives beside computation. All of
# these let collectives overlap more: several GPUs gain, and one GPU neither gains nor loses.
PRESETS = {
    "gpu": (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    )
}


def use(preset: str) -> None:
    """Sets XLA_FLAGS, to be called before JAX is used; what it already sets stays as it is.

    Raises:
        UserError: There is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(
            f"--xla_flags={preset} is not one of {', '.join(PRESETS)}; other flags of the compiler "
            "go into the environment variable XLA_FLAGS." + nearest(preset, PRESETS)
        )
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in given}
    added = [flag for flag in PRESETS[preset] if flag.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])
