"""Outputs of converting and exporting: there whole or not at all, and never replaced unasked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robust_ft import files
from robust_ft.errors import UserError


def check(output: Path, overwrite: bool = False) -> None:
    """Raises a UserError if something is there that may not be replaced."""
    filled = any(output.iterdir()) if output.is_dir() else output.exists()
    if filled and not overwrite:
        raise UserError(f"'{output}' is there already; give another --output, or --overwrite.")


@contextmanager
def replacing(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to, which becomes `output` at the end.

    See `files.replacing`; folders above `output` are made.

    Raises:
        UserError: `output` is there and `overwrite` is not set, or it cannot be written.
    """
    output = output.expanduser().absolute()
    try:
        check(output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(output) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror or error}.") from error
