"""Names of tasks that are derived from other tasks: made and parsed here, and nowhere else.

  <task>_<k>shot     k exemplars from the training split before each input
  <task>_shuffled    each input with the target of another example
  <task>_ood         out-of-distribution data of the same task, by convention of who registers it

`_seed<n>` behind the first two draws anew: `rte_4shot_seed1`. Names nest: the exemplars of
`rte_shuffled_1shot` have shuffled targets.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_DERIVED = re.compile(
    r"(?P<base>.+)_(?:(?P<shots>[1-9][0-9]*)shot|shuffled)(?:_seed(?P<seed>0|[1-9][0-9]*))?"
)
_OOD = "_ood"


class DerivedName(NamedTuple):
    """The parts of a derived task's name; `str` puts them together.

    Attributes:
        base: Name of the task that it is derived from, itself possibly derived.
        shots: Number of exemplars; 0 for the label-shuffled version.
        seed: What is drawn is a function of it; None where the name says none (then it is 0).
    """

    base: str
    shots: int
    seed: int | None = None

    def __str__(self) -> str:
        version = f"{self.shots}shot" if self.shots else "shuffled"
        return f"{self.base}_{version}" + ("" if self.seed is None else f"_seed{self.seed}")


def with_shots(task: str, shots: int) -> str:
    """Returns the name of a task's k-shot version; for 0 shots that is the task itself."""
    return str(DerivedName(task, shots)) if shots else task


def parse(name: str) -> DerivedName | None:
    """Returns the parts of a derived task's name, or None if it has not the form of one."""
    match = _DERIVED.fullmatch(name)
    if match is None:
        return None
    seed = None if match["seed"] is None else int(match["seed"])
    return DerivedName(match["base"], int(match["shots"] or 0), seed)


def lineage(name: str) -> Iterator[str]:
    """Yields a task's name and the names of all it comes from: `a_ood_1shot`, `a_ood`, `a`."""
    while True:
        yield name
        if (derived := parse(name)) is not None:
            name = derived.base
        elif name.removesuffix(_OOD) not in ("", name):
            name = name.removesuffix(_OOD)
        else:
            return
