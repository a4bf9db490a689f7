"""What the paper on promptability found, and whether the runs of benchmarks/mini_world.py agree.

Each claim is that one cell's ARG is above another's, at 16 shots after the last epoch. It held if
the difference has that sign and is significant at 5%: over evaluated examples (paired bootstrap)
and, of several seeds, over these as well (Welch's t-test).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from robust_ft.report.few_shot import Setting
from robust_ft.report.groups import by_settings
from robust_ft.report.promptability import Difference, Promptability, difference, make_promptability
from robust_ft.report.runs import load_runs
from robust_ft.report.table import difference_text, markdown_table

DEEP = "+deep_prompt"
SETTINGS = {0: Setting(0, "zero"), 16: Setting(16, "last")}
# The paper's table 1: ARG of T5-Large and of T5-XL, by arm and shots.
PAPER = {
    ("p3_none", 0): (-1.9, -1.5),
    ("p3_none", 16): (-1.5, -1.5),
    (f"p3_none{DEEP}", 0): (-1.9, -1.5),
    (f"p3_none{DEEP}", 16): (2.3, 3.7),
    ("p3_mtl_p", 0): (2.8, -1.7),
    ("p3_mtl_p", 16): (2.9, -1.6),
    ("p3_mtl_t", 0): (26.7, 32.4),
    ("p3_mtl_t", 16): (23.1, 30.0),
    (f"p3_mtl_t{DEEP}", 0): (26.7, 32.4),
    (f"p3_mtl_t{DEEP}", 16): (32.6, 42.9),
    ("p3_mtl_tp", 0): (30.2, 33.5),
    ("p3_mtl_tp", 16): (30.2, 33.5),
    (f"p3_mtl_tp{DEEP}", 0): (28.7, 33.3),
    (f"p3_mtl_tp{DEEP}", 16): (37.4, 43.2),
    ("p3_fomaml", 0): (21.8, 27.7),
    ("p3_fomaml", 16): (21.8, 27.7),
    (f"p3_fomaml{DEEP}", 0): (20.8, 24.5),
    (f"p3_fomaml{DEEP}", 16): (32.8, 40.0),
    ("p3_reptile", 0): (18.4, 23.1),
    ("p3_reptile", 16): (18.4, 23.2),
    (f"p3_reptile{DEEP}", 0): (24.9, 26.3),
    (f"p3_reptile{DEEP}", 16): (33.0, 39.7),
}


class Claim(NamedTuple):
    """That the ARG of one cell (arm, shots) is above that of another."""

    text: str
    above: tuple[str, int]
    below: tuple[str, int]

    @property
    def paper(self) -> str:
        """Returns the difference in the paper, of T5-Large and of T5-XL."""
        if self.above not in PAPER or self.below not in PAPER:
            return "–"
        pairs = zip(PAPER[self.above], PAPER[self.below], strict=True)
        return ", ".join(f"{one - two:+.1f}" for one, two in pairs).replace("-", "−")


def claims() -> list[Claim]:
    """Returns the paper's order of the arms, cell by cell."""
    orders = [
        ("T+P above T", "p3_mtl_tp", "p3_mtl_t"),
        ("T above P", "p3_mtl_t", "p3_mtl_p"),
        ("FOMAML below T+P", "p3_mtl_tp", "p3_fomaml"),
        ("Reptile below T+P", "p3_mtl_tp", "p3_reptile"),
        ("T above no continued pretraining", "p3_mtl_t", "p3_none"),
    ]
    found = [
        Claim(f"{text}: {depth}, {shots}-shot", (above + added, shots), (below + added, shots))
        for text, above, below in orders
        for depth, added in (("shallow", ""), ("deep", DEEP))
        for shots in SETTINGS
    ]
    arms = {"T+P": "p3_mtl_tp", "T": "p3_mtl_t", "FOMAML": "p3_fomaml", "Reptile": "p3_reptile",
            "no continued pretraining": "p3_none"}  # fmt: skip
    found += [
        Claim(f"deep above shallow, 16-shot: {name}", (arm + DEEP, 16), (arm, 16))
        for name, arm in arms.items()
    ]
    found += [
        Claim("T: 16 shots below 0 shots, shallow", ("p3_mtl_t", 0), ("p3_mtl_t", 16)),
        Claim("T+P: shallow above deep, 0-shot", ("p3_mtl_tp", 0), (f"p3_mtl_tp{DEEP}", 0)),
    ]
    return found


def compare(found: Promptability, claim: Claim) -> Difference | None:
    """Returns the difference that a claim is about; None if a cell has no ARG."""
    cells = [found.cells.get((arm, SETTINGS[shots])) for arm, shots in (claim.above, claim.below)]
    one, two = (cell.gain if cell else None for cell in cells)
    return difference(one, two) if one is not None and two is not None else None


def verdict(found: Difference | None) -> str:
    """Returns whether a claim held, in words."""
    if found is None:
        return "not measured"
    if not found.is_significant:
        return "not held: no significant difference"
    return "held" if found.difference > 0 else "not held: the reverse"


def rows(found: Promptability) -> list[list[str]]:
    """Returns a row for each claim, below a row of heads."""
    table = [["claim", "paper: T5-Large, T5-XL", "here", "held?"]]
    for claim in claims():
        compared = compare(found, claim)
        here = difference_text(*compared) if compared else "–"
        table.append([claim.text, claim.paper, here, verdict(compared)])
    return table


def write(folders: Sequence[Path], path: Path) -> None:
    """Writes the table of the claims about finished runs."""
    found = make_promptability(by_settings(load_runs(folders)).runs)
    assert found is not None, folders
    text = markdown_table(rows(found))
    path.write_text(f"{text}\n", encoding="utf-8")
    print(text)
