"""Files that are shipped with the package, named in configs as `asset:mini/model.safetensors`."""

from pathlib import Path

from robust_ft.errors import UserError, nearest

_ROOT = Path(__file__).with_name("assets")


def resolve(path: str) -> str:
    """Returns the file behind an `asset:` path; any other path comes back as it is."""
    if not path.startswith("asset:"):
        return path
    file = _ROOT / path.removeprefix("asset:")
    if not file.exists():
        shipped = [f"asset:{f.relative_to(_ROOT)}" for f in _ROOT.rglob("*") if f.is_file()]
        raise UserError(f"'{path}' is not shipped with robust_ft." + nearest(path, shipped))
    return str(file)
