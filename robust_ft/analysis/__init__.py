"""The papers' analyses, each an `Evaluator` for `Stage.evaluations` of any recipe.

`python -m robust_ft.analysis` runs them on finished runs. Importing this package imports nothing
else, so that its command line is quick: each name below is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_ft.analysis.drift import Drift as Drift
    from robust_ft.analysis.gradient_alignment import GradientAlignment as GradientAlignment
    from robust_ft.analysis.prompt_neighbors import PromptNeighbors as PromptNeighbors

_HOMES = {
    "Drift": "drift",
    "GradientAlignment": "gradient_alignment",
    "PromptNeighbors": "prompt_neighbors",
}

__all__ = ["Drift", "GradientAlignment", "PromptNeighbors"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'robust_ft.analysis' has no attribute '{name}'")
    return getattr(importlib.import_module(f"robust_ft.analysis.{_HOMES[name]}"), name)
