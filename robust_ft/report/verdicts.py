"""What finetuning did to the target and to the other tasks, in words."""

import dataclasses
from collections.abc import Mapping, Sequence

from robust_ft.report.results import (
    NORM_AVG,
    Cell,
    Column,
    aggregate,
    ends_kept,
    joined,
    methods,
    pretrained_rows,
    quantity_column,
    selected_rows,
)
from robust_ft.report.runs import Run

KEEPS = 0.9  # a method keeps the other tasks if this share of their score is left
GAINS = 1.02


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What finetuning did: score on the target and on the other tasks, before and after.

    Attributes:
        without: The PEFT methods that the other tasks were evaluated without, if any.
        others_kept: The score on the other tasks with them, if it is known.
    """

    method: str
    target: str
    target_before: float | None
    target_after: float | None
    others_before: float | None
    others_after: float | None
    without: tuple[str, ...] = ()
    others_kept: float | None = None

    @property
    def how(self) -> str:
        """How the other tasks were evaluated, `` if with all that was trained."""
        return f"evaluated without {joined(self.without)}" if self.without else ""

    @property
    def word(self) -> str:
        """`loses`, `keeps` or `improves` (the other tasks), or `` if they were not measured."""
        if not self.others_before or self.others_after is None:
            return ""
        left = self.others_after / self.others_before
        return "loses" if left < KEEPS else "improves" if left > GAINS else "keeps"


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Returns what each method did to the target and to the other tasks, from its last stage."""
    verdicts = []
    with_all = ends_kept(runs)
    for name, group in methods(runs).items():
        before = aggregate([pretrained_rows(run) for run in group])
        after = aggregate([selected_rows(run, run.stages[-1]) for run in group])
        target, other_tasks = (quantity_column(group[0], q) for q in ("target", NORM_AVG))
        end = after.get(other_tasks) if other_tasks else None
        verdicts.append(
            Verdict(
                method=name,
                target=group[0].target,
                target_before=_mean(before, target),
                target_after=_mean(after, target),
                others_before=_mean(before, other_tasks),
                others_after=_mean(after, other_tasks),
                without=end.without if end else (),
                others_kept=with_all[name].mean if name in with_all else None,
            )
        )
    return verdicts


def _mean(cells: Mapping[Column, Cell], column: Column | None) -> float | None:
    cell = cells.get(column) if column else None
    return cell.mean if cell else None


def headline(verdicts: Sequence[Verdict], numbers: bool = True) -> str:
    """Returns one sentence on what the methods did to the other tasks, the worst one first.

    Args:
        verdicts: The verdicts of all methods; for more than three, the sentence only counts those
            that keep the other tasks.
        numbers: Whether to give the scores before and after.
    """
    known = [v for v in verdicts if v.others_before and v.others_after is not None]
    if len(known) > 3:
        kept = [v for v in known if v.word != "loses"]
        off = sum(bool(v.without) for v in kept)
        how = f", {off} of them evaluated without what they trained" if off else ""
        return f"{len(kept)} of {len(known)} methods keep the other tasks{how}"
    parts = []
    for v in sorted(known, key=lambda v: (v.others_after or 0) - (v.others_before or 0)):
        how = f", {v.how}" if v.how else ""
        scores = f"{v.others_before:.0f} → {v.others_after:.0f}"
        if v.others_kept is not None:
            scores += f"; {v.others_kept:.0f} with {joined(v.without)}"
        parts.append(f"{v.method} {v.word} the other tasks{how}" + f" ({scores})" * numbers)
    return "; ".join(parts)
