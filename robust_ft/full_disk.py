"""A full disk: one sentence with the folder, whatever the library that met it says."""

import contextlib
import errno
import os
from collections.abc import Iterator

from robust_ft.errors import UserError

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries in C++, such as TensorStore, say it.
_TEXTS = {
    "ENOSPC": errno.ENOSPC,
    "No space left on device": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "Disk quota exceeded": errno.EDQUOT,
    "EFBIG": errno.EFBIG,
    "File too large": errno.EFBIG,
}


class FullDisk(UserError):
    """A disk is full, or a quota is used up."""


@contextlib.contextmanager
def told(folder: str | os.PathLike[str] = "") -> Iterator[None]:
    """Makes one sentence of an error in the block that comes from a full disk.

    Args:
        folder: Where the block writes, unless the error itself names another place.

    Raises:
        FullDisk: The disk is full, or a quota is used up.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in _chain(error):
            if (number := _number(cause)) is not None:
                where = _place(cause, os.fspath(folder))
                place = f"'{where}' cannot be written" if where else "something cannot be written"
                raise FullDisk(
                    f"The disk is full: {place} ({os.strerror(number)}); make room and run the "
                    "same command again, which goes on from what has been saved."
                ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> int | None:
    """Returns the system's number of an error that says that a disk is full."""
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return error.errno
    return next((number for text, number in _TEXTS.items() if text in str(error)), None)


def _place(error: BaseException, folder: str) -> str:
    """Returns the folder that an error is about."""
    path = error.filename if isinstance(error, OSError) else None
    if not isinstance(path, str):
        return folder
    is_inside = folder and os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)
    return folder if is_inside else os.path.dirname(os.path.abspath(path))
