"""Analyses finished runs: python -m robust_ft.analysis drift /tmp/run [/tmp/run ...]

Each stage's start and the checkpoints that it kept are analysed; what a run wrote while it trained
is taken in. Results are in MODEL_DIR/<analysis>.json, from where reports take them, and the same
command goes on where it was stopped. The table and the picture are in --output.
"""

import argparse
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_ft import command_line, cpu_settings

if TYPE_CHECKING:
    from robust_ft.analysis_run import AnalysisSettings

FORMAT = "format"
_WHAT = {
    "drift": "KL(pretrained || finetuned) on target and held-out inputs, over steps and against "
    "what was forgotten",
    "alignment": "the cosine of the gradient and the format gradient, by layer and part, over "
    "steps, with and without the tuned prompt",
    "neighbors": "the tokens nearest to a soft prompt's vectors, and which of its labels persist",
    FORMAT: "the share of held-out outputs in the target's format and the held-out score, against "
    "steps and against the target's score; from what the run has recorded",
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parse(argv)
    from robust_ft.errors import UserError

    if arguments.output is None and len(arguments.model_dirs) > 1:
        raise UserError("The picture of several runs needs --output=DIR.")
    if arguments.analysis == FORMAT:
        _write(arguments)
        return 0
    with command_line.joined(arguments):
        from robust_ft import multihost

        _analyse(arguments)
        if multihost.is_first():
            _write(arguments)
    return 0


def _parse(argv: Sequence[str]) -> command_line.Arguments:
    parser = command_line.Parser(
        "python -m robust_ft.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for name, what in _WHAT.items():
        kind = kinds.add_parser(name, help=what, description=what, allow_abbrev=False)
        kind.add_argument(
            "model_dirs",
            metavar="MODEL_DIR",
            nargs="+",
            help="folder of a finished run, or of the runs of several seeds",
        )
        kind.add_argument(
            "--output",
            metavar="DIR",
            help="where the picture and the table go (default: the run, if there is only one)",
        )
        if name == FORMAT:
            kind.add_argument(
                "--target_format",
                metavar="REGEX",
                help="outputs in the target's format; by default what the run was evaluated with",
            )
        else:
            _add_settings(kind, name)
    parser.set_defaults(dry_run=False)
    return command_line.parse_gin(parser, argv)


def _add_settings(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="a stage to analyse; give several; by default all",
    )
    parser.add_argument(
        "--gin.NAME",
        dest="_",
        metavar="VALUE",
        help="set a macro of the run's config.gin, or a parameter in the scope that it has there, "
        "that leaves its model as it is, such as --gin.EVAL_BATCH_SIZE=8",
    )
    if name == "neighbors":
        parser.add_argument("--count", type=int, default=5, help="neighbours of each vector (5)")
        parser.add_argument(
            "--labels",
            type=lambda text: tuple(text.split(",")),
            default=(),
            metavar="LABEL,LABEL",
            help="class labels to look for; by default those that the prompt started from",
        )
    else:
        parser.add_argument(
            "--limit", type=int, help="examples of each task; by default as it is evaluated"
        )
        parser.add_argument(
            "--batch_size", type=int, help="examples at once; by default as it is evaluated"
        )
    if name == "alignment":
        parser.add_argument(
            "--last_layer",
            action="store_true",
            help="the decoder's last layer alone, which takes less memory",
        )
    parser.add_argument("--xla_flags", metavar="gpu|tpu", help="as in robust_ft.train")
    command_line.add_processes(parser)


def _analyse(arguments: Any) -> None:
    """Computes what is missing in each run."""
    from robust_ft import buckets
    from robust_ft.analysis_run import analyse
    from robust_ft.errors import UserError
    from robust_ft.report.runs import load_runs, run_folders

    settings = _settings(arguments)
    load_runs(arguments.model_dirs)  # what cannot be reported on is said before
    for folder in run_folders(arguments.model_dirs):
        config = folder / "config.gin"
        if not config.exists():
            raise UserError(
                f"'{folder}' has no config.gin, as it was not started by robust_ft.train; call "
                "robust_ft.analysis_run.analyse with its recipe."
            )
        own = copy.copy(arguments)
        with tempfile.TemporaryDirectory() as local:
            if buckets.is_bucket(config):  # gin reads files
                text = config.read_text(encoding="utf-8")
                config = Path(local) / config.name
                config.write_text(text, encoding="utf-8")
            own.gin_file, own.gin_search_paths = [str(config)], ""
            with command_line.configured(own) as built:
                recipe = dataclasses.replace(built.recipe, model_dir=str(folder))
                analyse(recipe, arguments.analysis, settings)


def _settings(arguments: Any) -> "AnalysisSettings":
    from robust_ft.analysis_run import AnalysisSettings

    fields = ("limit", "batch_size", "last_layer", "count", "labels")
    given = {name: getattr(arguments, name) for name in fields if hasattr(arguments, name)}
    return AnalysisSettings(stages=tuple(arguments.stage), **given)


def _write(arguments: Any) -> None:
    """Writes the picture and the table of all runs, and prints the table."""
    from robust_ft import console
    from robust_ft.report.analyses import write_analysis

    output = arguments.output or arguments.model_dirs[0]
    target_format = getattr(arguments, "target_format", None)
    for path in write_analysis(arguments.analysis, arguments.model_dirs, output, target_format):
        console.print_line(str(path))


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
