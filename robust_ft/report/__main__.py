"""Command line: `python -m robust_ft.report MODEL_DIR [MODEL_DIR ...] --output=DIR`."""

import argparse
import sys
from collections.abc import Sequence

from robust_ft import console
from robust_ft.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a report; returns the exit status: 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m robust_ft.report",
        description="Write report.html, report.png and report.md from finished runs, and print "
        "the table. Runs that differ by their seed alone become mean ± standard deviation.",
    )
    parser.add_argument(
        "model_dirs",
        metavar="MODEL_DIR",
        nargs="+",
        help="folder of a run, of the runs of several seeds, or of a sweep",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where to write (default: the run, if there is only one)"
    )
    options = parser.parse_args(arguments)
    if options.output is None and len(options.model_dirs) > 1:
        parser.error("a report on several runs needs --output=DIR")
    from robust_ft.report import write_report

    try:
        report = write_report(options.model_dirs, options.output or options.model_dirs[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"The report cannot be written: {error}.", file=sys.stderr)
        return 2
    for path in report.files:
        console.print_line(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
