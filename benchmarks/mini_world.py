"""The papers' comparisons on the mini world, over several seeds.

    python benchmarks/mini_world.py promot --seeds=5

Runs each recipe once per seed (finished runs are skipped, unfinished ones resume), then writes the
report over all of them: report.md holds the table of docs/results.md. Of promptability, claims.md
says besides which of the paper's claims held.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import promptability_claims

from robust_ft import report

ROOT = Path(__file__).parent.parent
ARMS = ("p3_none", "p3_mtl_t", "p3_mtl_p", "p3_mtl_tp", "p3_fomaml", "p3_reptile")
# A run is called after its gin files: a recipe, and what methods/ adds to it.
COMPARISONS = {
    "promot": ("full_rte", "promot_rte", "prompt_rte", "joint_rte", "random_prompt_rte"),
    "promot_variants": ("full_rte_1shot", "promot_rte_1shot", "promot_lora", "promot_multitask"),
    "webnlg": (
        "full_webnlg",
        "prefix_webnlg",
        "adapters_webnlg",
        "ft_top2_webnlg",
        "bitfit_webnlg",
    ),
    "cocktails": ("table2_webnlg",),
    "promptability": (*ARMS, *(f"{arm}+deep_prompt" for arm in ARMS)),
}


def gin_files(name: str) -> list[str]:
    """Returns the gin files of a run's name."""
    recipe, *added = name.split("+")
    files = [f"gin_configs/{recipe}.gin", *(f"gin_configs/methods/{each}.gin" for each in added)]
    return [f"--gin_file={file}" for file in files]


def train(name: str, seed: int, output: Path) -> Path:
    """Runs one recipe with one seed in a process of its own; returns its folder."""
    folder = output / f"{name}_seed{seed}"
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "robust_ft.train", *gin_files(name)]
    command += [f"--gin.MODEL_DIR={folder}", f"--gin.RANDOM_SEED={seed}"]
    with open(output / f"{name}_seed{seed}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    print(f"{name} seed {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}")
    done.check_returncode()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, counted from 0")
    parser.add_argument("--output", type=Path, help="by default /tmp/robust_ft/mini_<comparison>")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    arguments = parser.parse_args()
    output = arguments.output or Path(f"/tmp/robust_ft/mini_{arguments.comparison}")
    names = COMPARISONS[arguments.comparison]
    # The first run fills the caches of data and compiled programs for the others.
    todo = [(name, seed) for seed in range(arguments.seeds) for name in names]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        first = train(*todo[0], output)
        folders = [first, *pool.map(lambda run: train(*run, output), todo[1:])]
    report.write_report(folders, output)
    if arguments.comparison == "promptability":
        promptability_claims.write(folders, output / "claims.md")


if __name__ == "__main__":
    main()
