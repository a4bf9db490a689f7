"""Tells whether a recipe fits a TPU slice, without having one.

    python -m robust_ft.preflight --gin_file=gin_configs/promot_rte.gin \\
        --gin_file=gin_configs/scale/mt5_xxl.gin --topology=v5e:2x4

Compiles the train step and the decoding of every stage for the slice and prints their memory per
chip, FLOPs and bytes sent by collectives, and what to change where a program does not fit. --find
tries larger slices and other settings until all programs fit, starting from --topology ("v5e": from
the smallest one).
"""

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from robust_ft import command_line
from robust_ft.files import write_json
from robust_ft.preflight import topology

if TYPE_CHECKING:
    from robust_ft.preflight.report import Row
    from robust_ft.recipe import Recipe
    from robust_ft.stage import Stage

PROGRAMS = ("train_step", "decode_step", "infer_step")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0 if all fits, 1 if not."""
    parser = command_line.gin_parser("preflight", __doc__ or "")
    parser.epilog = (
        "Exit status: 0 all fits, 1 something does not, 2 a mistake in flags or configs."
    )
    parser.add_argument("--topology", required=True, help="a TPU slice, such as v5e:2x4")
    parser.add_argument(
        "--find", action="store_true", help="the smallest slice and the settings that fit"
    )
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="only this stage's programs; repeatable"
    )
    parser.add_argument(
        "--program", action="append", choices=PROGRAMS, help="only this program; repeatable"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as a list of objects")
    arguments = command_line.parse_gin(parser, argv)
    names = topology.larger(arguments.topology)
    topology.prepare()

    from robust_ft import console
    from robust_ft.preflight import report

    if arguments.find:
        rows, bindings = _find(arguments, names)
    else:
        rows, bindings = list(_rows(arguments, arguments.topology, ())), ()
    report.print_rows(rows)
    if arguments.json:
        write_json(arguments.json, [row.to_json() for row in rows])
    if all(row.fits for row in rows):
        if arguments.find:
            flags = " ".join([f"--gin.{each}" for each in bindings])
            console.print_line(f"Fits {rows[0].topology} with {flags or 'the config as it is'}.")
        return 0
    console.print_line("Does not fit.")
    return 1


def _rows(arguments: command_line.Arguments, name: str, bindings: Sequence[str]) -> Iterator["Row"]:
    """Yields a row for each program of each stage; programs are compiled one after the other.

    Args:
        arguments: The command line's.
        name: A topology's, such as "v5e:2x4".
        bindings: gin bindings that win over those of the command line.
    """
    from robust_ft import checks, compiling
    from robust_ft.preflight import report

    changed = copy.copy(arguments)
    changed.gin_bindings = [*arguments.gin_bindings, *bindings]
    config = command_line.load_config(changed)
    partitioner = config.recipe.partitioner
    target = topology.describe(name, partitioner.slices)
    recipe = dataclasses.replace(config.recipe, partitioner=partitioner.on(target.devices))
    compiling.use_effort(recipe.compile_effort)
    with command_line.macros_named(config):
        checks.check(recipe)
        for stage in _chosen(recipe, arguments.stage):
            yield from report.of_stage(recipe, stage, target, arguments.program or PROGRAMS)


def _chosen(recipe: "Recipe", names: Sequence[str] | None) -> list["Stage"]:
    from robust_ft.errors import UserError, nearest

    known = [stage.name for stage in recipe.stages]
    if not known:
        raise UserError(f"'{recipe.name}' has no stage whose programs could be compiled.")
    for name in names or ():
        if name not in known:
            raise UserError(f"--stage={name} is not one of {known}." + nearest(name, known))
    return [stage for stage in recipe.stages if stage.name in (names or known)]


def _find(
    arguments: command_line.Arguments, names: Sequence[str]
) -> tuple[list["Row"], Sequence[str]]:
    """Returns the rows of the first slice and settings that fit, and these settings.

    All settings are tried on one slice, those that cost least speed first, before the next larger
    slice. If nothing fits, the last rows are returned.
    """
    from robust_ft import console
    from robust_ft.errors import UserError
    from robust_ft.preflight import report

    recipe = command_line.load_config(arguments).recipe
    rows: list[Row] = []
    bindings: tuple[str, ...] = ()
    for name in names:
        for bindings in report.settings(recipe):
            flags = " ".join([f"--gin.{each}" for each in bindings])
            rows = []
            try:
                for row in _rows(arguments, name, bindings):
                    rows.append(row)
                    if not row.fits:
                        break
            except UserError as error:
                console.print_line(f"{name} {flags}: {error}")
                continue
            fits = all(row.fits for row in rows)
            console.print_line(f"{name} {flags}: {'fits' if fits else rows[-1].verdict}")
            if fits:
                return rows, bindings
    return rows, bindings


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
