"""The papers' comparisons on the mini world, over several seeds.

    python benchmarks/mini_world.py promot --seeds=5
    python benchmarks/mini_world.py promot --seeds=5 --sweep

Runs each recipe once per seed (finished runs are skipped, unfinished ones resume), then writes the
report over all of them: report.md holds the table of docs/results.md. Which of the papers' claims
such runs bear out is told by benchmarks/claims.py.

With --sweep every recipe runs with 0.3, 1 and 3 times its learning rate, and stands in the report
with the one that in-distribution validation chooses (robust_ft.sweep).
"""

import argparse
import sys
from pathlib import Path

import runs

from robust_ft import report
from robust_ft.errors import UserError

ARMS = ("p3_none", "p3_mtl_t", "p3_mtl_p", "p3_mtl_tp", "p3_fomaml", "p3_reptile")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, counted from 0")
    parser.add_argument("--output", type=Path, help="by default /tmp/robust_ft/mini_<comparison>")
    parser.add_argument("--jobs", type=int, default=runs.default_jobs(), help="runs at a time")
    parser.add_argument("--sweep", action="store_true", help="choose learning rates on validation")
    arguments = parser.parse_args()
    if arguments.sweep and arguments.comparison == "promptability":
        parser.error(
            "--sweep: the arms of promptability keep their last checkpoint, so none selects"
        )
    output = arguments.output or Path(f"/tmp/robust_ft/mini_{arguments.comparison}")
    arms = [runs.arm(name) for name in COMPARISONS[arguments.comparison]]
    try:
        replicates = runs.replicates(arguments.seeds)
        todo = [(arm, replicate) for replicate in replicates for arm in arms]
        runner = runs.Runner(output)
        if arguments.sweep:
            runner.sweep_all(arms, arguments.seeds, arguments.jobs)
            report.write_report([runner.sweep_folder(arm) for arm in arms], output)
            return 0
        failed = sum(not ok for *_, ok in runner.run_all(todo, arguments.jobs))
        if failed:
            raise UserError(f"{failed} of {len(todo)} runs failed; the same command goes on.")
        report.write_report([runner.folder(*each) for each in todo], output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
