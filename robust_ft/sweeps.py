"""Sweeps: a recipe with every value of a grid, one of which is chosen on ID validation alone.

Every value has a run of its own, which is validated and goes no further. Only the chosen one is
evaluated on test splits: it is completed in its folder, without training again.
"""

import dataclasses
import gc
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robust_ft import claiming, console, multihost, report
from robust_ft.ensembles.selection import without_final_evaluations
from robust_ft.errors import Diverged, UserError, nearest
from robust_ft.evaluator import TARGET, Evaluator
from robust_ft.files import as_path
from robust_ft.recipe import Recipe
from robust_ft.recorded_settings import Flattened
from robust_ft.run_context import Callback
from robust_ft.runner import run_claimed, validate
from robust_ft.seeds import folder_of_runs, seed_folders
from robust_ft.sweep_file import Sweep, Tried, is_number, points, shown

# From values, a seed and a folder to the recipe of a run.
Build = Callable[[Mapping[str, Any], int, str], Recipe]
_NAME = 60  # characters of a value in a folder's name


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep that can be run.

    Attributes:
        directory: Its folder.
        sweep: What is tried; the scores are those that an earlier start has left.
        recipes: {folder of a point: {seed: recipe}}.
    """

    directory: str
    sweep: Sweep
    recipes: Mapping[str, Mapping[int, Recipe]]


def run_sweep(
    recipe_of: Callable[..., Recipe],
    grid: Mapping[str, Sequence[Any]],
    model_dir: str,
    seeds: int = 1,
    by: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Sweep:
    """Runs a recipe with every value of a grid and completes the best one.

    ```python
    def full(**rate):
        return robust_ft.load_recipe("gin_configs/full_rte.gin", **rate)

    sweep = robust_ft.run_sweep(full, {"LEARNING_RATE": [3e-4, 1e-3, 3e-3]}, "/tmp/sweep")
    sweep.chosen.values  # {'LEARNING_RATE': 0.001}
    ```

    The runs are in `<model_dir>/<setting>_<value>/seed_<seed>`. Finished ones are skipped and an
    unfinished one resumes; a larger grid, or more seeds, adds runs. `sweep.json` says what was
    tried and chosen, and `report.html` is on the chosen value.

    Args:
        recipe_of: Returns the recipe with the values that it is given by name. Seeds are counted
            from the recipe's own; its model_dir does not matter.
        grid: The values of each setting; of several settings every combination is tried.
        model_dir: The folder of the sweep.
        seeds: Every value runs with as many seeds; the mean of their scores chooses.
        by: The stage or the selection whose validation score chooses; by default what the recipe
            ends with. What comes after it is run with the chosen value only.
        callbacks: Follow the training loop of each stage.

    Raises:
        UserError: Nothing is selected on validation data, a value fits nothing or changes nothing,
            every run diverged, or the folder is another sweep's.
        Stopped: SIGTERM arrived; a new call goes on where this one was.
    """
    check_grid(grid)
    own = recipe_of(**points(grid)[0])

    def build(values: Mapping[str, Any], seed: int, folder: str) -> Recipe:
        return dataclasses.replace(recipe_of(**values), seed=seed, model_dir=folder)

    return run(
        plan(build, grid, dataclasses.replace(own, model_dir=model_dir), seeds, by), callbacks
    )


def plan(
    build: Build, grid: Mapping[str, Sequence[Any]], recipe: Recipe, seeds: int, by: str | None
) -> Plan:
    """Builds all runs of a sweep, and checks that it can choose among them.

    Args:
        build: Returns the recipe of a run.
        grid: The values of each setting.
        recipe: Has the folder of the sweep and the first seed.
        seeds: How many seeds.
        by: As in `run_sweep`.

    Raises:
        UserError: See `run_sweep`; nothing has been written.
    """
    check_grid(grid)
    base = folder_of_runs(recipe)
    numbers = tuple(seed_folders(recipe, seeds))
    tried = [Tried(values, folder_name(values)) for values in points(grid)]
    recipes = {}
    for point in tried:
        below = dataclasses.replace(recipe, model_dir=f"{base}/{point.folder}")
        recipes[point.folder] = {
            seed: build(point.values, seed, folder)
            for seed, folder in seed_folders(below, seeds).items()
        }
    firsts = [recipes[point.folder][numbers[0]] for point in tried]
    by = chosen_by(firsts[0], by)
    selecting = [selecting_evaluations(each, by) for each in firsts]
    _check_comparable(tried, selecting)
    _check_different(tried, firsts, by)
    on = tuple(f"{each.task} {each.split}" for each in selecting[0])
    tests = [e for stage in firsts[0].stages for e in stage.final_evaluations if e.role == TARGET]
    reported = [place for place in on if place in {f"{e.task} {e.split}" for e in tests}]
    notes = [f"It chooses on what is reported as the test result, {place}." for place in reported]
    sweep = Sweep(recipe.name, by, on, numbers, tuple(tried), tuple(notes))
    return Plan(base, _continued(base, sweep), recipes)


def run(
    plan: Plan,
    callbacks: Sequence[Callback] = (),
    claim: Callable[[Recipe], Any] | None = None,
) -> Sweep:
    """Runs what is left of a sweep, completes the chosen value's runs and reports on them.

    Args:
        plan: The sweep.
        callbacks: Follow the training loop of each stage.
        claim: Claims the MODEL_DIR of a run; by default `claiming.claim`.

    Raises:
        UserError, Stopped: See `run_sweep`.
    """
    sweep = plan.sweep
    multihost.check_same("sweep", repr(sweep))
    every = [(point, seed) for point in sweep.tried for seed in sweep.seeds]
    for number, (point, seed) in enumerate(every, start=1):
        recipe = plan.recipes[point.folder][seed]
        # Of a value that has been scored, too: it must be with the settings of now.
        (claim or claiming.claim)(recipe)
        if seed in point.scores:
            continue
        _write(sweep, plan.directory)
        console.print_line(
            f"[sweep] run {number} of {len(every)}, {point.name}: {recipe.model_dir}"
        )
        sweep = sweep.with_score(point, seed, *_scored(recipe, sweep.by, callbacks))
        _write(sweep, plan.directory)
    chosen = sweep.chosen
    if chosen is None:
        how = next(text for point in sweep.tried for text in point.diverged.values())
        raise UserError(f"A run diverged with every value that was tried; the first: {how}")
    console.print_line(
        f"[sweep] {chosen.name} is chosen, with {chosen.score(sweep.seeds):.1f}; it is completed."
    )
    for sentence in sweep.sentences():
        console.print_line(f"[sweep] {sentence}", style="yellow")
    for recipe in plan.recipes[chosen.folder].values():
        run_claimed(recipe, callbacks)
    if multihost.is_first() and plan.recipes[chosen.folder][sweep.seeds[0]].is_evaluated:
        written = report.write_report([plan.directory], plan.directory)
        console.print_line(f"Report on the chosen value: {written.html}")
    return sweep


def _scored(recipe: Recipe, by: str, callbacks: Sequence[Callback]) -> tuple[float, str]:
    """Returns a run's validation score, and how it diverged."""
    how = ""
    score: float | None = math.nan
    try:
        score = validate(recipe, by, callbacks)
    except Diverged as error:
        how = str(error)
    gc.collect()  # the next run needs the memory, and an error's frames hold parameters
    if score is None:
        raise UserError(f"'{by}' of the run in {recipe.model_dir} has no validation score.")
    if math.isnan(score):
        how = how or "Its validation score is NaN."
    console.print_line(f"[sweep] validation of '{by}': {how or f'{score:.1f}'}")
    return score, how


def _write(sweep: Sweep, directory: str) -> None:
    if multihost.is_first():
        as_path(directory).mkdir(parents=True, exist_ok=True)
        sweep.write(directory)
    multihost.barrier()


def chosen_by(recipe: Recipe, name: str | None) -> str:
    """Returns what a sweep chooses by: a stage or a selection.

    Args:
        recipe: The recipe.
        name: Its name; None for what the recipe ends with.

    Raises:
        UserError: There is none.
    """
    names = [stage.name for stage in recipe.stages]
    names += [selection.name for selection in recipe.selections]
    if not names:
        raise UserError(
            f"{recipe.name} trains no stage, it only evaluates few-shot tuning, which selects "
            "nothing on validation data; a sweep needs a stage."
        )
    if name is not None and name not in names:
        raise UserError(
            f"A sweep cannot choose by '{name}', only by {', '.join(names)}." + nearest(name, names)
        )
    return name or names[-1]


def stages_of(recipe: Recipe, by: str) -> tuple[str, ...]:
    """Returns the names of the stages whose models a sweep chooses by: one, or a selection's."""
    selections = {each.name: each for each in recipe.selections}
    return selections[by].stages if by in selections else (by,)


def selecting_evaluations(recipe: Recipe, by: str) -> tuple[Evaluator, ...]:
    """Returns the evaluations that give the score by which a stage or a selection is selected.

    Raises:
        UserError: It is not selected on validation data.
    """
    for selection in recipe.selections:
        if selection.name == by and (own := getattr(selection, "evaluations", ())):
            return tuple(each for each in own if each.role == TARGET)
    stage = recipe.stage(stages_of(recipe, by)[-1])
    if not stage.select_best:
        raise UserError(
            f"A sweep chooses by what selects checkpoints, but stage '{stage.name}' has "
            "Stage.select_best=False; set it to True."
        )
    found = tuple(each for each in stage.evaluations if each.role == TARGET)
    if not found:
        raise UserError(
            f"A sweep chooses by what selects checkpoints, but Stage.evaluations of stage "
            f"'{stage.name}' has none with the role '{TARGET}'; give it one on validation data."
        )
    return found


def check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    """Raises a UserError unless each setting has several values, all different, and plain."""
    if not grid:
        raise UserError("A sweep needs a grid of values to choose from, and there is none.")
    for name, values in grid.items():
        if len(values) < 2:
            raise UserError(
                f"The grid has one value of {name}, {', '.join(map(shown, values)) or 'or none'}, "
                "so there is nothing to choose; give several, or set it as any setting."
            )
        for index, value in enumerate(values):
            if value in values[:index]:
                raise UserError(f"The grid has {name} {shown(value)} twice.")
            try:
                json.dumps(value)
            except TypeError:
                raise UserError(
                    f"The grid has {name} {value!r}, which is no plain value, such as a number or "
                    "a text; give each a name, and let the recipe be built by it."
                ) from None


def folder_name(values: Mapping[str, Any]) -> str:
    """Returns the folder of a point: LEARNING_RATE_0.001, or several joined by a plus."""
    return "+".join(_folder_part(name, value) for name, value in values.items())


def _folder_part(name: str, value: Any) -> str:
    text = repr(value) if is_number(value) else str(value)
    plain = re.sub(r"[^\w.-]+", "_", text)[:_NAME]
    if plain != text:  # so that other texts have other names
        plain += "_" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return re.sub(r"[^\w.-]+", ".", name) + "_" + plain


def _check_comparable(tried: Sequence[Tried], selecting: Sequence[Sequence[Evaluator]]) -> None:
    """Raises a UserError unless all points are scored on the same examples."""
    keys = [[(e.task, e.split, getattr(e, "limit", None)) for e in each] for each in selecting]
    for point, key in zip(tried, keys, strict=True):
        if key != keys[0]:
            names = [
                f"{task} {split}" + (f", {limit} examples," if limit else "")
                for task, split, limit in (keys[0][0], key[0])
            ]
            raise UserError(
                f"With {tried[0].name} the validation score is on {names[0]} and with {point.name} "
                f"on {names[1]}; a grid cannot change what it is chosen by."
            )


def _check_different(tried: Sequence[Tried], recipes: Sequence[Recipe], by: str) -> None:
    """Raises a UserError if two points train the same, as far as the choice goes."""
    seen: list[tuple[Any, Any]] = []
    for point, recipe in zip(tried, recipes, strict=True):
        flattened = Flattened.of(_as_far_as(recipe, by))
        key = flattened.settings, flattened.places
        if key in seen:
            other = tried[seen.index(key)]
            names = [n for n, value in point.values.items() if other.values[n] != value]
            raise UserError(
                f"{other.name} and {point.name} make the same run, as nothing that '{by}' of "
                f"{recipe.name} depends on changes; leave {' and '.join(names)} out of the grid."
            )
        seen.append(key)


def _as_far_as(recipe: Recipe, by: str) -> Recipe:
    """Returns what of a recipe decides its score, the seed aside."""
    names = [stage.name for stage in recipe.stages]
    count = names.index(by) + 1 if by in names else len(names)
    stages = [dataclasses.replace(s, final_evaluations=()) for s in recipe.stages[:count]]
    selections = [without_final_evaluations(s) for s in recipe.selections if s.name == by]
    return Recipe("", "", tuple(stages), selections=tuple(selections))


def _continued(directory: str, sweep: Sweep) -> Sweep:
    """Returns a sweep with the scores that an earlier start has left in its folder.

    Raises:
        UserError: That was another sweep, or one that this does not extend.
    """
    earlier = Sweep.read(directory)
    if earlier is None:
        return sweep
    where = f"Recipe.model_dir={directory} holds a sweep"
    for what in ("name", "by"):
        one, other = getattr(earlier, what), getattr(sweep, what)
        if one != other:
            kind = "of the recipe" if what == "name" else "chosen by"
            raise UserError(f"{where} {kind} '{one}', not '{other}'; choose another folder.")
    known = {point.folder: point for point in earlier.tried}
    lost = [
        each.name for folder, each in known.items() if folder not in {p.folder for p in sweep.tried}
    ]
    lost += [f"seed {seed}" for seed in earlier.seeds if seed not in sweep.seeds]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(
            f"{where} that has {', '.join(lost[:3])}{more} besides; give these too, as a sweep can "
            "be extended but not narrowed, or choose another Recipe.model_dir."
        )
    tried = [
        dataclasses.replace(point, scores=of.scores, diverged=of.diverged)
        if (of := known.get(point.folder))
        else point
        for point in sweep.tried
    ]
    return dataclasses.replace(sweep, tried=tuple(tried))
