"""What Orbax needs for checkpoints in buckets.

Orbax writes to folders and to gs://, and takes s3:// for a folder, although TensorStore, through
which it writes, knows s3://. An object cannot be renamed, so a checkpoint in a bucket is complete
when Orbax has put a file into it that says so.
"""

import functools
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from robust_ft import buckets

_COMPLETE = "commit_success.txt"


def temporary_path_class(directory: str | os.PathLike[str]) -> Any:
    """Returns how Orbax completes a checkpoint: in buckets by a file, else by its default."""
    in_bucket = buckets.is_bucket(directory)
    return ocp.path.atomicity.CommitFileTemporaryPath if in_bucket else None


def is_complete(checkpoint: Path) -> bool:
    """Returns whether all of a checkpoint is there; a folder gets its name when it is complete."""
    return not buckets.is_bucket(checkpoint) or (checkpoint / _COMPLETE).exists()


def prepared(path: Path) -> Path:
    """Returns the path of a checkpoint, once Orbax can open what is there."""
    if str(path).startswith("s3://"):
        _teach_s3()
    return path


@functools.cache
def _teach_s3() -> None:
    """Lets Orbax make specs for s3:// as it does for gs://."""
    build = tensorstore_utils.build_kvstore_tspec

    def build_for_any(directory: str, *args: Any, **settings: Any) -> Any:
        # Orbax normalizes paths, and may have one slash left.
        scheme, separator, rest = directory.partition(":/")
        if scheme != "s3" or not separator:
            return build(directory, *args, **settings)
        return _as_s3(build(f"gs://{rest.lstrip('/')}", *args, **settings))

    tensorstore_utils.build_kvstore_tspec = build_for_any


def _as_s3(spec: Any) -> Any:
    """Returns TensorStore's spec of something in s3:// for that of the same in gs://."""
    if not isinstance(spec, dict):
        return spec
    if not str(spec.get("driver")).startswith("gcs"):
        return {name: _as_s3(value) for name, value in spec.items()}
    s3 = {"driver": "s3", "bucket": spec["bucket"], "path": spec["path"]}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {**s3, "endpoint": endpoint} if endpoint else s3
