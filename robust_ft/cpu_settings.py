"""The environment of a process that computes on CPUs. Does not import JAX.

Memory: every step on a CPU allocates its temporary buffer anew, as one large block that the C
library has returned to the system after the step before. The system then zeroes each page as it is
touched, which is a tenth of a training step of T5 small or more (benchmarks/train_step.py). glibc
has settings to keep freed memory.

Compiler: with LLVM's optimization level 1 instead of 3, and with XLA's older emitters of fusions
instead of those that go through MLIR, decoding and training steps of few parameters compile in 60 %
of the time, full finetuning in about the same. The programs run as fast, since most of their time
is in matrix products, which come from a library.
"""

import glob
import os
import sys
from collections.abc import Mapping

from robust_ft import xla_flags

_MALLOC, _COMPILER = "GLIBC_TUNABLES", "XLA_FLAGS"
# glibc keeps large blocks only in the main arena, only if it does not mmap them one by one, and
# only if it never trims the top of the heap. Its cache of small blocks (tcache) would take
# remainders at the edges of freed large blocks; these could then not serve as large a block again,
# and memory would grow.
_KEEP_FREED = {
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.tcache_count": 0,
}
COMPILE_FAST = ("--xla_backend_optimization_level=1", "--xla_cpu_use_fusion_emitters=false")
# TPUs, GPUs of NVIDIA and AMD, and any GPU in WSL.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def use() -> None:
    """Sets what is missing, and on Linux executes the program again in the same process.

    glibc reads its settings only when a process starts, so a command line calls this first. Nothing
    changes where there is a GPU or a TPU, unless JAX_PLATFORMS is "cpu".
    """
    if not _on_cpu():
        return
    changes = missing(os.environ)
    os.environ.update(changes)
    if _MALLOC in changes and sys.platform.startswith("linux"):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


def missing(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables to change; settings that are already there win."""
    malloc, flags = (environment.get(name, "") for name in (_MALLOC, _COMPILER))
    changes = {_COMPILER: xla_flags.merged(flags, COMPILE_FAST)}
    if "glibc.malloc." not in malloc:
        settings = [f"{name}={value}" for name, value in _KEEP_FREED.items()]
        changes[_MALLOC] = ":".join([*filter(None, [malloc]), *settings])
    return {name: value for name, value in changes.items() if value != environment.get(name)}


def _on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(glob.glob, _ACCELERATORS))
