"""Runs a recipe with several seeds, one after the other, and reports on them together."""

import dataclasses
from collections.abc import Sequence

from robust_ft import console, multihost, report
from robust_ft.checkpoints_io.stage_record import RUN
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.recipe import Recipe
from robust_ft.run_context import Callback
from robust_ft.runner import run
from robust_ft.summary import Summary


def run_seeds(
    recipe: Recipe,
    seeds: int,
    callbacks: Sequence[Callback] = (),
    allow_change: Sequence[str] = (),
) -> list[Summary]:
    """Runs a recipe with several seeds, from its own on, and writes one report over the runs.

    Each is a complete run in `<model_dir>/seed_<seed>`: finished ones are skipped, an unfinished
    one resumes. The report, with means and standard deviations, is written into `model_dir`.

    Args:
        recipe: What to run.
        seeds: How many.
        callbacks: Follow the training loop of each stage.
        allow_change: See `run`.

    Returns:
        The evaluation results of each run.

    Raises:
        UserError: The recipe does not fit together, or a folder is another run's.
        Stopped: SIGTERM arrived; a new call goes on where this one was.
    """
    folders = seed_folders(recipe, seeds)
    summaries = [
        run(dataclasses.replace(recipe, seed=seed, model_dir=folder), callbacks, allow_change)
        for seed, folder in folders.items()
    ]
    write_report(recipe, list(folders.values()))
    return summaries


def seed_folders(recipe: Recipe, seeds: int) -> dict[int, str]:
    """Returns the folder of each seed's run.

    Raises:
        UserError: There is no seed, or MODEL_DIR is that of a single run.
    """
    if seeds < 1:
        raise UserError(f"The number of seeds is {seeds}, but must be at least 1.")
    base = folder_of_runs(recipe)
    return {seed: f"{base}/seed_{seed}" for seed in range(recipe.seed, recipe.seed + seeds)}


def folder_of_runs(recipe: Recipe) -> str:
    """Returns MODEL_DIR, below which several runs have their folders.

    Raises:
        UserError: It is that of a single run.
    """
    base = recipe.model_dir.rstrip("/")
    if (as_path(base) / RUN).exists():
        raise UserError(
            f"Recipe.model_dir={recipe.model_dir} is the folder of a single run; choose another "
            "for several runs, which go into folders below it."
        )
    return base


def write_report(recipe: Recipe, folders: Sequence[str]) -> None:
    """Writes the report on the runs into the recipe's MODEL_DIR, from the first process."""
    if multihost.is_first() and recipe.is_evaluated:
        written = report.write_report(folders, recipe.model_dir)
        console.print_line(f"Report on {len(folders)} seed(s): {written.html}")
