"""All command lines in one: `robust_ft train ...` is `python -m robust_ft.train ...`."""

import runpy
import sys
from collections.abc import Sequence

from robust_ft import command_line
from robust_ft.errors import UserError, nearest

COMMANDS = {
    "train": "train a recipe; run the same command again to resume",
    "sweep": "try a grid of values, and choose on validation",
    "eval": "evaluate a finished run",
    "infer": "write a finished run's predictions",
    "generate": "let a model write examples, to be replayed in finetuning",
    "convert": "convert models between Hugging Face, t5x, PEFT and robust_ft",
    "soup": "average the parameters of finished runs",
    "preflight": "say whether a recipe fits a TPU slice, without one",
    "report": "draw tables, pictures and a page from finished runs",
    "analysis": "analyse finished runs: drift, gradient alignment, neighbours, format",
    "metrics": "score files of predictions",
    "data.show": "show examples of a task as the model reads them",
    "data.cache": "tokenize a recipe's data ahead of a run",
}
_USAGE = "\n".join(
    [
        "usage: robust_ft COMMAND [FLAGS]   (robust_ft COMMAND --help explains the flags)\n",
        *(f"  {name:<12}{what}" for name, what in COMMANDS.items()),
    ]
)


def main() -> None:
    """Runs the command line that the first argument names; imports nothing of the others."""
    command_line.run(_dispatch, sys.argv[1:])


def _dispatch(argv: Sequence[str]) -> None:
    """Runs `python -m robust_ft.<argv[0]> <argv[1:]>` in this process.

    Raises:
        UserError: There is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    command = argv[0]
    if command not in COMMANDS:
        raise UserError(
            f"There is no command '{command}', only {', '.join(COMMANDS)}."
            + nearest(command, COMMANDS)
        )
    sys.argv = [command, *argv[1:]]
    runpy.run_module(f"robust_ft.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
