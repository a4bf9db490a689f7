"""Scores text files: python -m robust_ft.metrics METRIC PREDICTIONS REFERENCES [REFERENCES ...]

Files hold one example a line, in UTF-8. Line 1 of PREDICTIONS is compared with line 1 of each
REFERENCES file, and so on. Where an example has fewer references than others, its lines in the
last files are blank; only multi_bleu and webnlg_bleu count blank lines as references (of length
0), because multi-bleu.perl does.

Prints JSON: the score, the number of examples, and the components of the score.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from robust_ft import command_line, metrics
from robust_ft.errors import UserError, nearest
from robust_ft.metrics.bleu import WEBNLG_REFERENCES

_BLANK_COUNTS = ("multi_bleu", "webnlg_bleu")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    first_lines = {name: (fn.__doc__ or "").split("\n")[0] for name, fn in metrics.METRICS.items()}
    parser = command_line.Parser(
        "python -m robust_ft.metrics",
        description=__doc__,
        epilog="metrics:\n" + "\n".join(f"  {n:<22} {line}" for n, line in first_lines.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "metric", metavar="METRIC", help="a name from below, or module:function for your own"
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", help="the model's outputs")
    parser.add_argument(
        "references",
        metavar="REFERENCES",
        nargs="+",
        help="the right outputs; several files for several references",
    )
    arguments = parser.parse_args(argv)
    metric = metrics.get_parts(arguments.metric)
    if arguments.metric == "webnlg_bleu" and len(arguments.references) > WEBNLG_REFERENCES:
        print(
            f"webnlg_bleu uses the first {WEBNLG_REFERENCES} of {len(arguments.references)} "
            "reference files, as the challenge did.",
            file=sys.stderr,
        )
    predictions = _read_lines(arguments.predictions)
    columns = []
    for path in arguments.references:
        columns.append(_read_lines(path))
        if len(columns[-1]) != len(predictions):
            raise UserError(
                f"{arguments.predictions} has {len(predictions)} lines and {path} has "
                f"{len(columns[-1])}; each line must be one example in all files."
            )
    targets = [list(row) for row in zip(*columns, strict=True)]
    if arguments.metric not in _BLANK_COUNTS:
        targets = [[text for text in row if text.strip()] or row[:1] for row in targets]
    parts = metric(targets, predictions)
    result = {
        "metric": arguments.metric,
        "score": next(iter(parts.values())),
        "examples": len(predictions),
        "parts": parts,
    }
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _read_lines(path: str) -> list[str]:
    """Returns the lines of a file; nothing but line feeds (and carriage returns before) end one."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = [line.removesuffix("\n").removesuffix("\r") for line in file]
    except FileNotFoundError:
        folder, name = os.path.split(path)
        others = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        raise UserError(f"There is no file '{path}'.{nearest(name, others)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not lines:
        raise UserError(f"{path} is empty.")
    return lines


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
