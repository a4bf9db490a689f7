"""A task in pairs of texts that are in memory."""

import hashlib
from collections.abc import Iterable
from typing import Any

from robust_ft import files
from robust_ft.data import cache
from robust_ft.data.file_task import FileTask

Pairs = Iterable[tuple[str, str]]


def pairs_task(
    name: str,
    train: Pairs = (),
    validation: Pairs = (),
    test: Pairs = (),
    *,
    cache_dir: str | None = None,
    **settings: Any,
) -> FileTask:
    """Returns a task whose examples are (input, target) pairs.

    ```python
    task = robust_ft.pairs_task("sums", train=[("2 + 2 =", "4"), ("3 + 4 =", "7")])
    data = robust_ft.TaskData(
        task="sums", file_tasks=(task,), inputs_length=16, targets_length=4, vocabulary=vocabulary
    )
    ```

    Args:
        name: The task's name: letters, digits and underscores.
        train: Pairs of the training split.
        validation: Pairs of the validation split.
        test: Pairs of the test split.
        cache_dir: Folder of all caches, in which the pairs are kept as files; see `TaskData`.
        **settings: Other fields of `FileTask`, such as `metrics` and `choices`.

    Raises:
        UserError: There is no pair at all, or the name or a setting is wrong.
    """
    return FileTask(
        name=name,
        inputs="{input}",
        targets="{target}",
        train=_write(train, cache_dir),
        validation=_write(validation, cache_dir),
        test=_write(test, cache_dir),
        **settings,
    )


def _write(pairs: Pairs, cache_dir: str | None) -> str | None:
    """Writes pairs to a file that is named by its content; returns its path, None without pairs."""
    records = [{"input": source, "target": target} for source, target in pairs]
    if not records:
        return None
    key = hashlib.sha256("".join(map(files.json_line, records)).encode()).hexdigest()
    file = cache.root(cache_dir) / "pairs" / f"{key[:16]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json_lines(file, records)
    return str(file)
