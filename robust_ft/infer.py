"""Predicts with a finished run: python -m robust_ft.infer --gin_file=gin_configs/promot_rte.gin

Writes inputs, targets and predictions for TEST_SPLIT of MIXTURE_OR_TASK_NAME to
INFER_OUTPUT_DIR/<task>-predict.jsonl-00000-of-00001, one JSON object a line.
"""

import sys
from collections.abc import Sequence

from robust_ft import command_line, cpu_settings


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    arguments = command_line.parse("infer", __doc__ or "", argv)
    with command_line.started(arguments) as config:
        from robust_ft import console, inference

        if arguments.dry_run:
            console.print_line(config.operative)
            return 0
        file = inference.infer(config.recipe, config.inference)
        console.print_line(f"Predictions: {file}")
        return 0


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
