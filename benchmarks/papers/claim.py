"""What a claim of a paper is: data, which papers/<paper>.py writes down and `verdict` tells."""

import dataclasses

from runs import Arm

# Quantities, beside the names of tasks.
TARGET = "target"  # the finetuned task, in distribution
OOD = "ood"  # the target's data out of distribution
HELD_OUT = "held_out"  # Norm. Avg. of the held-out tasks, 1-shot
FORMAT = "format"  # share of the held-out tasks' answers in the target's format, 1-shot
ARG_0, ARG_16 = "ARG, 0-shot", "ARG, 16-shot"  # average relative gain over guessing
UNSEEN = "unseen classes"  # accuracy in logistic regression, which no recipe trains

PRETRAINED = "pretrained"
BEST_OOD = -1.0  # in place of a weight


@dataclasses.dataclass(frozen=True)
class Model:
    """One side of a claim: a model that the runs of an arm have.

    Attributes:
        arm: The arm; None for a model that is computed when the claim is told.
        at: What a run ended with if "", what it began with if "pretrained", else the name of a
            stage or of a selection of lambda.
        weight: With a selection, a lambda in place of the selected one; `BEST_OOD` for the one
            whose out-of-distribution score is the best of all.
        label: What tables call it.
    """

    arm: Arm | None
    at: str = ""
    weight: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """What it is called: its label, or where it is from."""
        parts = [self.at or (self.arm.name if self.arm else "")]
        if self.weight is not None:
            parts.append("best λ OOD" if self.weight == BEST_OOD else f"λ = {self.weight:g}")
        return self.label or ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one model is above another in a quantity, or at least no further below than a margin.

    Attributes:
        name: What `--only` calls it, behind its paper's name and a dot.
        words: The claim.
        figure: The paper's figures.
        source: Where in the paper they are.
        above: The model that is to be above.
        below: The other one.
        quantity: What of: one of those above, or the name of a task ("task@1" for 1 shot).
        below_quantity: That of `below` if it is another one.
        margin: In points. 0 asks for a difference; otherwise "above" is no worse than "below",
            which means that it is above it less this.
        note: What is different here, whatever comes out.
    """

    name: str
    words: str
    figure: str
    source: str
    above: Model
    below: Model
    quantity: str
    below_quantity: str = ""
    margin: float = 0.0
    note: str = ""

    @property
    def models(self) -> tuple[Model, Model]:
        """Both sides, `above` first."""
        return self.above, self.below

    @property
    def quantities(self) -> tuple[str, str]:
        """What is measured of each side."""
        return self.quantity, self.below_quantity or self.quantity

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms whose runs it needs."""
        return tuple(dict.fromkeys(model.arm for model in self.models if model.arm))

    @property
    def compared(self) -> str:
        """What is compared, in words."""
        below = self.below.name + (f" ({self.below_quantity})" if self.below_quantity else "")
        within = f", no worse by {self.margin:g} or more" if self.margin else ""
        return f"{self.above.name} − {below}: {self.quantity}{within}"


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A claim that no run here is about.

    Attributes:
        words: The claim.
        figure: The paper's figures.
        source: Where in the paper they are.
        why: What it would need.
    """

    words: str
    figure: str
    source: str
    why: str


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper and its claims."""

    name: str
    title: str
    claims: tuple[Claim, ...]
    not_run: tuple[NotRun, ...] = ()

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms of its claims, in their order."""
        return tuple(dict.fromkeys(arm for claim in self.claims for arm in claim.arms))
