"""Claims a MODEL_DIR for a recipe: a new one, or one that the same recipe has used before."""

import dataclasses
import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft import buckets, console, multihost
from robust_ft.checkpoints_io.stage_record import RUN
from robust_ft.checks import check, check_examples
from robust_ft.ensembles.mixture_weight import SelectedWeight
from robust_ft.errors import UserError, nearest
from robust_ft.evaluate import of_tasks
from robust_ft.evaluator import TARGET
from robust_ft.few_shot_results import Results
from robust_ft.files import as_path, read_json_object, write_json
from robust_ft.initial_checkpoint import is_free
from robust_ft.outcome import Outcome
from robust_ft.recipe import Recipe
from robust_ft.run_record import (
    Change,
    Difference,
    RunRecord,
    check_same_everywhere,
    sentence,
)
from robust_ft.stage_checkpoints import saved_steps
from robust_ft.summary import FEW_SHOT

_NAMED = 4  # differences in a sentence
_OF_EVALUATIONS = re.compile(r"stages\..+\.(final_)?evaluations\b")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the run in a MODEL_DIR has come.

    Attributes:
        finished: The names of the stages that have trained, and "few_shot" once it has results.
        stage: The stage, selection or "few_shot" that is next; None if the whole run has finished.
        step: The step of its newest checkpoint, or 0.
        is_begun: Whether there is any result yet.
    """

    finished: frozenset[str]
    stage: str | None
    step: int
    is_begun: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "Progress":
        folder = as_path(recipe.model_dir)
        names = [stage.name for stage in recipe.stages]
        outcomes = {name: Outcome.read(folder / name) for name in names}
        finished = [name for name, outcome in outcomes.items() if outcome is not None]
        left = [name for name, outcome in outcomes.items() if not (outcome and outcome.is_tested)]
        left += [s.name for s in recipe.selections if SelectedWeight.read(folder / s.name) is None]
        few_shot = recipe.few_shot and Results(folder, recipe.few_shot)
        if few_shot and few_shot.missing():
            left.append(FEW_SHOT)
        steps = [step for name in left[:1] for step in saved_steps(folder / name)]
        is_begun = bool(finished or steps or few_shot) or (folder / "summary.json").exists()
        if few_shot:  # its evaluations must not be of several settings
            finished.append(FEW_SHOT)
        return cls(frozenset(finished), next(iter(left), None), max(steps, default=0), is_begun)

    @property
    def place(self) -> str:
        return f"step {self.step} of '{self.stage}'"


def claim(recipe: Recipe, allow_change: Sequence[str] = ()) -> bool:
    """Checks the recipe, then creates its MODEL_DIR with `run.json`, or checks the one there is.

    A MODEL_DIR with results belongs to the settings, the data and the base that they were made
    with (`RunRecord`). A finished run is left as it is.

    Args:
        recipe: The recipe.
        allow_change: Fields that an unfinished run may go on with another value of, such as
            "stages.model.optimizer.learning_rate.peak", all in "stages.model.optimizer", or
            "Schedule.peak" wherever it is. The record keeps what was changed, and at which step.

    Returns:
        Whether anything is left to do.

    Raises:
        UserError: The recipe has a mistake (see `check`), or differs from what MODEL_DIR was made
            with, or MODEL_DIR cannot be written. Nothing in it has been changed.
    """
    check(recipe)
    file = as_path(recipe.model_dir) / RUN
    try:
        owner = read_json_object(file, default={})
        progress = Progress.of(recipe)
        recorded = RunRecord.read(recipe.model_dir) if progress.is_begun else None
        if recorded is None:
            _check_owner(recipe, owner)
        _check_writable(file.parent)  # before caches are built, which may take hours
        record = RunRecord.of(recipe, recorded)
        check_examples(recipe)
        check_same_everywhere(record)
        if progress.is_begun:
            record = _continued(recipe, recorded, record, progress, allow_change)
        multihost.barrier()  # all have read what the first one is about to replace
        if progress.stage is not None or not owner:
            _write(file, {**_facts(recipe), **record.as_json()})
    except OSError as error:
        raise UserError(
            f"Recipe.model_dir={recipe.model_dir} cannot be written: {error.strerror or error}."
        ) from None
    return progress.stage is not None


def check_model(recipe: Recipe) -> None:
    """Checks that a recipe's models and bases are those of the run in its MODEL_DIR.

    How it is evaluated, and in which dtype, is free.

    Raises:
        UserError: They are not.
    """
    recorded = RunRecord.read(recipe.model_dir)
    if recorded is None:
        return
    now = RunRecord.of(recipe, recorded, with_data=False)
    owners = [re.escape(stage.name) for stage in recipe.stages]
    of_models = re.compile(rf"seed|stages\.({'|'.join(owners)})\.(model\b.*|restore)")
    differences = [
        each
        for each in recorded.differences(now)
        if of_models.fullmatch(each.field) and not is_free(each.field.rpartition(".")[2])
    ]
    if differences:
        raise UserError(
            f"The model in Recipe.model_dir={recipe.model_dir} was made with other settings: "
            f"{_said(differences, recorded, now)}; evaluate it with those."
        )


def _check_writable(directory: Path) -> None:
    """Raises an OSError if a folder is not there and cannot be made, or cannot be written to."""
    if buckets.is_bucket(directory):
        if multihost.is_first():
            buckets.check_writable(directory)
        return
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        code = errno.EEXIST if there == directory else errno.ENOTDIR
        raise OSError(code, os.strerror(code))
    if not os.access(there, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _write(file: Path, fields: Mapping[str, Any]) -> None:
    if multihost.is_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, fields)
    multihost.barrier()
    if not file.exists():
        raise UserError(
            f"Recipe.model_dir={file.parent} is not one folder for all processes; put it on a file "
            "system that they share."
        )


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Returns what readers of a run need without its settings."""
    evaluations = of_tasks(recipe.stages[-1].final_evaluations if recipe.stages else ())
    targets = [e.data.task for e in evaluations if e.role == TARGET]
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "target": targets[0] if targets else None,
        "stages": [stage.name for stage in recipe.stages],
        "selections": [selection.name for selection in recipe.selections],
    }


def _check_owner(recipe: Recipe, owner: Mapping[str, Any]) -> None:
    for field in ("name", "seed"):
        if owner and owner.get(field) != getattr(recipe, field):
            raise UserError(
                f"Recipe.model_dir={recipe.model_dir} belongs to a run with {field} "
                f"{owner.get(field)!r}, not {getattr(recipe, field)!r}; choose another."
            )


def _continued(
    recipe: Recipe,
    recorded: RunRecord | None,
    now: RunRecord,
    progress: Progress,
    allow_change: Sequence[str],
) -> RunRecord:
    """Returns the record of a run that goes on.

    Raises:
        UserError: A difference is not allowed.
    """
    if recorded is None:
        note = "An earlier robust_ft began this run and did not record its settings"
        if progress.stage is not None:
            note += f"; those of now are recorded from {progress.place} on"
        console.print_line(f"{note}.", style="yellow")
        change = Change("settings", None, None, progress.stage or "", progress.step)
        return dataclasses.replace(now, changes=(change,))
    _check_names(allow_change, recorded, now)
    differences = recorded.differences(now)
    frozen = tuple(f"stages.{name}." for name in progress.finished - {FEW_SHOT})
    frozen += (FEW_SHOT,) if FEW_SHOT in progress.finished else ()
    refused = [
        each
        for each in differences
        if progress.stage is None
        or each.field.startswith(frozen)
        or not any(_names(name, each.field, recorded, now) for name in allow_change)
    ]
    if refused:
        raise _refusal(recipe, refused, recorded, now, progress)
    for each in differences:
        console.print_line(
            f"From {progress.place} on: {sentence(each, recorded, now)}.", style="yellow"
        )
    changes = [Change(*each, progress.stage or "", progress.step) for each in differences]
    return dataclasses.replace(now, changes=(*recorded.changes, *changes))


def _names(name: str, field: str, *records: RunRecord) -> bool:
    """Returns whether a name in `allow_change` means a field."""
    return (
        field == name
        or field.startswith(f"{name}.")
        or name in [record.owner(field) for record in records]
    )


def _check_names(names: Sequence[str], *records: RunRecord) -> None:
    fields = [field for record in records for field in record.settings]
    for name in names:
        if not any(_names(name, field, *records) for field in fields):
            owners = [record.owner(field) for record in records for field in record.settings]
            raise UserError(
                f"allow_change names '{name}', which is no field of this run."
                + nearest(name, dict.fromkeys([*fields, *owners]))
            )


def _refusal(
    recipe: Recipe,
    refused: Sequence[Difference],
    recorded: RunRecord,
    now: RunRecord,
    progress: Progress,
) -> UserError:
    advice = "choose another Recipe.model_dir, or start with the recorded settings"
    done = sorted(n for n in progress.finished if any(f"stages.{n}." in d.field for d in refused))
    if progress.stage is None:
        if all(_OF_EVALUATIONS.match(each.field) for each in refused):
            advice += "; python -m robust_ft.eval evaluates a finished run on more"
    elif any(each.field.startswith(FEW_SHOT) for each in refused) and FEW_SHOT in progress.finished:
        advice += "; its few-shot evaluation has begun"
    elif done:
        advice += f"; stage '{done[0]}' has finished"
    else:
        names = [each.field for each in refused]
        if len(names) > _NAMED:
            names = [now.owner(name) or name for name in names]
        allowed = ",".join(dict.fromkeys(names))
        advice += (
            f"; --allow_change={allowed} lets it go on from {progress.place} with those of now"
        )
    state = "a finished run" if progress.stage is None else "an unfinished run"
    return UserError(
        f"Recipe.model_dir={recipe.model_dir} holds {state}, made with other settings: "
        f"{_said(refused, recorded, now)}; {advice}."
    )


def _said(differences: Sequence[Difference], recorded: RunRecord, now: RunRecord) -> str:
    """Returns differences in words: what differs alike in many places, once."""
    alike: dict[str, list[Difference]] = {}
    for each in differences:
        owner = now.owner(each.field) or each.field
        alike.setdefault(f"{owner} {each.recorded} {each.now}", []).append(each)
    said = []
    for first, *others in alike.values():
        more = f" (and {len(others)} more like it)" if others else ""
        said.append(sentence(first, recorded, now) + more)
    if len(said) > _NAMED:
        said[_NAMED:] = [f"and {len(said) - _NAMED} more"]
    return "; ".join(said)
