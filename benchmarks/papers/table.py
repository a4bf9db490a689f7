"""The table of claims: a row each, as data (claims.json) and in Markdown (claims.md)."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import SEEDS_EACH, SHIPPED, Arm, Replicate, Runner

from papers import PAPERS
from papers.claim import Claim
from papers.verdict import CANNOT_SHOW, HELD, NOT_HELD, Runs, Verdict, tell
from robust_ft.errors import UserError
from robust_ft.files import write_atomically, write_json
from robust_ft.report.table import markdown_table

RULE = (
    "A claim held if the first model's mean is above the second's and the difference is "
    "significant at 5% by both tests, or by the one that there is: Welch's two-sided t-test over "
    "runs (checkpoints × seeds), p, and a paired bootstrap over test examples, whose 95% interval "
    "is in brackets. “No worse by 2 or more” is the same question with 2 points added to the "
    "first model, in p too. “Cannot show” is where scores leave no room for a difference. p is "
    "not corrected for the number of claims. What is selected, checkpoints and λ, is selected on "
    "ID validation alone."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim and what came out.

    Attributes:
        name: The claim's name behind its paper's, which `--only` takes.
        claim: The claim.
        replicates: The checkpoints and seeds of its runs; none for what is computed.
        verdict: What came out; None where runs are missing.
        missing: Why, a sentence; "" otherwise.
        made: The versions of the code that made its runs.
        chosen: {arm: settings} that a sweep chose.
    """

    name: str
    claim: Claim
    replicates: tuple[Replicate, ...]
    verdict: Verdict | None
    missing: str = ""
    made: tuple[str, ...] = ()
    chosen: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({replicate.seed for replicate in self.replicates}))

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(replicate.checkpoint for replicate in self.replicates))

    @property
    def command(self) -> str:
        """The command that makes the row."""
        command = f"python benchmarks/claims.py --only {self.name}"
        if self.chosen:
            command += " --sweep"
        if self.replicates:
            command += f" --seeds {max(seed % SEEDS_EACH for seed in self.seeds) + 1}"
        if self.checkpoints not in ((), (SHIPPED,)):
            command += f" --checkpoints {shlex.join(self.checkpoints)}"
        return command

    def to_json(self) -> dict[str, Any]:
        """Returns the row's JSON object."""
        claim, verdict = self.claim, self.verdict
        fields: dict[str, Any] = {
            "name": self.name,
            "claim": claim.words,
            "paper": claim.figure,
            "source": claim.source,
            "compared": claim.compared,
            "note": claim.note,
            "command": self.command,
            "checkpoints": list(self.checkpoints),
            "seeds": list(self.seeds),
            "runs": len(self.replicates),
            "code": list(self.made),
            "chosen": self.chosen,
        }
        if verdict is None:
            return fields | {"verdict": None, "why": self.missing}
        interval = verdict.bootstrap and [verdict.bootstrap.low, verdict.bootstrap.high]
        return fields | {
            "verdict": verdict.status,
            "why": verdict.why,
            "above": verdict.above,
            "below": verdict.below,
            "difference": verdict.difference,
            "margin": claim.margin,
            "p_value": verdict.p_value,
            "interval": interval,
        }


def make_rows(
    claims: Mapping[str, Claim], runner: Runner, replicates: Sequence[Replicate]
) -> list[Row]:
    """Returns a row for each claim, from the runs that have finished."""
    runs = Runs(runner, replicates)
    rows = []
    for name, claim in claims.items():
        found = runs.finished(claim.arms) if claim.arms else ()
        if claim.arms and not found:
            names = ", ".join(arm.name for arm in claim.arms)
            rows.append(Row(name, claim, (), None, f"no finished runs of {names}"))
            continue
        made = {runner.about(arm, each)["made"] for arm in claim.arms for each in found}
        try:
            verdict, missing = tell(claim, runs.measure(claim, found)), ""
        except UserError as error:  # a world without this task, say
            verdict, missing = None, str(error)
        chosen = {arm.name: dict(of) for arm in claim.arms if (of := runner.chosen(arm))}
        rows.append(Row(name, claim, found, verdict, missing, tuple(sorted(made)), chosen))
    return rows


def write(rows: Sequence[Row], output: Path) -> None:
    """Writes claims.json and claims.md."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "claims.json", [row.to_json() for row in rows])
    write_atomically(output / "claims.md", markdown(rows))


def counts(rows: Iterable[Row]) -> str:
    """Returns how many claims held: "3 held, 1 not held, 1 cannot show"."""
    told = [row.verdict.status for row in rows if row.verdict]
    return ", ".join(f"{told.count(s)} {s}" for s in (HELD, NOT_HELD, CANNOT_SHOW))


def markdown(rows: Sequence[Row]) -> str:
    """Returns the tables of all papers, what is missing, and claims that no run is about."""
    parts = ["# The papers' claims on the mini world", f"{counts(rows)}. {RULE}"]
    for paper in PAPERS.values():
        of_paper = [row for row in rows if row.name.startswith(f"{paper.name}.")]
        told = [row for row in of_paper if row.verdict]
        if of_paper:
            parts.append(f"## {paper.title}")
        if told:
            heads = [
                "claim",
                "the paper",
                "compared",
                "here",
                "checkpoints × seeds",
                "held?",
                "command",
            ]
            parts.append(markdown_table([heads, *map(_cells, told)]))
        if missing := [row for row in of_paper if not row.verdict]:
            lines = [f"- {row.claim.words}: {row.missing.rstrip('.')}." for row in missing]
            parts.append("Not measured:\n\n" + "\n".join(lines))
        if of_paper and paper.not_run:
            lines = [
                f"- {each.words} ({each.source}{_figure(each.figure)}): needs {each.why}."
                for each in paper.not_run
            ]
            parts.append("Claims that no recipe here is about:\n\n" + "\n".join(lines))
    if len({version for row in rows for version in row.made}) > 1:
        parts.append(
            "These runs were made with several versions of the code; claims.json has them."
        )
    return "\n\n".join(parts) + "\n"


def _figure(text: str) -> str:
    return "" if text == "–" else f": {text}"


def _cells(row: Row) -> list[str]:
    claim, verdict = row.claim, row.verdict
    assert verdict is not None
    means = " and ".join(map(_mean, (verdict.above, verdict.below)))
    held = f"**{verdict.status}**" + (f": {verdict.why}" if verdict.why else "")
    return [
        claim.words,
        f"{claim.figure} ({claim.source})",
        claim.compared,
        f"{means}: {verdict.text}",
        _runs(row),
        held + (f". {claim.note}" if claim.note else ""),
        f"`{row.command}`",
    ]


def _mean(side: tuple[float, float | None]) -> str:
    mean, sd = side
    return f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")


def _runs(row: Row) -> str:
    """Returns the number of runs of each side: checkpoints × seeds where all were run."""
    if not row.replicates:
        return "–"
    checkpoints, runs = len(row.checkpoints), len(row.replicates)
    seeds = len({seed % SEEDS_EACH for seed in row.seeds})
    return f"{checkpoints} × {seeds}" if checkpoints * seeds == runs else str(runs)


def arms(claims: Iterable[Claim]) -> list[Arm]:
    """Returns all arms of some claims, in their order."""
    return list(dict.fromkeys(arm for claim in claims for arm in claim.arms))
