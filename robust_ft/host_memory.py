"""How a process on CPUs gets its memory.

A step on CPUs asks for the same temporary memory as the one before, in one large block, which the C
library has given back to the system when that ended. So each step gets new pages, which the system
fills with zeros as they are touched: a tenth of a training step of T5 small or more
(benchmarks/train_step.py). Light to import, and no importer of JAX.
"""

import glob
import os
import sys
from collections.abc import Mapping

_VARIABLE = "GLIBC_TUNABLES"
# glibc keeps large blocks only in the first arena, only if it does not map them one by one, and
# only if it never gives its free end back. Its cache of small blocks takes the rests at the edges
# of large ones; these then could not be used for as large a block again, and memory would grow.
_KEEP = {
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.tcache_count": 0,
}
# TPUs, GPUs of NVIDIA and AMD, and any GPU in WSL.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def keep_freed() -> None:
    """Starts the program anew, as the same process that keeps memory which it frees for later.

    The C library reads its settings only when a process starts, so this belongs before everything
    else that a command line does. Returns where nothing is to be gained: where there is a GPU or a
    TPU (unless JAX_PLATFORMS is "cpu"), where it is already done, and elsewhere than on Linux.
    """
    changes = keeping(os.environ)
    if changes and sys.platform.startswith("linux") and _on_cpu():
        sys.stdout.flush()
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **changes})


def keeping(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what is to be changed in an environment so that freed memory is kept.

    Nothing if it has settings of glibc's malloc already.
    """
    given = environment.get(_VARIABLE, "")
    if "glibc.malloc." in given:
        return {}
    settings = [f"{name}={value}" for name, value in _KEEP.items()]
    return {_VARIABLE: ":".join([*filter(None, [given]), *settings])}


def _on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(glob.glob, _ACCELERATORS))
