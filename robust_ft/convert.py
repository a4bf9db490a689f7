"""Converts checkpoints: python -m robust_ft.convert --from=robust_ft --input=DIR --output=FILE

Reads a stage of a finished run (its selected checkpoint) or one checkpoint_<step> directory, and
writes all of its parameters to one .safetensors file that INITIAL_CHECKPOINT_PATH can name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from robust_ft import command_line

FORMATS = ("robust_ft",)
DTYPES = ("float32", "float16")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = command_line.Parser(
        "python -m robust_ft.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", choices=FORMATS, default="robust_ft")
    parser.add_argument("--input", required=True, metavar="DIR", help="the stage or checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--dtype", choices=DTYPES, help="type of floats; as they are if not given")
    arguments = parser.parse_args(argv)
    convert(arguments.input, arguments.output, arguments.dtype)
    return 0


def convert(source: str, output: str, dtype: str | None = None) -> None:
    """Writes the parameters of a stage or checkpoint to a .safetensors file.

    Raises:
        UserError: The source is no finished stage and no checkpoint, or the output has another
            ending.
    """
    from robust_ft import console, trainable
    from robust_ft.checkpoint import Outcome, load_params, save_params
    from robust_ft.errors import UserError

    if not output.endswith(".safetensors"):
        raise UserError(f"--output='{output}' must end in .safetensors.")
    outcome = Outcome.read(source)
    step = f"checkpoint_{outcome.step}" if outcome else ""
    params = load_params(str(Path(source) / step))
    save_params(output, trainable.unflatten(params), dtype)
    size = Path(output).stat().st_size
    console.print_line(f"{len(params)} parameters in {output} ({size:,} bytes).")


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
