"""What JAX is told about compiling, by command lines and by `robust_ft.run`."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_cache() -> None:
    """Keeps compiled programs on disk, so that only a first run waits for the compiler.

    They go to the folder that JAX is set to use (JAX_COMPILATION_CACHE_DIR), else to
    ~/.cache/robust_ft/xla.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/robust_ft/xla"))
        # With the first program that it compiles, JAX settles whether it has a cache.
        compilation_cache.reset_cache()
    seconds = min(jax.config.values["jax_persistent_cache_min_compile_time_secs"], 0.3)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def use_effort(effort: float) -> None:
    """Sets how much the compiler does for each program that it compiles from now on.

    Args:
        effort: `Recipe.compile_effort`, from -1 to 1.
    """
    jax.config.update("jax_exec_time_optimization_effort", effort)
