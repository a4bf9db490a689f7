"""Trains a recipe: python -m robust_ft.train --gin_file=gin_configs/promot_rte.gin

A recipe is a gin file. Its stages run one after the other, each is evaluated, and at the end there
are a table, and report.html with a figure in MODEL_DIR. Run the same command again to resume.
With --seeds=5 it runs with five seeds, each in a folder of its own, and reports on them together.
"""

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_ft import command_line, cpu_settings
from robust_ft.files import as_path

if TYPE_CHECKING:
    from robust_ft.few_shot import FewShot
    from robust_ft.gin_config import Config
    from robust_ft.recipe import Recipe
    from robust_ft.run_context import Callback
    from robust_ft.stage import Stage


def main(argv: Sequence[str], callbacks: Sequence["Callback"] = ()) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: The arguments.
        callbacks: Called by the training loop, for launchers of your own.
    """
    arguments = command_line.parse("train", __doc__ or "", argv)
    with command_line.started(arguments, stops=True) as config:
        _banner(config.recipe)
        if arguments.dry_run:
            _dry_run(config)
            return 0
        if arguments.seeds is not None:
            return _train_seeds(config, callbacks, arguments)
        return _train(config, callbacks, arguments.allow_change)


def _train(config: "Config", callbacks: Sequence["Callback"], allow_change: Sequence[str]) -> int:
    from robust_ft import console, multihost, report
    from robust_ft.claiming import claim
    from robust_ft.runner import run_claimed
    from robust_ft.trainer import Stopped

    recipe = config.recipe
    if claim(recipe, allow_change):
        command_line.write_config(config)
    try:
        run_claimed(recipe, callbacks)
    except Stopped as stopped:
        console.print_line(f"{stopped} Run the same command to resume.")
        return command_line.RESUME
    if multihost.is_first() and recipe.is_evaluated:
        report.write_report([recipe.model_dir], recipe.model_dir)
        console.print_line(f"Figure and samples: {as_path(recipe.model_dir) / 'report.html'}")
    return 0


def _train_seeds(
    config: "Config", callbacks: Sequence["Callback"], arguments: command_line.Arguments
) -> int:
    """Trains with each seed as a command of its own would, and reports on the runs."""
    from robust_ft import console, seeds
    from robust_ft.errors import UserError

    folders = seeds.seed_folders(config.recipe, arguments.seeds or 0)
    configs = []
    for seed, folder in folders.items():
        own = copy.copy(arguments)
        own.gin_bindings = [
            *arguments.gin_bindings,
            f"RANDOM_SEED={seed}",
            f"MODEL_DIR={folder!r}",
        ]
        one = command_line.load_config(own)
        if (one.recipe.seed, one.recipe.model_dir) != (seed, folder):
            raise UserError(
                "--seeds sets RANDOM_SEED and MODEL_DIR, but in this config they are not "
                "Recipe.seed and Recipe.model_dir; bind these to the macros."
            )
        configs.append(one)
    for one in configs:
        console.print_line(
            f"Seed {one.recipe.seed} of {', '.join(map(str, folders))}: {one.recipe.model_dir}"
        )
        if status := _train(one, callbacks, arguments.allow_change):
            return status
    seeds.write_report(config.recipe, list(folders.values()))
    return 0


def _banner(recipe: "Recipe") -> None:
    import jax

    from robust_ft import console

    part = recipe.parts[-1]
    sizes = [leaf.size for leaf in jax.tree.leaves(part.model.shapes())]
    data = recipe.last.data
    devices = jax.devices()
    console.banner(
        f"robust_ft: {recipe.name}",
        {
            "model": f"{type(part.model.config).__name__.removesuffix('Config')} with "
            f"{sum(sizes):,} parameters from {recipe.parts[0].restore}",
            "data": data.task + (f" of {data.module}" if data.module else ""),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "output": recipe.model_dir,
        },
    )


def _dry_run(config: "Config") -> None:
    from robust_ft import console, model_info
    from robust_ft.checks import check, untuned

    check(config.recipe)
    if note := untuned(config.recipe):
        console.print_line(note, style="yellow")
    console.print_line(config.operative)
    for stage in config.recipe.stages:
        shapes = stage.model.shapes()
        paths = stage.trainable_paths()
        data = stage.rows
        console.print_line(f"Stage '{stage.name}' from {stage.restore}, {stage.steps} steps:")
        console.print_line(model_info.report(shapes, paths, stage.model.peft, compact=True))
        console.print_line(
            f"batch: inputs [{stage.batch_size}, {data.inputs_length}], "
            f"targets [{stage.batch_size}, {data.targets_length}], "
            f"in {stage.microbatches} microbatch(es){_of_tasks(stage)}"
        )
        for evaluation in (*stage.evaluations, *stage.final_evaluations):
            detached = evaluation.detached(stage.model)
            removed = f" without {', '.join(detached)}" if detached else ""
            console.print_line(f"evaluate {evaluation.task} {evaluation.split}{removed}")
    if config.recipe.few_shot is not None:
        _dry_run_few_shot(config.recipe.few_shot)


def _dry_run_few_shot(few_shot: "FewShot") -> None:
    from robust_ft import console, model_info

    model, paths = few_shot.model, few_shot.trainable_paths()
    tasks = len(few_shot.evaluations)
    console.print_line(
        f"Few-shot from {few_shot.restore}: {tasks} task(s), each tuned on {few_shot.examples} "
        f"examples for {few_shot.epochs} epochs, {few_shot.seeds} time(s), at most "
        f"{min(few_shot.side_by_side, tasks * few_shot.seeds)} tunings side by side:"
    )
    console.print_line(model_info.report(model.shapes(), paths, model.peft, compact=True))
    removed = f" (0 shots without {', '.join(few_shot.zero_shot_without)})"
    for evaluation in few_shot.evaluations:
        console.print_line(
            f"rank {evaluation.task} {evaluation.split} of dataset "
            f"{few_shot.dataset(evaluation.task)}{removed if few_shot.zero_shot_without else ''}"
        )


def _of_tasks(stage: "Stage") -> str:
    from robust_ft.objectives.meta_learning import MetaLearning

    rule = stage.gradient
    if not isinstance(rule, MetaLearning):
        return ""
    return f" of {rule.tasks} tasks, {rule.batches} such batches each"


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
