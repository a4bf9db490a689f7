"""`sweep.json`: what a sweep tries, how each value does on validation, and which one is chosen."""

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft.errors import UserError
from robust_ft.files import as_path, read_json_object, write_json

FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Tried:
    """A point of the grid: a value for each setting, and the runs with these.

    Attributes:
        values: {setting: value}, such as {"LEARNING_RATE": 0.001}.
        folder: The folder of its run below that of the sweep, or of its seeds' runs.
        scores: {seed: validation score}; NaN for a run that diverged.
        diverged: {seed: how}, a sentence each.
    """

    values: Mapping[str, Any]
    folder: str
    scores: Mapping[int, float] = dataclasses.field(default_factory=dict)
    diverged: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The values in words, such as `LEARNING_RATE 0.001`."""
        return ", ".join(f"{name} {shown(value)}" for name, value in self.values.items())

    def score(self, seeds: Sequence[int]) -> float:
        """Returns the mean over seeds, NaN if one diverged or is missing."""
        return statistics.fmean(self.scores.get(seed, math.nan) for seed in seeds)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep and how far it has come.

    Attributes:
        name: The recipe's.
        by: The stage or the selection whose validation score chooses.
        on: What that score is of, such as ("mini_rte validation",).
        seeds: The seeds that each value runs with.
        tried: The points of the grid, in its order.
        notes: Sentences on the data it chooses by.
    """

    name: str
    by: str
    on: tuple[str, ...]
    seeds: tuple[int, ...]
    tried: tuple[Tried, ...]
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each setting, in order."""
        names = self.tried[0].values
        return {n: _distinct(point.values[n] for point in self.tried) for n in names}

    @property
    def left(self) -> int:
        """The number of runs without a score."""
        return sum(seed not in point.scores for point in self.tried for seed in self.seeds)

    @property
    def chosen(self) -> Tried | None:
        """The point with the best mean score over seeds.

        None until every run has a score. Of equal ones that with the smallest values: they change
        the model least. Where values are no numbers, the one that the grid has first. A point of
        which a run diverged is never chosen; None if every point has one.
        """
        return None if self.left else min(self._best, key=self._size, default=None)

    @property
    def _best(self) -> list[Tried]:
        """The points with the best score."""
        scores = [point.score(self.seeds) for point in self.tried]
        best = max((s for s in scores if not math.isnan(s)), default=math.nan)
        return [point for point, score in zip(self.tried, scores, strict=True) if score == best]

    def _size(self, point: Tried) -> list[float]:
        """Returns what orders points from small to large, setting by setting."""
        grid = self.grid
        return [
            float(value) if all(map(is_number, grid[name])) else grid[name].index(value)
            for name, value in point.values.items()
        ]

    @property
    def edges(self) -> dict[str, str]:
        """{setting: "smallest" or "largest"} where the chosen value is at the edge of its grid."""
        if (chosen := self.chosen) is None:
            return {}
        edges = {}
        for name, values in self.grid.items():
            if all(map(is_number, values)) and len(values) > 1:
                ends = {min(values): "smallest", max(values): "largest"}
                if end := ends.get(chosen.values[name]):
                    edges[name] = end
        return edges

    def with_score(self, point: Tried, seed: int, score: float, how: str = "") -> "Sweep":
        """Returns the sweep with one more score.

        Args:
            point: One of its points.
            seed: The run's seed.
            score: Its validation score.
            how: How it diverged, a sentence; "" for a run that did not.
        """

        def added(each: Tried) -> Tried:
            if each.folder != point.folder:
                return each
            diverged = {**each.diverged, seed: how} if how else each.diverged
            return dataclasses.replace(each, scores={**each.scores, seed: score}, diverged=diverged)

        return dataclasses.replace(self, tried=tuple(map(added, self.tried)))

    def sentences(self) -> list[str]:
        """Returns what is to be said of the choice: edges, ties, runs that diverged."""
        best, every = len(self._best), len(self.tried)
        found = [
            f"The best {name} is the {end} that was tried; extend the grid."
            for name, end in self.edges.items()
            if best < every
        ]
        if self.chosen is not None and best > 1:
            which = f"All {every}" if best == every else f"{best} of {every}"
            found.append(f"{which} are equally good on validation; the smallest is chosen.")
        for point in self.tried:
            found += [
                f"{point.name}, seed {seed}, diverged and counts as the worst: {how}"
                for seed, how in point.diverged.items()
            ]
        return [*found, *self.notes]

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes the file, which readers find whole or as it was."""
        chosen = self.chosen
        fields = {
            "name": self.name,
            "by": self.by,
            "on": list(self.on),
            "seeds": list(self.seeds),
            "grid": self.grid,
            "tried": [
                {
                    "values": dict(point.values),
                    "folder": point.folder,
                    "score": _or_none(point.score(self.seeds)),
                    "scores": {str(s): _or_none(score) for s, score in point.scores.items()},
                    "diverged": {str(seed): how for seed, how in point.diverged.items()},
                }
                for point in self.tried
            ],
            "chosen": chosen and {"values": dict(chosen.values), "folder": chosen.folder},
            "edges": self.edges,
            "sentences": self.sentences(),
            "notes": list(self.notes),
        }
        write_json(as_path(directory) / FILE, fields)

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> "Sweep | None":
        """Returns the sweep in a folder, None if it holds none.

        Raises:
            UserError: Its file is broken.
        """
        file: Path = as_path(directory) / FILE
        fields = read_json_object(file, default={})
        if not fields:
            return None
        try:
            tried = [
                Tried(
                    dict(point["values"]),
                    str(point["folder"]),
                    {int(s): _number(score) for s, score in point["scores"].items()},
                    {int(seed): str(how) for seed, how in point["diverged"].items()},
                )
                for point in fields["tried"]
            ]
            names = str(fields["name"]), str(fields["by"]), tuple(map(str, fields["on"]))
            seeds, notes = tuple(map(int, fields["seeds"])), tuple(map(str, fields["notes"]))
            return cls(*names, seeds, tuple(tried), notes)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"'{file}' is no sweep of robust_ft, or a newer one's.") from None


def is_number(value: Any) -> bool:
    """Returns whether a value of a grid is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Returns a value of a grid as people write it: 0.001, adamw, [1, 2]."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns the points of a grid, the last setting's values fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _or_none(score: float) -> float | None:
    return None if math.isnan(score) else score


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)
