"""What a process that computes on CPUs is started with. Light to import, and no importer of JAX.

A step on CPUs asks for the same temporary memory as the one before, in one large block, which the C
library has given back to the system when that ended. So each step gets new pages, which the system
fills with zeros as they are touched: a tenth of a training step of T5 small or more
(benchmarks/train_step.py). The C library has settings to keep it.

Decoding, and steps that train little, compile in six tenths of the time with LLVM's first level of
optimizing instead of its third, and with XLA's older way of writing what lies between products,
which does not go through MLIR; steps that train everything in about the same. They run as fast:
most of their time is in products, which are a library's.
"""

import glob
import os
import sys
from collections.abc import Mapping

from robust_ft import xla_flags

_MALLOC, _COMPILER = "GLIBC_TUNABLES", "XLA_FLAGS"
# glibc keeps large blocks only in the first arena, only if it does not map them one by one, and
# only if it never gives its free end back. Its cache of small blocks takes the rests at the edges
# of large ones; these then could not be used for as large a block again, and memory would grow.
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
    """Sets what is missing, and on Linux starts the program anew, as the same process.

    The C library reads its settings only when a process starts, so this belongs before everything
    else that a command line does. Where there is a GPU or a TPU (unless JAX_PLATFORMS is "cpu"),
    nothing changes.
    """
    if not _on_cpu():
        return
    changes = missing(os.environ)
    os.environ.update(changes)
    if _MALLOC in changes and sys.platform.startswith("linux"):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)


def missing(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that are to be changed; settings that are there already win."""
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
