"""Promptability: accuracy under each template, ARG, and whether arms differ by more than chance.

An arm is a method, as elsewhere in a report: runs that differ in nothing but their seed. ARG is the
average relative gain over guessing, `metrics.arg`. It is computed from all templates or not at
all: means over other sets of templates say nothing about each other.
"""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from robust_ft.metrics.significance import Bootstrap, summary_of_draws
from robust_ft.report import few_shot, results
from robust_ft.report.comparisons import DRAWS
from robust_ft.report.few_shot import Evaluated, Setting, Template
from robust_ft.report.runs import Run
from robust_ft.report.significance import is_significant, welch

Answers = Mapping[Template, Bool[np.ndarray, "runs seeds examples"]]
"""For each template whether each run, with each draw of examples, answered each example right."""

Key = tuple[str, Setting]  # of a cell: arm and setting


@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
    """The ARG of an arm in one setting.

    Attributes:
        mean: The mean over seeds, in percent; 0 is guessing.
        sd: Their sample standard deviation; None for one seed.
        runs: ARG of each run, the mean over its draws of examples.
        draws: ARG in each draw of a bootstrap over evaluated examples.
    """

    mean: float
    sd: float | None
    runs: tuple[float, ...]
    draws: Float[np.ndarray, "draws"]

    @property
    def text(self) -> str:
        """Returns `30.2 ± 1.1`."""
        return f"{self.mean:.1f}" + ("" if self.sd is None else f" ± {self.sd:.1f}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm in one setting.

    Attributes:
        accuracies: 0..100 of each template, the mean over runs and draws of examples.
        gain: ARG as the mean over templates; None if it cannot be compared (`Promptability.notes`).
        gain_by_dataset: ARG averaged within datasets first.
    """

    accuracies: Mapping[Template, float]
    gain: Gain | None
    gain_by_dataset: Gain | None


class Difference(NamedTuple):
    """The ARG of one cell minus that of another.

    Attributes:
        difference: In points of ARG.
        p_value: Of Welch's t-test over the runs' seeds, two-sided; None if a side has one run.
        bootstrap: Paired over evaluated examples.
    """

    difference: float
    p_value: float | None
    bootstrap: Bootstrap

    @property
    def is_significant(self) -> bool:
        """Whether both tests, or the one there is, say so at 5%."""
        return is_significant(self.p_value, self.bootstrap)


@dataclasses.dataclass(frozen=True)
class Promptability:
    """What a report says about few-shot evaluations.

    Attributes:
        arms: Names of the arms.
        settings: 0 shots first, then the last epoch, then the best.
        templates: All that were evaluated, by dataset.
        cells: What was measured, by arm and setting.
        without: PEFT methods that an arm's 0-shot evaluation was without, where it is recorded.
        best_on: How best epochs were chosen, where it is recorded: `FewShot.best_on`.
        notes: A sentence for each ARG that is left out, and why.
        seeds: The largest number of runs of an arm, and of draws of examples of a run.
    """

    arms: tuple[str, ...]
    settings: tuple[Setting, ...]
    templates: tuple[Template, ...]
    cells: Mapping[Key, Cell]
    without: Mapping[str, tuple[str, ...]]
    best_on: tuple[str, ...]
    notes: tuple[str, ...]
    seeds: tuple[int, int]

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(template.dataset for template in self.templates))

    def differences(self, setting: Setting) -> dict[tuple[str, str], Difference]:
        """Returns each pair of arms' difference in a setting; ARG is the mean over templates."""
        gains = [(arm, self._gain(arm, setting)) for arm in self.arms]
        return {
            (one, two): difference(first, second)
            for (one, first), (two, second) in itertools.combinations(gains, 2)
            if first is not None and second is not None
        }

    def _gain(self, arm: str, setting: Setting) -> Gain | None:
        cell = self.cells.get((arm, setting))
        return cell.gain if cell else None


def make_promptability(runs: Sequence[Run]) -> Promptability | None:
    """Returns what the few-shot files of runs say; None if there are none.

    Raises:
        UserError: A file is malformed.
    """
    arms: dict[str, list[list[Evaluated]]] = {}
    without: dict[str, tuple[str, ...]] = {}
    best_on: dict[str, None] = {}
    for name, group in results.methods(runs).items():
        recorded = [run.record.settings if run.record else {} for run in group]
        found = [few_shot.read(r.directory, s) for r, s in zip(group, recorded, strict=True)]
        if any(found):
            arms[name] = found
            off = recorded[0].get("few_shot.zero_shot_without")
            without[name] = tuple(map(str, off)) if isinstance(off, list) else ()
            best_on |= {str(settings.get("few_shot.best_on", "")): None for settings in recorded}
    if not arms:
        return None
    everything = [evaluated for group in arms.values() for run in group for evaluated in run]
    templates = _by_dataset(evaluated.template for evaluated in everything)
    settings = sorted(
        {evaluated.setting for evaluated in everything},
        key=lambda setting: (setting.shots, few_shot.WHICH.index(setting.which)),
    )
    answers: dict[Key, Answers] = {
        (arm, setting): _answers([[e for e in run if e.setting == setting] for run in group])
        for (arm, group), setting in itertools.product(arms.items(), settings)
    }
    tunings = [{e.seed for e in run if e.setting.shots} for run in itertools.chain(*arms.values())]
    return Promptability(
        tuple(arms),
        tuple(settings),
        templates,
        _cells(answers, templates),
        without,
        tuple(best_on),
        _notes(answers, templates),
        (max(map(len, arms.values())), max(map(len, tunings))),
    )


def _by_dataset(templates: Iterable[Template]) -> tuple[Template, ...]:
    found = dict.fromkeys(templates)
    datasets = list(dict.fromkeys(template.dataset for template in found))
    return tuple(sorted(found, key=lambda template: datasets.index(template.dataset)))


def _answers(runs: Sequence[Sequence[Evaluated]]) -> Answers:
    """Returns the answers under the templates that all runs have, with all draws of examples."""
    found = [{(e.template, e.seed): e.correct for e in run} for run in runs]
    keys = dict.fromkeys(key for run in found for key in run)
    seeds = sorted({seed for _, seed in keys}, key=str)
    return {
        template: np.array([[run[template, seed] for seed in seeds] for run in found])
        for template in dict.fromkeys(template for template, _ in keys)
        if all((template, seed) in run for run in found for seed in seeds)
    }


def _notes(answers: Mapping[Key, Answers], templates: Sequence[Template]) -> tuple[str, ...]:
    """Returns a sentence for each ARG that is left out."""
    if unknown := [t.task for t in templates if t.random_accuracy is None]:
        return (
            f"There is no ARG: the accuracy of guessing is unknown for '{unknown[0]}' "
            f"({len(unknown)} of {len(templates)} templates).",
        )
    notes = []
    for (arm, setting), found in answers.items():
        if missing := [template for template in templates if template not in found]:
            first = missing[0]
            notes.append(
                f"{arm} has no ARG at {setting.text}: not all of its runs were evaluated on "
                f"'{first.task}' ({first.split}, {first.num_examples} examples, random baseline "
                f"{first.random_accuracy:.1f}) with all draws of examples; {len(missing)} of "
                f"{len(templates)} templates are missing."
            )
    return tuple(notes)


def _cells(answers: Mapping[Key, Answers], templates: Sequence[Template]) -> dict[Key, Cell]:
    cells = {}
    counts: dict[tuple[str, int], Float[np.ndarray, "draws examples"]] = {}
    is_known = all(template.random_accuracy is not None for template in templates)
    weights = [gain_weights(templates, each) for each in (False, True)] if is_known else []
    for key, found in answers.items():
        accuracies = {t: 100 * float(found[t].mean()) for t in templates if t in found}
        if not weights or len(found) < len(templates):
            cells[key] = Cell(accuracies, None, None)
            continue
        # [runs, seeds, templates] and [draws, templates]
        measured = 100 * np.stack([found[t].mean(axis=2) for t in templates], axis=2)
        drawn = np.stack(
            [100 * _counts(t, counts) @ found[t].mean(axis=(0, 1)) for t in templates], axis=1
        )
        cells[key] = Cell(accuracies, *(_gain(measured, drawn, templates, w) for w in weights))
    return cells


def gain_weights(templates: Sequence[Template], by_dataset: bool) -> Float[np.ndarray, "templates"]:
    """Returns what one point of accuracy under each template adds to ARG.

    Args:
        templates: Templates with known random baselines, which may differ within a dataset.
        by_dataset: Whether to average within datasets first.
    """
    sizes = collections.Counter(template.dataset for template in templates)
    shares = [
        1 / (len(sizes) * sizes[template.dataset] if by_dataset else len(templates))
        for template in templates
    ]
    weights: Float[np.ndarray, "templates"] = 100 * np.array(shares) / _baselines(templates)
    return weights


def _baselines(templates: Sequence[Template]) -> Float[np.ndarray, "templates"]:
    return np.array([template.random_accuracy for template in templates], np.float64)


def _counts(
    template: Template, cache: dict[tuple[str, int], Float[np.ndarray, "draws examples"]]
) -> Float[np.ndarray, "draws examples"]:
    """Returns the share of each example in each draw.

    It is drawn once for all templates of a dataset, which word the same examples, and for all arms.
    """
    key = template.dataset, template.num_examples
    if key not in cache:
        rng = np.random.default_rng(zlib.crc32(f"{template.dataset} {key[1]}".encode()))
        cache[key] = rng.multinomial(key[1], np.full(key[1], 1 / key[1]), DRAWS) / key[1]
    return cache[key]


def _gain(
    measured: Float[np.ndarray, "runs seeds templates"],
    drawn: Float[np.ndarray, "draws templates"],
    templates: Sequence[Template],
    weights: Float[np.ndarray, "templates"],
) -> Gain:
    chance = _baselines(templates)
    gains = (measured - chance) @ weights  # [runs, seeds]
    runs = gains.mean(axis=1)
    _, sd = results.spread((runs if len(runs) > 1 else gains[0]).tolist())
    return Gain(float(runs.mean()), sd, tuple(runs.tolist()), (drawn - chance) @ weights)


def difference(first: Gain, second: Gain) -> Difference:
    """Compares two cells on the same templates."""
    mean = first.mean - second.mean
    bootstrap = summary_of_draws(mean, first.draws - second.draws)
    return Difference(mean, welch(first.runs, second.runs), bootstrap)
