"""Few-shot evaluation of all tasks of an arm as one job, against one process a task.

    python benchmarks/fewshot.py [--gin_file=gin_configs/p3_none.gin] [--tasks=4] [--json=FILE]

Both tune a prompt of each task for as many steps on as many examples, and evaluate each task as
often on the same split: once before, and every 10 steps. One job is the arm's few-shot evaluation.
One process a task is how it is done without: `python -m robust_ft.train` of a recipe with a single
stage of prompt tuning, on the task's training split, restored from what the arm restores. Each side
has a compile cache of its own, which its processes share: empty for its first process ("cold"), and
full for all of them ("warm"). Data caches are built before. CPU-seconds, user and system, are those
of the child processes.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from robust_ft import gin_config
from robust_ft.files import write_json
from robust_ft.recipe import Recipe

ROOT = Path(__file__).parent.parent


def cpu_seconds(module: str, flags: Sequence[str], caches: Path, side: str) -> float:
    """Returns what one command takes; its output is shown if it fails."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(caches / side),
        "ROBUST_FT_CACHE_DIR": str(caches / "data"),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"{module} {' '.join(flags)} failed:\n{ended.stdout}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alone(recipe: Recipe, task: str) -> list[str]:
    """Returns the bindings that make an arm prompt tuning of one task, as few-shot tuning is."""
    few_shot = recipe.few_shot
    assert few_shot is not None
    return [
        "Recipe.few_shot=None",
        "Recipe.stages=[@prompt/Stage()]",
        f"MIXTURE_OR_TASK_NAME={task}",
        "EVAL_SPLIT=%TEST_SPLIT",
        "TARGET_TASKS=None",
        "HELD_OUT_TASKS={}",
        f"PROMPT_TRAIN_STEPS={few_shot.epochs}",
        f"PROMPT_EVAL_PERIOD={few_shot.eval_period}",
        f"BATCH_SIZE={few_shot.examples}",
        "prompt/Stage.final_evaluations=[]",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gin_file", default="gin_configs/p3_none.gin", help="an arm's recipe")
    parser.add_argument("--tasks", type=int, help="only the first of them, on both sides")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    recipe = gin_config.load([arguments.gin_file]).recipe
    if recipe.few_shot is None or recipe.stages:
        sys.exit(f"{arguments.gin_file} must be of few-shot evaluation alone, without a stage.")
    tasks = [evaluation.task for evaluation in recipe.few_shot.evaluations][: arguments.tasks]
    flags = [f"--gin_file={arguments.gin_file}", f"--gin.HELD_OUT_TASKS={ {0: tasks} }"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cpu_seconds("robust_ft.data.cache", flags, folder, "building")

        def train(run: str, side: str, bindings: Sequence[str]) -> float:
            given = [f"--gin.{each}" for each in (*bindings, f"MODEL_DIR={folder / run}")]
            gin_file = f"--gin_file={arguments.gin_file}"
            took = cpu_seconds("robust_ft.train", [gin_file, *given], folder, side)
            print(f"{run}: {took:.1f} CPU-s", flush=True)
            return took

        job = {
            kind: train(f"job_{kind}", "job", [f"HELD_OUT_TASKS={ {0: tasks} }"])
            for kind in ("cold", "warm")
        }
        each = [train(task, "alone", alone(recipe, task)) for task in tasks]
        first = train(f"{tasks[0]}_warm", "alone", alone(recipe, tasks[0]))
    processes = {"cold": sum(each), "warm": sum([first, *each[1:]])}
    for kind in ("cold", "warm"):
        print(
            f"{len(tasks)} tasks, compile caches {kind}: one job {job[kind]:.1f} CPU-s, one "
            f"process a task {processes[kind]:.1f}, {processes[kind] / job[kind]:.1f} times as many"
        )
    if arguments.json:
        write_json(arguments.json, {"tasks": tasks, "job": job, "processes": processes})


if __name__ == "__main__":
    main()
