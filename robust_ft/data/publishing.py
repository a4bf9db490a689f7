"""Publishes folders that several processes may build at once: complete or not at all.

A folder is made beside its final place and renamed when complete. Two builds at the same time end
with one of two equal results.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from robust_ft import full_disk
from robust_ft.data import cache


@contextlib.contextmanager
def exclusive(final: Path) -> Iterator[bool]:
    """Lets one process of this machine at a time build the folder `final`; others wait.

    Yields whether the lock is held. Where the file system has no locks, processes build at the same
    time, which costs time only.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / f".{final.name}.lock", "w") as lock:
        is_held = False
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            is_held = True
        yield is_held


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields a new folder to fill; renames it to `final` at the end, replacing what is there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    owner = f".{final.name}.{socket.gethostname()}"
    _remove_leftovers(final.parent, owner)
    folder = Path(tempfile.mkdtemp(prefix=f"{owner}.{os.getpid()}.", dir=final.parent))
    try:
        with full_disk.told(final.parent):
            yield folder
        folder.chmod(0o755)  # mkdtemp makes private folders, and others may read a cache
        try:
            folder.rename(final)
        except OSError:  # `final` exists
            if cache.read_info(final) is not None:  # another process was faster, with equal content
                shutil.rmtree(folder)
                return
            stale = folder.with_name(f"{folder.name}.old")
            with contextlib.suppress(FileNotFoundError):
                final.rename(stale)
            with contextlib.suppress(OSError):  # another process has put its own there meanwhile
                folder.rename(final)
            shutil.rmtree(stale, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(parent: Path, owner: str) -> None:
    """Removes the unfinished folders of killed processes of this machine."""
    for folder in parent.glob(f"{owner}.*"):
        pid = folder.name[len(owner) + 1 :].split(".")[0]
        try:
            os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            pass
