"""Caches in a bucket: each host works on copies of its own, fetched from there and put there.

ArrayRecord reads files only. A copy is that of the bucket if its `info.json` (a mixture's
`mixture.json`) is; it is put last and removed first, so it never stands beside other examples.
"""

from pathlib import Path

from robust_ft import buckets
from robust_ft.files import replacing

_FOLDER = "~/.cache/robust_ft/caches"
MARKERS = ("info.json", "mixture.json")
# {the folder of all caches on this host: the one in the bucket}
_roots: dict[Path, Path] = {}


def folder_of(root: str) -> Path:
    """Returns the folder on this host for the caches of a folder in a bucket.

    Raises:
        UserError: The bucket cannot be reached.
    """
    buckets.check(root, "The cache ($ROBUST_FT_CACHE_DIR or TaskData.cache_dir)")
    remote = buckets.reached(root)
    folder = Path(_FOLDER).expanduser() / str(remote).replace("://", "-").replace("/", "-")
    _roots[folder] = remote
    return folder


def fetch(cache: Path) -> None:
    """Makes a cache on this host what it is in the bucket, if there is another, whole one."""
    if (there := _in_bucket(cache)) is None:
        return
    objects = buckets.listed(there)
    for marker in set(MARKERS) & objects.keys():
        try:
            content = (there / marker).read_bytes()
            if (cache / marker).exists() and (cache / marker).read_bytes() == content:
                return
            cache.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cache) as temporary:
                buckets.get(there, list(objects), temporary)
                if buckets.listed(there) != objects:
                    raise FileNotFoundError
        except FileNotFoundError:
            return  # another host is about to put its own


def put(cache: Path) -> None:
    """Puts a cache that this host has built into the bucket, in place of one that is there."""
    if (there := _in_bucket(cache)) is None:
        return
    for marker in MARKERS:
        (there / marker).unlink(missing_ok=True)
    buckets.put(cache, there)  # examples.array_record before info.json


def _in_bucket(cache: Path) -> Path | None:
    root = _roots.get(cache.parent)
    return None if root is None else root / cache.name
