"""Objectives: losses, computed without holding all logits in memory, and gradient rules."""

from robust_ft.objectives.base import Objective, Teacher
from robust_ft.objectives.cocktail import Cocktail
from robust_ft.objectives.cross_entropy import CrossEntropy

__all__ = ["Cocktail", "CrossEntropy", "Objective", "Teacher"]
