"""What a run is made with, in `MODEL_DIR/run.json`: its settings, its data and its base.

A used MODEL_DIR goes on with what it was made with, and with nothing else: whatever differs and
could change results is refused, field by field.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from robust_ft import multihost, recorded_content
from robust_ft.checkpoints_io.stage_record import RUN
from robust_ft.errors import UserError
from robust_ft.files import as_path, read_json_object
from robust_ft.recipe import Recipe
from robust_ft.recorded_content import DATA
from robust_ft.recorded_settings import Flattened, Setting, digest
from robust_ft.stage_start import teacher_model

_SHOWN = 60  # characters of a value in a sentence
_ABSENT = object()


class Difference(NamedTuple):
    """A field in which two records differ; None stands for what one of them has not."""

    field: str
    recorded: Setting
    now: Setting


class Change(NamedTuple):
    """A setting that was changed in the middle of a run: what `--allow_change` has let pass.

    Attributes:
        field: The field.
        before: Its value in the steps before.
        after: Its value in those after.
        stage: The stage that was not finished then.
        step: Steps of it that were done then.
    """

    field: str
    before: Setting
    after: Setting
    stage: str
    step: int


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """All that a run's results depend on.

    Attributes:
        settings: {field: value}, see `recorded_settings`. A checkpoint that a stage restores and a
            task's examples ("data.<task>.<split>.examples") are there as a hash of their content.
        origins: {field: {path: hash}}: the files that such content came from. Not compared.
        changes: What was changed in the middle of the run, in order.
        times: {checkpoint: a hash of its files' names, sizes and times}: while it is equal, the
            checkpoint is not read again to know its content. Not compared.
        defaults: The fields that have their class's default; empty if it was read from a file.
    """

    settings: Mapping[str, Setting]
    origins: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    times: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, recipe: Recipe, known: "RunRecord | None" = None, with_data: bool = True
    ) -> "RunRecord":
        """Returns a recipe's record.

        Args:
            recipe: The recipe.
            known: What was recorded in its MODEL_DIR; checkpoints that have not changed since are
                not read.
            with_data: Whether to read its data, whose caches are built where they are missing.

        Raises:
            UserError: There is no such data or checkpoint.
        """
        flattened = Flattened.of(recipe)
        settings = flattened.settings
        origins: dict[str, Mapping[str, str]] = {}
        times: dict[str, str] = {}
        contents: dict[str, str] = {}
        for field, place in flattened.places.items():
            if not recorded_content.is_place(place):
                settings[field] = place or None
                continue
            name = str(place)
            if name not in contents:
                times[name] = recorded_content.times(place)
                unchanged = _known(known, field, name, times[name])
                contents[name] = unchanged or recorded_content.of_place(field, place)
            settings[field], origins[field] = contents[name], {name: contents[name]}
        for stage in recipe.stages:
            if f"stages.{stage.name}.teacher" in origins:
                teacher = Flattened.of(teacher_model(recipe, stage), _of_teacher(stage.name))
                settings |= teacher.settings
        for data, is_evaluated in flattened.data.items() if with_data else ():
            for found in recorded_content.of_data(data, is_evaluated):
                # Stages may have tasks of one name in different files.
                fields = (
                    f"{found.field}#{n}" if n > 1 else found.field for n in itertools.count(1)
                )
                field = next(f for f in fields if settings.get(f, found.value) == found.value)
                settings[field] = found.value
                if found.files:
                    origins[field] = found.files
        return cls(settings, origins, (), times, frozenset(flattened.defaults))

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> "RunRecord | None":
        """Returns the record of the run in a MODEL_DIR.

        None if there is no run, or one of a version that kept no record.

        Raises:
            UserError: Its file is broken.
        """
        file = as_path(directory) / RUN
        fields = read_json_object(file, default={})
        if "settings" not in fields:
            return None
        try:
            changes = tuple(Change(**change) for change in fields["changes"])
            settings, origins = dict(fields["settings"]), dict(fields["origins"])
            return cls(settings, origins, changes, dict(fields.get("times", {})))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"'{file}' is no record of a run, or a newer robust_ft's.") from None

    def as_json(self) -> dict[str, Any]:
        """Returns what `read` reads, as fields of a JSON object."""
        return {
            "settings": dict(self.settings),
            "origins": dict(self.origins),
            "times": dict(self.times),
            "changes": [change._asdict() for change in self.changes],
        }

    def differences(self, now: "RunRecord") -> list[Difference]:
        """Returns the fields in which another record differs from this one.

        Where an object is of another class, or one has elements that the other lacks, that alone is
        a difference, and not all that is inside. A field that only one of two versions of robust_ft
        knows is none, if it has its default.
        """
        return [
            Difference(field, self.settings.get(field), now.settings.get(field))
            for field in dict.fromkeys([*self.settings, *now.settings])
            if self._differs(field, now)
        ]

    def _differs(self, field: str, now: "RunRecord") -> bool:
        one, other = (record.settings.get(field, _ABSENT) for record in (self, now))
        if one == other:
            return False
        # What is around it, the nearest last.
        around = [field[:i] for i, letter in enumerate(field) if letter == "."]
        around = [name for name in around if name in self.settings or name in now.settings]
        for name in around:
            values = [record.settings.get(name, _ABSENT) for record in (self, now)]
            if values[0] != values[1] and any(isinstance(v, str) for v in values):
                return False  # objects of different classes
        if one is not _ABSENT and other is not _ABSENT:
            return True
        if field.startswith(DATA):
            return False  # a setting names the data
        if not all(self.settings.get(name) == now.settings.get(name) for name in around):
            return False  # an element that only one has
        of_an_object = not around or isinstance(now.settings[around[-1]], str)
        return not (field in now.defaults if one is _ABSENT else of_an_object)

    def owner(self, field: str) -> str:
        """Returns a field as "Class.field", such as "Schedule.peak"; "" where there is no class."""
        around, _, name = field.rpartition(".")
        kind = self.settings.get(around, "Recipe" if not around else None)
        return f"{kind}.{name}" if isinstance(kind, str) else ""


def check_same_everywhere(record: RunRecord) -> None:
    """Raises a UserError on all processes unless all have the same settings and the same data."""
    text = json.dumps([record.settings, record.origins], sort_keys=True)
    if len(set(multihost.gathered(digest(text)))) == 1:
        return
    first, *others = (RunRecord(*json.loads(text)) for text in multihost.gathered(text))
    for process, other in enumerate(others, start=1):
        differences = first.differences(other)
        if differences:
            said = "; ".join(sentence(each, first, other) for each in differences[:3])
            raise UserError(
                f"Process {process} differs from process 0: {said}; give all processes the same."
            )


def sentence(difference: Difference, recorded: RunRecord, now: RunRecord) -> str:
    """Returns a difference in words, without a full stop."""
    field = difference.field
    owner = now.owner(field) or recorded.owner(field)
    name = f"{field} ({owner})" if owner and owner != field else field
    if field.startswith(DATA) and ".examples" in field:
        return _of_files(difference, recorded, now)
    if field in {**recorded.origins, **now.origins}:
        places = [
            next(iter(record.origins.get(field, {})), value)
            for record, value in ((recorded, difference.recorded), (now, difference.now))
        ]
        if places[0] == places[1]:
            return f"{name}: '{places[0]}' has another content now"
        return f"{name} is '{places[0]}', now '{places[1]}' with another content"
    return f"{name} is {_shown(difference.recorded)}, now {_shown(difference.now)}"


def _of_files(difference: Difference, recorded: RunRecord, now: RunRecord) -> str:
    field = difference.field
    task, split, _ = field.removeprefix(DATA).rsplit(".", 2)
    what = f"{field}: task '{task}', split '{split}', has other examples"
    before, after = (
        {Path(path).name: content for path, content in record.origins.get(field, {}).items()}
        for record in (recorded, now)
    )
    if (not before and not after) or before == after:
        return f"{what} of the same files, so its code differs, or draws at random"
    if before.keys() != after.keys():
        return f"{what}: of {_listed(before)}, now of {_listed(after)}"
    changed = [name for name in before if before[name] != after[name]]
    more = f", and {len(changed) - 1} more" if changed[1:] else ""
    return f"{what}: file '{changed[0]}' has another content{more}"


def _listed(names: Iterable[str]) -> str:
    first, *others = [*names, "no file"]
    return f"'{first}' and {len(others) - 1} more" if others[1:] else f"'{first}'"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _of_teacher(stage: str) -> str:
    return f"stages.{stage}.teacher.model"


def _known(known: RunRecord | None, field: str, name: str, times: str) -> str:
    """Returns what is recorded of a checkpoint whose files have not changed since, else ""."""
    if known is None or not times or times != known.times.get(name):
        return ""
    return known.origins.get(field, {}).get(name, "")
