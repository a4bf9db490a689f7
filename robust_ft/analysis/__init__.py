"""The papers' analyses, each an `Evaluator` for `Stage.evaluations` of any recipe."""

from robust_ft.analysis.drift import Drift
from robust_ft.analysis.gradient_alignment import GradientAlignment
from robust_ft.analysis.prompt_neighbors import PromptNeighbors

__all__ = ["Drift", "GradientAlignment", "PromptNeighbors"]
