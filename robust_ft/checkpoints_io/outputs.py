"""Outputs that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robust_ft.errors import UserError


def check(output: Path, overwrite: bool = False) -> None:
    """Raises a UserError if something is there that may not be replaced."""
    filled = any(output.iterdir()) if output.is_dir() else output.exists()
    if filled and not overwrite:
        raise UserError(f"'{output}' is there already; give another --output, or --overwrite.")


@contextmanager
def fresh(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a path beside `output` to write to, a file or directory, that replaces it at the end.

    If anything goes wrong what was written is removed, and what was there before stays.

    Raises:
        UserError: `output` is there and `overwrite` is not set, or it cannot be written.
    """
    output = output.expanduser().absolute()
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        check(output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if output.is_dir():
            output.rename(replaced)
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror or error}.") from error
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        for left in (temporary, replaced):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif left.exists():
                left.unlink()
