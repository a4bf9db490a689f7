"""ProMoT's comparison on the mini world, over several seeds.

    python benchmarks/promot_mini.py --seeds=5 --output=/tmp/robust_ft/promot_mini

Runs each recipe once per seed (finished runs are skipped, unfinished ones resume), then writes the
report over all of them: report.md holds the table of docs/results.md.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from robust_ft import report

ROOT = Path(__file__).parent.parent
RECIPES = ("full_rte", "promot_rte", "prompt_rte", "joint_rte", "random_prompt_rte")


def train(recipe: str, seed: int, output: Path) -> Path:
    """Runs one recipe with one seed in a process of its own; returns its folder."""
    folder = output / f"{recipe}_seed{seed}"
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "robust_ft.train", f"--gin_file=gin_configs/{recipe}.gin"]
    command += [f"--gin.MODEL_DIR={folder}", f"--gin.RANDOM_SEED={seed}"]
    with open(output / f"{recipe}_seed{seed}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    print(f"{recipe} seed {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}")
    done.check_returncode()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, counted from 0")
    parser.add_argument("--output", type=Path, default=Path("/tmp/robust_ft/promot_mini"))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    arguments = parser.parse_args()
    # The first run fills the caches of data and compiled programs for the others.
    todo = [(recipe, seed) for seed in range(arguments.seeds) for recipe in arguments.recipes]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        first = train(*todo[0], arguments.output)
        folders = [first, *pool.map(lambda run: train(*run, arguments.output), todo[1:])]
    report.write_report(folders, arguments.output)


if __name__ == "__main__":
    main()
