"""Caches of compiled programs and of tokenized examples that only this test session sees."""

import gc
import importlib.util
import os
from pathlib import Path

import jax
import jaxtyping
import pytest

# Shapes and types in annotations are checked where arrays are computed, before that is imported.
# ROBUST_FT_CHECK_ANNOTATIONS=0 leaves it out, for tests of time and memory.
CHECKED = ["objectives", "decoding", "ensembles", "predictor", "train_step", "stage_step"]
CHECKED += ["optim", "trainable", "partitioning", "fingerprint"]
# All of models/ but the configs, whose signatures gin reads.
MODELS = Path(__file__).parent.parent / "robust_ft" / "models"
CHECKED += [f"models.{path.stem}" for path in MODELS.iterdir() if path.stem != "config"]
if os.environ.get("ROBUST_FT_CHECK_ANNOTATIONS", "1") == "1":
    jaxtyping.install_import_hook([f"robust_ft.{name}" for name in CHECKED], "type_checker.check")
    # No dtype and no rank is promoted without being said.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")

from robust_ft import cpu_settings, xla_flags  # noqa: E402

# As the command lines compile on CPUs; read when the first program compiles.
os.environ["XLA_FLAGS"] = xla_flags.merged(
    os.environ.get("XLA_FLAGS", ""), cpu_settings.COMPILE_FAST
)


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden anew instead of comparing with it",
    )


NEEDS = {
    "parity": ("torch", "transformers"),
    "tpu": ("libtpu",),
    "buckets": ("gcsfs", "s3fs", "moto", "gcp_storage_emulator"),
}


def pytest_collection_modifyitems(items):
    """Skips what needs an extra that is not installed."""
    for extra, packages in NEEDS.items():
        missing = [name for name in packages if not importlib.util.find_spec(name)]
        for item in items:
            if missing and item.get_closest_marker(extra):
                item.add_marker(
                    pytest.mark.skip(reason=f"needs {' and '.join(missing)}: [{extra}]")
                )


@pytest.fixture(scope="session", autouse=True)
def session_caches(tmp_path_factory):
    """Sets the environment for this process and the ones it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("caches")
        # Test processes that run side by side compile a program once between them.
        base = tmp_path_factory.getbasetemp()
        compiled = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "xla"
        patch.setenv("ROBUST_FT_CACHE_DIR", str(folder / "data"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        tests = os.path.dirname(__file__)
        paths = [tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file():
    """Frees what a file has compiled, which would add up to gigabytes a process."""
    yield
    jax.clear_caches()
    gc.collect()
