"""What a task's examples depend on: its Python source files and its raw data files.

Nothing here imports a task module, so that a ready cache is found without tensorflow.
"""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import pkgutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_ft import bundled
from robust_ft.errors import UserError, nearest

DATA_DIR_VARIABLE = "ROBUST_FT_DATA_DIR"
# File systems count changes in ticks, of up to 2 s.
_RECENT_NS = 2_000_000_000
_OURS = "robust_ft"  # a change here that matters raises `cache.FORMAT`
_INSTALLED = {"site-packages", "dist-packages"}


def module_fingerprint(module: str | None) -> str:
    """Returns the SHA-256 (hex) of the source files that `module` (a dotted name) is part of.

    These are all Python files of the package that holds it, and what these files import, directly
    or not, from beside it: modules and packages in the folder where Python finds the module's
    outermost package, or the module itself. What is installed or ours does not count. Without a
    module, the fingerprint is "".

    Raises:
        UserError: If there is no such module.
    """
    if module is None:
        return ""
    digest = hashlib.sha256()
    files = _module_files(module)
    root = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _module_files(module: str) -> list[Path]:
    file, package = _locate(module)
    pending = [file] if package is None else sorted(package.rglob("*.py"))
    root = file.parents[len(module.split(".")) - (file.name != "__init__.py")]
    # Beside an installed package is everything else that is installed.
    top = module.split(".")[0] if _INSTALLED & set(root.parts) else None
    visited: set[Path] = set()
    while pending:
        file = pending.pop()
        if file not in visited:
            visited.add(file)
            stat = file.stat()
            for name in _imported(file, root, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)):
                parts = name.split(".")
                if parts[0] != _OURS and top in (None, parts[0]):
                    pending.extend(_beside(root, parts))
    return sorted(visited)


def _locate(module: str) -> tuple[Path, Path | None]:
    """Returns a module's file and the folder of its package, None outside any package."""
    bundled.make_importable(module)
    path: list[str] | None = None
    name, file = "", Path()
    for part in module.split("."):
        parent, name = name, f"{name}.{part}" if name else part
        try:
            if parent:
                spec = importlib.machinery.PathFinder.find_spec(name, path)
            else:  # asks every finder (editable installs have their own), and imports nothing
                spec = importlib.util.find_spec(name)
        except ValueError:  # a module without a spec, such as __main__
            spec = None
        if spec is None or (not spec.submodule_search_locations and not spec.has_location):
            siblings = (info.name for info in pkgutil.iter_modules(path))
            names = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
            reason = "" if name == module else f": Python finds no '{name}'"
            raise UserError(f"There is no task module '{module}'{reason}.{nearest(name, names)}")
        path = list(spec.submodule_search_locations or [])
        if not path and name != module:
            raise UserError(f"There is no task module '{module}': '{name}' is not a package.")
        file = Path(spec.origin) if spec.origin else Path(path[0], "__init__.py")
    return file, file.parent if path or "." in module else None


@functools.lru_cache(maxsize=4096)
def _imported(file: Path, root: Path, version: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the dotted names that a file below `root` imports, `from a import b` as a.b."""
    del version
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ()  # Python will say so, if it is imported at all
    package = file.relative_to(root).parts[:-1]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            start = [*above, *([node.module] if node.module else [])]
            names += [".".join([*start, alias.name]) for alias in node.names]
    return tuple(names)


def _beside(root: Path, parts: Sequence[str]) -> list[Path]:
    """Returns the files below `root` that Python reads for a dotted name, which may end in `*`."""
    found: list[Path] = []
    folder = root
    for part in parts:
        if part == "*":  # what it gives may be modules that `__all__` names
            return [*found, *sorted(folder.glob("*.py"))] if folder != root else found
        package, module = folder / part / "__init__.py", folder / f"{part}.py"
        if package.is_file():
            found.append(package)
        elif module.is_file():
            return [*found, module]
        elif not (folder / part).is_dir():  # a package may lack the file
            return found  # a function or class
        folder = folder / part
    return found


@dataclass(frozen=True)
class RawFile:
    """A raw data file as it was when a cache was built.

    Attributes:
        path: Relative to the data directory (ROBUST_FT_DATA_DIR) if it lies there, else absolute.
        size: Bytes.
        mtime_ns: Modification time; 0 as `ctime_ns`.
        ctime_ns: Change time, see `times`; 0 if it was too recent. While all three are equal, the
            file is not hashed again.
        sha256: Hex digest of the content.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


def describe_file(path: str | os.PathLike[str]) -> RawFile:
    """Returns the fingerprint of a raw file."""
    file = Path(path).resolve()
    name = str(file)
    data_dir = os.environ.get(DATA_DIR_VARIABLE)
    if data_dir and file.is_relative_to(Path(data_dir).resolve()):
        name = file.relative_to(Path(data_dir).resolve()).as_posix()
    size, mtime, ctime = times(file) or (file.stat().st_size, 0, 0)
    return RawFile(name, size, mtime, ctime, _sha256(file))


def times(file: Path) -> tuple[int, int, int] | None:
    """Returns a file's size, modification time and change time, which change with its content.

    No program can set the change time, unlike the modification time. None if the change was so
    recent that the next one could have the same time.
    """
    stat = file.stat()
    if time.time_ns() - stat.st_ctime_ns < _RECENT_NS:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def has_changed(raw: RawFile) -> bool:
    """Whether the file is there and differs from what was recorded.

    A missing file counts as unchanged: a machine with a cache needs no raw data.
    """
    file = Path(os.environ.get(DATA_DIR_VARIABLE) or ".", raw.path)
    if not os.path.isabs(raw.path) and not os.environ.get(DATA_DIR_VARIABLE):
        return False
    if not file.is_file():
        return False
    if file.stat().st_size != raw.size:
        return True
    unchanged = times(file) == (raw.size, raw.mtime_ns, raw.ctime_ns)
    return not unchanged and _sha256(file) != raw.sha256


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
