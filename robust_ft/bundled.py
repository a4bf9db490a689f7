"""The folders `gin_configs`, `tasks` and `launch`: at the top of the repository, inside a wheel.

A wheel carries them in `robust_ft/_bundled`, so that it claims no top-level name but its own. Light
to import.
"""

import importlib.util
import sys
from pathlib import Path

from robust_ft.errors import UserError

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_bundled"
# The folder that holds the three.
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
_TASKS = "tasks"


def make_importable(module: str) -> None:
    """Makes sure that Python finds a module of `tasks`; nothing is done for any other module.

    Python looks at the end of `sys.path` last, so a package `tasks` of the user's own comes first.

    Args:
        module: A dotted name, such as "tasks.mini".

    Raises:
        UserError: The module is ours alone, but hidden by another package `tasks`.
    """
    if module.split(".")[0] != _TASKS or not _has(ROOT / _TASKS, module):
        return
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(_TASKS)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if any(_has(Path(folder), module) for folder in folders):
        return
    hiding = folders[0] if folders else spec.origin if spec else None
    raise UserError(
        f"The task module '{module}' of robust_ft is hidden by '{hiding}', which Python finds "
        f"first; rename that one, or put {ROOT} before it on PYTHONPATH."
    )


def _has(tasks: Path, module: str) -> bool:
    """Whether a folder `tasks` holds the module."""
    path = tasks.joinpath(*module.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
