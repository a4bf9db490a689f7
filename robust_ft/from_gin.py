"""A recipe from gin files, for Python."""

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_ft import gin_config
from robust_ft.errors import UserError
from robust_ft.recipe import Recipe


def load_recipe(
    *files: str | os.PathLike[str],
    bindings: Mapping[str, Any] | None = None,
    search_paths: Sequence[str | os.PathLike[str]] = (),
    **macros: Any,
) -> Recipe:
    """Builds the recipe that gin files describe, as `robust_ft train --gin_file=...` does.

    ```python
    recipe = robust_ft.load_recipe(
        "gin_configs/promot_rte.gin",
        bindings={"prompt/Stage.eval_period": 50},
        TRAIN_STEPS=10,
        MODEL_DIR="/tmp/run",
    )
    summary = robust_ft.run(recipe)
    ```

    Args:
        *files: Gin files, later ones win. They are looked for in the working directory, then in
            `search_paths`, then among those that come with robust_ft.
        bindings: Values of parameters by "Name.parameter" or "scope/Name.parameter".
        search_paths: Folders to look for files.
        **macros: Values of macros. Like bindings, they win over files. Values are plain Python
            values, or references in gin's syntax, such as "@light/AdamW()" and "%BATCH_SIZE".

    Raises:
        UserError: A file, name or value is wrong; one sentence says where.
    """
    overrides = list(statements({**(bindings or {}), **macros}))
    folders = [os.fspath(folder) for folder in search_paths]
    return gin_config.load([os.fspath(file) for file in files], overrides, folders).recipe


def statements(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields gin statements, such as "TRAIN_STEPS=10", that set macros and parameters.

    Raises:
        UserError: A value is an object.
    """
    for name, value in values.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str) and value.startswith(("@", "%")):
            yield f"{name}={value}"
            continue
        try:
            ast.literal_eval(repr(value))
        except (ValueError, SyntaxError):
            raise UserError(
                f"{name}={value!r} is not a plain value, such as a number, a text or a list; "
                'configs refer to objects by name: "@AdamW()".'
            ) from None
        yield f"{name}={value!r}"
