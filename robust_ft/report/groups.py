"""Tells runs apart that differ in more than their seed, so that they are never averaged."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robust_ft.errors import UserError
from robust_ft.report.runs import Run

if TYPE_CHECKING:
    from robust_ft.run_record import RunRecord

SEED = "seed"
_SHOWN = 40  # characters of a value


@dataclasses.dataclass(frozen=True)
class Difference:
    """A setting in which runs of one name differ: its value in each group, by its new name."""

    field: str
    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Runs under names that only seeds share.

    Attributes:
        runs: The runs; of a name that several settings had, each has a name of its own.
        differences: What is different between them.
        unknown: The names of runs whose settings were not recorded (by versions before 0.2).
    """

    runs: tuple[Run, ...]
    differences: tuple[Difference, ...] = ()
    unknown: tuple[str, ...] = ()


def by_settings(runs: Sequence[Run]) -> Groups:
    """Groups runs of one name by their settings.

    Raises:
        UserError: Two runs have the same settings and the same seed.
    """
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    names: dict[int, str] = {}
    differences: list[Difference] = []
    for name, of_name in named.items():
        groups = _split(of_name)
        found = _differences(groups)
        for label, group in zip(_labels(name, groups, found), groups, strict=True):
            names |= {id(run): label for run in group}
        differences += [
            Difference(
                field, {names[id(g[0])]: _shown(v) for g, v in zip(groups, values, strict=False)}
            )
            for field, values in found.items()
        ]
    renamed = tuple(dataclasses.replace(run, name=names[id(run)]) for run in runs)
    _check_seeds(renamed)
    unknown = dict.fromkeys(run.name for run in renamed if run.record is None)
    return Groups(renamed, tuple(differences), tuple(unknown))


def _split(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the groups, those whose settings are unknown last."""
    groups: list[list[Run]] = []
    for run in runs:
        if run.record is None:
            continue
        for group in groups:
            if group[0].record is not None and not _between(group[0].record, run.record):
                group.append(run)
                break
        else:
            groups.append([run])
    unknown = [run for run in runs if run.record is None]
    return [*groups, unknown] if unknown else groups


def _between(one: "RunRecord", other: "RunRecord") -> dict[str, tuple[Any, Any]]:
    """Returns {field: both values} in which two records differ, the seed aside."""
    fields = {d.field: (d.recorded, d.now) for d in one.differences(other) if d.field != SEED}
    if one.changes != other.changes:
        fields["changed in the middle of the run"] = (_changes(one), _changes(other))
    return fields


def _changes(record: "RunRecord") -> str:
    return "; ".join(
        f"{c.field} {c.before} → {c.after} at step {c.step} of '{c.stage}'" for c in record.changes
    )


def _differences(groups: Sequence[Sequence[Run]]) -> dict[str, list[Any]]:
    """Returns {field: its value in each group} for what is not the same in all."""
    records = [group[0].record for group in groups]
    known = [record for record in records if record is not None]
    fields: dict[str, list[Any]] = {}
    for index, record in enumerate(known[1:], start=1):
        for field, (first, other) in _between(known[0], record).items():
            values = fields.setdefault(field, [first] * len(known))
            values[index] = other
    return fields


def _labels(
    name: str, groups: Sequence[Sequence[Run]], differences: Mapping[str, Sequence[Any]]
) -> list[str]:
    if len(groups) == 1:
        return [name]
    known = [group for group in groups if group[0].record is not None]
    labels = [f"{name} ({chr(ord('A') + i % 26)}{i // 26 or ''})" for i in range(len(known))]
    if len(differences) == 1:
        ((field, values),) = differences.items()
        plain = all(isinstance(value, int | float | bool) for value in values)
        if plain and len(set(values)) == len(values):
            leaf = field.rpartition(".")[2].replace("_", " ")
            labels = [f"{name}, {leaf} {value}" for value in values]
    if len(known) == 1:
        labels = [name]
    return labels + [f"{name} (settings unknown)"] * (len(groups) - len(known))


def _check_seeds(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.name, run.seed), run)
        if other is not run:
            raise UserError(
                f"Both {other.directory} and {run.directory} are {run.name} with seed {run.seed}; "
                "give each run once, and give repeated runs different seeds."
            )


def _shown(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
