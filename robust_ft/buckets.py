"""Paths in buckets, `gs://bucket/run` and `s3://bucket/run`, which are used as folders are.

`files.as_path` makes them. A bucket has objects and no folders: an object is there whole as soon as
it has been put, but it cannot grow, and what several objects make up is not there at once. So
what is complete only together has an object that is put last: `outcome.json`, `run.json`, Orbax's
`commit_success.txt`.

Nothing here is imported where all paths are local; tensorflow never is.
"""

import contextlib
import importlib.util
import io
import logging
import os
import pathlib
import re
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from robust_ft.errors import UserError

_ANSWER_SECONDS = 20.0  # how long a bucket may take to answer for the first time
_CREDENTIALS = {
    "gs": "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run 'aws configure', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


class _Storage(NamedTuple):
    """What reads a kind of bucket: a module, and the extra that installs it."""

    module: str
    extra: str


_STORAGES = {"gs": _Storage("gcsfs", "gcs"), "s3": _Storage("s3fs", "s3")}
_answered: set[str] = set()


def split(path: str | os.PathLike[str] | None) -> tuple[str, str] | None:
    """Returns the scheme of a URL and what follows, such as ("gs", "bucket/run"); None of others.

    `pathlib` makes "gs:/bucket/run" of "gs://bucket/run"; both are the same here.
    """
    scheme, separator, rest = os.fspath(path or "").partition(":/")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme):
        return None
    return scheme, rest.lstrip("/")


def is_bucket(path: str | os.PathLike[str] | None) -> bool:
    """Returns whether a path is one in a bucket, or looks like one."""
    return split(path) is not None


def check(path: str | os.PathLike[str] | None, what: str) -> None:
    """Raises a UserError for a URL that is not in a bucket which can be read; asks no network.

    Args:
        path: A local path, or one in a bucket.
        what: What it is, such as "Recipe.model_dir".
    """
    if (parts := split(path)) is None:
        return
    scheme, rest = parts
    if scheme not in _STORAGES:
        raise UserError(
            f"{what} '{scheme}://{rest}' is in a storage that robust_ft does not know; give a "
            "folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER."
        )
    bucket, _, folder = rest.partition("/")
    if not bucket or not folder.strip("/"):
        raise UserError(
            f"{what} '{scheme}://{rest}' names no folder in a bucket; give "
            f"{scheme}://{bucket or 'BUCKET'}/FOLDER."
        )


def reached(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of something in a bucket that answers; each bucket is asked once.

    Raises:
        UserError: What reads it is not installed, or it cannot be reached.
    """
    check(path, "The path")
    scheme, rest = split(path) or ("", "")
    storage = _STORAGES[scheme]
    place = f"{scheme}://{rest}"
    if not importlib.util.find_spec(storage.module):
        raise UserError(
            f"'{place}' is in a bucket, and {storage.module}, which reads it, is not installed: "
            f"pip install 'robust_ft[{storage.extra}]'."
        )
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if bucket not in _answered:
        _configure(scheme)
        _ask(place, bucket)
        _answered.add(bucket)
    from robust_ft.bucket_path import BucketPath

    return BucketPath(place)


def _configure(scheme: str) -> None:
    """Sets what the storage's libraries are told before they are used."""
    import fsspec.config

    # Other processes write, too; a list of a moment ago may be wrong.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    if scheme == "gs":
        # It says each error at length, and raises it.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        # Else gcsfs asks another service what kind of bucket each one is.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # The server that gives credentials on Google's machines; elsewhere it is waited for long.
        try:
            socket.create_connection(("169.254.169.254", 80), timeout=1).close()
        except OSError:
            os.environ.setdefault("NO_GCE_CHECK", "true")


def _ask(place: str, bucket: str) -> None:
    """Raises a UserError if a bucket does not list what is at a place."""
    import fsspec

    scheme = bucket.partition(":")[0]
    answer: list[BaseException | None] = []

    def ask() -> None:
        try:
            system = fsspec.filesystem(scheme)
            try:
                system.ls(place)
            except FileNotFoundError:
                system.ls(bucket)  # nothing is at the place, or there is no such bucket
            answer.append(None)
        except BaseException as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if not answer:
        raise UserError(
            f"'{place}' cannot be reached: there is no answer within {_ANSWER_SECONDS:g} s; check "
            "the network."
        )
    if answer[0] is not None:
        raise _unreachable(place, bucket, answer[0]) from answer[0]


def _unreachable(place: str, bucket: str, error: BaseException) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"'{place}' cannot be reached: there is no bucket '{bucket}'.")
    said = (str(error).splitlines() or [""])[0].rstrip(".")
    credentials = isinstance(error, PermissionError) or re.search(
        "credential|anonymous|forbidden|unauthorized|permission|access denied|login|40[13]",
        f"{type(error).__name__} {said}",
        re.IGNORECASE,
    )
    advice = _CREDENTIALS[bucket.partition(":")[0]] if credentials else "check the network"
    return UserError(f"'{place}' cannot be reached ({said or type(error).__name__}); {advice}.")


def check_writable(folder: pathlib.Path) -> None:
    """Raises a UserError unless objects can be put below a folder and removed again.

    Args:
        folder: A path in a bucket.
    """
    probe = folder / f".writable.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
        if str(folder).startswith("gs://"):
            # Orbax asks for the bucket's kind, which needs a project and another permission.
            from google.cloud import storage

            storage.Client().get_bucket(str(folder).removeprefix("gs://").partition("/")[0])
    except Exception as error:  # each library has its own
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UserError(f"'{folder}' cannot be written ({said or type(error).__name__}).") from None


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a local path to write a file or a folder to, which is put to `path` at the end.

    A file is there whole or not at all. The files of a folder are put one after the other, and
    then those that were there before are removed.
    """
    with tempfile.TemporaryDirectory(prefix="robust_ft-") as folder:
        temporary = pathlib.Path(folder) / path.name
        yield temporary
        put(temporary, path)


def put(local: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a local file, or the files of a folder in the order of their names, to a bucket.

    Of a folder, what was there before is then removed.
    """
    system, place = _system(path)
    if not local.is_dir():
        system.put_file(str(local), place)
        return
    names = [str(file.relative_to(local)) for file in sorted(local.rglob("*")) if file.is_file()]
    for name in names:
        system.put_file(str(local / name), f"{place}/{name}")
    for name in listed(path).keys() - {*names}:
        (path / name).unlink(missing_ok=True)


def remove(folder: pathlib.Path) -> None:
    """Removes all objects below a folder in a bucket."""
    system, place = _system(folder)
    system.rm(place, recursive=True)


class Object(NamedTuple):
    """What a bucket says of an object: bytes, and what changes with its content."""

    size: int
    version: str


def listed(path: pathlib.Path) -> dict[str, Object]:
    """Returns the objects below a folder by their names there; "" stands for `path` itself."""
    system, place = _system(path)
    prefix = place.partition("://")[2]
    found = {}
    for name, known in system.find(place, detail=True).items():
        info = known or system.info(place)  # an object by itself
        version = info.get("etag") or info.get("ETag") or info.get("created")
        below = name.lstrip("/").removeprefix(prefix).lstrip("/")
        found[below] = Object(info["size"] or 0, str(version))
    return {name: each for name, each in found.items() if not name.endswith("/")}


def get(path: pathlib.Path, names: Sequence[str], target: pathlib.Path) -> None:
    """Copies objects to local files.

    Args:
        path: A folder in a bucket, or an object.
        names: As `listed` gives them.
        target: The local folder, or file.
    """
    system, place = _system(path)
    local = [target / name if name else target for name in names]
    for file in local:
        file.parent.mkdir(parents=True, exist_ok=True)
    system.get([f"{place}/{name}" if name else place for name in names], [*map(str, local)])


def _system(path: pathlib.Path) -> tuple[Any, str]:
    import fsspec

    place = os.fspath(path)
    return fsspec.filesystem(place.partition("://")[0]), place


class GrowingObject(io.BytesIO):
    """An object that is written whole at each `flush`, as nothing can be appended to one.

    Args:
        path: Where it is, in a bucket.
        content: What it holds already.
    """

    def __init__(self, path: pathlib.Path, content: bytes = b""):
        super().__init__()
        self.write(content)
        self._path = path
        self._flushed = self.tell()

    def flush(self) -> None:
        """Puts it, if anything was written since the last time."""
        if not self.closed and self.tell() != self._flushed:
            self._path.write_bytes(self.getvalue())
            self._flushed = self.tell()

    def close(self) -> None:
        self.flush()
        super().close()
