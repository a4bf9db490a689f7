"""What a run's record knows checkpoints and examples by: hashes of their content."""

import concurrent.futures
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from robust_ft import buckets
from robust_ft.checkpoints_io import sources
from robust_ft.data import cache, fingerprints
from robust_ft.models.peft import prompt_values
from robust_ft.recorded_settings import Setting, digest
from robust_ft.stage import PRETRAINED, SCRATCH, STAGE

DATA = "data."  # what fields of examples begin with
_HASHED_AT_ONCE = 4  # tensors of a checkpoint


def is_place(value: Any) -> bool:
    """Returns whether a field of `recorded_settings.PLACES` names files: no stage, not nothing."""
    named = value not in (SCRATCH, PRETRAINED) and not str(value).startswith(STAGE)
    return bool(value) and named


def times(place: str | Sequence[str]) -> str:
    """Returns a hash of what changes with files, "" if it might not or they are not local."""
    stats = []
    for path in sources.split(place) if isinstance(place, str) else place:
        if buckets.is_bucket(path):
            return ""
        top = Path(sources.existing(path)).expanduser()
        files = [top] if top.is_file() else sorted(f for f in top.rglob("*") if f.is_file())
        stats += [(str(file.relative_to(top)), fingerprints.times(file)) for file in files]
    return digest(stats) if stats and all(each for _, each in stats) else ""


def of_place(field: str, place: str | Sequence[str]) -> str:
    """Returns a hash of the parameters in a checkpoint, or in a prompt's files.

    Raises:
        UserError: There are none.
    """
    if field.endswith(".file"):
        names = [place] if isinstance(place, str) else place
        return digest([prompt_values.read(name).tobytes().hex() for name in names])
    assert isinstance(place, str)
    tensors = sources.weights(place)
    with concurrent.futures.ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        hashes = pool.map(lambda path: tensors[path].digest(), sorted(tensors))
        return digest(list(zip(sorted(tensors), hashes, strict=True)))


class Found(NamedTuple):
    """A field of a task's examples, and the files that they came from, {path: hash}."""

    field: str
    value: Setting
    files: Mapping[str, str] = {}


def of_data(data: cache.TaskData, is_evaluated: bool) -> Iterator[Found]:
    """Yields what is recorded of a task's or a mixture's examples; builds a missing cache.

    Args:
        data: The task and its split.
        is_evaluated: Whether its metrics matter.

    Raises:
        UserError: See `cache.ensure`.
    """
    tasks = cache.ensure(data)
    for cached in tasks:
        info = cached.info
        field = f"{DATA}{cached.task}.{data.split}"
        files = {raw.path: raw.sha256[:16] for raw in info.raw_files}
        yield Found(f"{field}.examples", info.content[:16], files)
        if is_evaluated:
            yield Found(f"{field}.metrics", list(info.metrics))
            yield Found(f"{field}.postprocess", info.postprocess)
        if len(tasks) > 1:
            yield Found(f"{DATA}{data.task}.{data.split}.rates.{cached.task}", cached.rate)
