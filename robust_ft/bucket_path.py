"""The path of something in a bucket; imported only where there is one."""

from collections.abc import Generator
from pathlib import PosixPath
from typing import Any

from etils import epath
from etils.epath import backend, gpath


@epath.register_path_cls(("gs://", "s3://"))  # so Orbax, which makes paths by epath, has these too
class BucketPath(gpath.PosixGPath, PosixPath):  # type: ignore[misc]
    """A path of etils.epath that is a `pathlib.Path`, and never asks tensorflow.

    A folder is there as far as something is in it: none is made, and a missing one is empty.
    """

    @property
    def _backend(self) -> Any:
        return backend.fsspec_backend

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def is_file(self) -> bool:
        """Returns whether it is an object."""
        return self.exists() and not self.is_dir()

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing."""

    def iterdir(self) -> Generator["BucketPath", None, None]:
        try:
            # A folder that was made by hand lists itself.
            names = [path for path in super().iterdir() if path.name and path != self]
        except FileNotFoundError:
            return
        yield from names
