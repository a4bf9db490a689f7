"""Evaluates a finished run: python -m robust_ft.eval --gin_file=gin_configs/promot_rte.gin

Evaluates the selected checkpoint in MODEL_DIR, or --gin.CHECKPOINT_PATH=FILE, on TEST_SPLIT of the
target and the held-out tasks, and prints the scores.
"""

import sys
from collections.abc import Sequence

from robust_ft import command_line, cpu_settings


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    arguments = command_line.parse("eval", __doc__ or "", argv)
    with command_line.started(arguments) as config:
        from robust_ft import console, inference

        if arguments.dry_run:
            console.print_line(config.operative)
            return 0
        rows = inference.evaluate_all(config.recipe, config.inference)
        console.print_table(
            f"{config.recipe.name} in {config.recipe.model_dir}",
            ["task", "split", "shots", "metric", "value", "examples", "without"],
            [
                [
                    row.task,
                    row.split,
                    row.shots,
                    row.metric,
                    f"{row.value:.3f}",
                    row.num_examples,
                    ", ".join(row.without),
                ]
                for row in rows
            ],
        )
        return 0


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
