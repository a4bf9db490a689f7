"""Tries a grid of values: python -m robust_ft.sweep --gin_file=gin_configs/full_rte.gin

Runs the recipe with every value, one after the other, and chooses the best on in-distribution
validation data, which also select checkpoints. Only the chosen run is evaluated on test splits.
Each run has a folder of its own below MODEL_DIR; sweep.json there says what was tried and chosen.
Run the same command again to resume; with more values, or more seeds, it is extended.
"""

import ast
import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robust_ft import command_line, cpu_settings

if TYPE_CHECKING:
    from robust_ft.gin_config import Config
    from robust_ft.recipe import Recipe
    from robust_ft.run_context import Callback
    from robust_ft.sweep_file import Sweep

# Without --grid: what each rate of the recipe is multiplied by.
FACTORS = (0.3, 1, 3)
# What the sweep sets itself.
_OWN = {"MODEL_DIR": "folders", "RANDOM_SEED": "seeds, see --seeds"}
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}


def main(argv: Sequence[str], callbacks: Sequence["Callback"] = ()) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: The arguments.
        callbacks: Called by the training loop, for launchers of your own.
    """
    arguments = command_line.parse("sweep", __doc__ or "", argv)
    given = parse_grid(arguments.grid)
    with command_line.started(arguments, stops=True) as config:
        from robust_ft import console, sweeps
        from robust_ft.claiming import claim
        from robust_ft.errors import UserError
        from robust_ft.trainer import Stopped

        configs: dict[str, Config] = {}

        def build(values: Mapping[str, Any], seed: int, folder: str) -> "Recipe":
            settings = {**values, "RANDOM_SEED": seed, "MODEL_DIR": folder}
            one = _with_settings(arguments, settings)
            if (one.recipe.seed, one.recipe.model_dir) != (seed, folder):
                raise UserError(
                    "A sweep sets RANDOM_SEED and MODEL_DIR, but in this config they are not "
                    "Recipe.seed and Recipe.model_dir; bind these to the macros."
                )
            configs[folder] = one
            return one.recipe

        def claim_run(recipe: "Recipe") -> None:
            if claim(recipe):
                command_line.write_config(configs[recipe.model_dir])

        grid = given or rates(arguments, config)
        seeds = 1 if arguments.seeds is None else arguments.seeds
        plan = sweeps.plan(build, grid, config.recipe, seeds, arguments.by)
        console.banner(f"robust_ft: sweep of {config.recipe.name}", _facts(plan.sweep))
        if arguments.dry_run:
            for runs in plan.recipes.values():
                for recipe in runs.values():
                    console.print_line(recipe.model_dir)
            return 0
        try:
            sweeps.run(plan, callbacks, claim_run)
        except Stopped as stopped:
            console.print_line(f"{stopped} Run the same command to resume.")
            return command_line.RESUME
        return 0


def parse_grid(flags: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the grid that `NAME=VALUE,VALUE,...` flags give.

    Raises:
        UserError: A flag names no values, or a setting that sweeps set themselves.
    """
    from robust_ft.errors import UserError

    grid: dict[str, list[Any]] = {}
    for flag in flags:
        name, sign, text = flag.partition("=")
        if not (name and sign and text):
            raise UserError(f"--grid={flag} lacks values; write --grid=NAME=VALUE,VALUE.")
        if name in grid:
            raise UserError(f"--grid names {name} twice; give all of its values in one flag.")
        if name in _OWN:
            raise UserError(f"--grid={name} cannot be: runs of a sweep have {_OWN[name]}.")
        values = [_value(part.strip()) for part in _parts(text)]
        if "" in values:
            raise UserError(f"--grid={flag} has an empty value.")
        grid[name] = values
    return grid


def _parts(text: str) -> Iterator[str]:
    """Yields what commas separate, but for those in brackets and quotes."""
    part, quote = "", ""
    closing: list[str] = []
    for letter in text:
        if letter == "," and not closing and not quote:
            yield part
            part = ""
            continue
        part += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _CLOSED_BY:
            closing.append(_CLOSED_BY[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
    yield part


def _value(text: str) -> Any:
    """Returns a value as gin reads it: a Python value, a reference, or a text without quotes."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def rates(arguments: command_line.Arguments, config: "Config") -> dict[str, list[Any]]:
    """Returns the grid of a sweep without `--grid`: multiples of the recipe's own rates.

    These are the learning rates of the stages that the sweep chooses by.

    Raises:
        UserError: The config names none that could be set.
    """
    from robust_ft import sweeps
    from robust_ft.errors import UserError

    stages = sweeps.stages_of(config.recipe, sweeps.chosen_by(config.recipe, arguments.by))
    grid: dict[str, list[Any]] = {}
    for name in dict.fromkeys(
        [*config.settings.get("Schedule.peak", {}).values(), "Schedule.peak"]
    ):
        # A value has the scope of the macro that refers to its object: OPTIMIZER/Schedule.peak.
        line = rf"(?m)^(?:\w+/)?{re.escape(name)} = ([\d.e+-]+)$"
        found = re.search(line, config.operative)
        if found is None or name in grid or not (rate := float(found[1])):
            continue
        other = _with_settings(arguments, {name: rate * FACTORS[0]}).recipe
        if any(other.stage(s).optimizer != config.recipe.stage(s).optimizer for s in stages):
            grid[name] = [float(f"{rate * factor:.2g}") for factor in FACTORS]
    if not grid:
        raise UserError(
            f"No macro sets the learning rate of '{' or '.join(stages)}' in {config.recipe.name}; "
            "say what to try with --grid=NAME=VALUE,VALUE."
        )
    return grid


def _with_settings(arguments: command_line.Arguments, settings: Mapping[str, Any]) -> "Config":
    from robust_ft.from_gin import statements

    own = copy.copy(arguments)
    own.gin_bindings = [*arguments.gin_bindings, *statements(settings)]
    return command_line.load_config(own)


def _facts(sweep: "Sweep") -> dict[str, object]:
    from robust_ft.sweep_file import shown

    runs = len(sweep.tried) * len(sweep.seeds)
    facts: dict[str, object] = {n: ", ".join(map(shown, v)) for n, v in sweep.grid.items()}
    seeds = f", {len(sweep.seeds)} seeds each" if len(sweep.seeds) > 1 else ""
    facts["runs"] = f"{runs}{seeds}" + (f", {sweep.left} left" if sweep.left < runs else "")
    facts["chosen by"] = f"validation of '{sweep.by}': {', '.join(sweep.on)}"
    return facts


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
