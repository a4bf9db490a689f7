"""Objectives: losses, computed without holding all logits in memory, and gradient rules."""

from robust_ft.objectives.base import Objective, Teacher
from robust_ft.objectives.cocktail import Cocktail
from robust_ft.objectives.cross_entropy import CrossEntropy, cross_entropy_of
from robust_ft.objectives.kl_anchor import KlAnchor
from robust_ft.objectives.penalties import L2SP, Ewc, Fisher, Penalty
from robust_ft.objectives.token_weights import Dft, Eaft, Flow, Stm

__all__ = [
    "L2SP",
    "Cocktail",
    "CrossEntropy",
    "Dft",
    "Eaft",
    "Ewc",
    "Fisher",
    "Flow",
    "KlAnchor",
    "Objective",
    "Penalty",
    "Stm",
    "Teacher",
    "cross_entropy_of",
]
