"""Local copies of models and vocabularies in buckets, for what reads files only."""

import functools
import hashlib
import json
import os
from pathlib import Path

from robust_ft import buckets, console
from robust_ft.errors import UserError
from robust_ft.files import replacing

_FOLDER = "~/.cache/robust_ft/buckets"
_GIGABYTE = 1e9


def local(path: str | os.PathLike[str]) -> Path:
    """Returns where a file or folder can be read on this host; other paths than buckets' as given.

    What is in a bucket is copied, once for each content.

    Raises:
        UserError: The bucket cannot be reached, or nothing is there.
    """
    return _copied(os.fspath(path)) if buckets.is_bucket(path) else Path(path)


@functools.cache
def _copied(place: str) -> Path:
    path = buckets.reached(place)
    objects = buckets.listed(path)
    if not objects:
        raise UserError(f"There is nothing at '{path}'.")
    versions = sorted((name, each.version) for name, each in objects.items())
    key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
    copy = Path(_FOLDER).expanduser() / key / path.name  # vocabularies go by their files' names
    if not copy.exists():
        size = sum(each.size for each in objects.values()) / _GIGABYTE
        console.print_line(f"Copying {path} ({len(objects)} objects, {size:.1f} GB) to {copy}.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as temporary:
            buckets.get(path, list(objects), temporary)
    return copy
