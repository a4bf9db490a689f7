"""The papers' claims on the mini world: which held, over checkpoints and seeds.

    python benchmarks/claims.py --seeds 3 --checkpoints asset:mini /models/mini_seed1

Makes the runs that the claims need, each once (finished ones are skipped, unfinished ones resume),
and writes claims.md and claims.json: first with one run of each kind, paper by paper, then again
with each further checkpoint and seed. With `--sweep` every arm has the learning rates that
in-distribution validation chooses (robust_ft.sweep), otherwise those of its recipe. `--only` takes
claims by the names that claims.json has, `--papers` all of some papers; `--list` says which runs
are left and how long they may take. Flags like `--gin.TEST_LIMIT=50` go to all runs. Needs no
accelerator.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import papers
import runs
from papers import table
from papers.claim import Claim

from robust_ft.errors import UserError, nearest

OUTPUT = Path("/tmp/robust_ft/claims")


def chosen(names: Sequence[str], of_papers: Sequence[str]) -> dict[str, Claim]:
    """Returns the claims that flags name, all of them if they name none.

    Raises:
        UserError: There is no such paper or claim.
    """
    claims = papers.claims()
    for paper in of_papers:
        if paper not in papers.PAPERS:
            raise UserError(f"There is no paper '{paper}'.{nearest(paper, papers.PAPERS)}")
    for name in names:
        if name not in claims:
            raise UserError(f"There is no claim '{name}'.{nearest(name, claims)}")
    return {
        name: claim
        for name, claim in claims.items()
        if name in names or name.partition(".")[0] in of_papers or not (names or of_papers)
    }


def passes(
    claims: Mapping[str, Claim], replicates: Sequence[runs.Replicate]
) -> list[tuple[runs.Arm, runs.Replicate]]:
    """Returns all runs: every arm with the first replicate, then with the next."""
    arms = table.arms(claims.values())
    return [(arm, replicate) for replicate in replicates for arm in arms]


def make(
    claims: Mapping[str, Claim],
    runner: runs.Runner,
    replicates: Sequence[runs.Replicate],
    jobs: int,
) -> tuple[list[table.Row], int]:
    """Makes the runs, and the table whenever those of a paper are there with one more replicate.

    Returns:
        Its rows, and how many runs failed.
    """
    failed, output = 0, runner.output.parent
    order = table.arms(claims.values())
    of_papers = [table.arms(_of(claims, paper)) for paper in papers.PAPERS]
    last = {max(arms, key=order.index) for arms in of_papers if arms}
    for arm, _, ok in runner.run_all(passes(claims, replicates), jobs):
        failed += not ok
        if arm in last:
            table.write(table.make_rows(claims, runner, replicates), output)
    rows = table.make_rows(claims, runner, replicates)
    table.write(rows, output)
    return rows, failed


def _of(claims: Mapping[str, Claim], paper: str) -> list[Claim]:
    return [claim for name, claim in claims.items() if name.partition(".")[0] == paper]


def _keeps_last(arm: runs.Arm) -> bool:
    """Whether an arm is one of promptability, which keep their last checkpoint: none selects."""
    return arm in papers.PAPERS["promptability"].arms


def show(runner: runs.Runner, todo: Sequence[tuple[runs.Arm, runs.Replicate]], jobs: int) -> None:
    """Prints the runs and how long they may take."""
    known: list[float] = []
    for (arm, replicate), minutes in zip(todo, runner.minutes(todo), strict=True):
        words = "unknown" if minutes is None else f"{minutes:.1f} min" if minutes else "finished"
        known += [minutes] if minutes else []
        print(f"{arm.name} {replicate.name}: {words}")
    left = sum(not runner.is_finished(*each) for each in todo)
    minutes_left = sum(known) / jobs
    print(
        f"{len(todo)} runs, {left} left; the {len(known)} whose arms have run before take about "
        f"{minutes_left:.0f} minutes, {jobs} at a time."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", nargs="+", default=[], metavar="PAPER",
                        help=", ".join(papers.PAPERS))  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="CLAIM",
                        help="such as promot.forgetting")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0")
    parser.add_argument("--checkpoints", nargs="+", default=[runs.SHIPPED], metavar="PATH",
                        help="pretrained models, by default the shipped one")  # fmt: skip
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--jobs", type=int, default=runs.default_jobs(), help="runs at a time")
    parser.add_argument("--sweep", action="store_true", help="choose learning rates on validation")
    parser.add_argument("--list", action="store_true", help="say what is left to run, run nothing")
    known, others = parser.parse_known_args(arguments)
    if unknown := [flag for flag in others if not flag.startswith("--gin.")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        if known.jobs < 1:
            raise UserError(f"--jobs={known.jobs} must be at least 1.")
        claims = chosen(known.only, known.papers)
        replicates = runs.replicates(known.seeds, known.checkpoints)
        settings = [flag.removeprefix("--gin.") for flag in others]
        runner = runs.Runner(known.output / "runs", {"": settings})
        if known.list:
            show(runner, passes(claims, replicates), known.jobs)
            return 0
        if known.sweep:
            selecting = [arm for arm in table.arms(claims.values()) if not _keeps_last(arm)]
            runner.sweep_all(selecting, 1, known.jobs)
        rows, failed = make(claims, runner, replicates, known.jobs)
        print((known.output / "claims.md").read_text(encoding="utf-8"))
        if failed:
            raise UserError(f"{failed} runs failed; the same command goes on with them.")
        if missing := [row.name for row in rows if row.verdict is None]:
            raise UserError(f"{len(missing)} claims could not be measured, {missing[0]} for one.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
