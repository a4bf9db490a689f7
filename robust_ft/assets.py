"""Files that are shipped with the package; configs name them `asset:mini/model.safetensors`."""

from pathlib import Path

from robust_ft.errors import UserError, nearest

_ROOT = Path(__file__).with_name("assets")


def resolve(path: str) -> str:
    """Returns the file of an `asset:` path, and any other path unchanged.

    Raises:
        UserError: There is no such asset.
    """
    if not path.startswith("asset:"):
        return path
    file = _ROOT / path.removeprefix("asset:")
    if not file.exists():
        shipped = [f"asset:{f.relative_to(_ROOT)}" for f in _ROOT.rglob("*") if f.is_file()]
        raise UserError(f"'{path}' is not shipped with robust_ft." + nearest(path, shipped))
    return str(file)


def named(path: Path) -> str | None:
    """Returns the `asset:` path of a file that is shipped with the package, None of any other."""
    if not path.is_relative_to(_ROOT):
        return None
    return f"asset:{path.relative_to(_ROOT)}"
