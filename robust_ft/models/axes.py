"""Names for the axes of parameters, which `robust_ft.partitioning` maps to the mesh."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


def with_axes(init: Callable[..., Any], *axes: str | None) -> Callable[..., Any]:
    """Returns an initializer whose parameter carries the names of its logical axes."""
    return nn.with_logical_partitioning(init, axes)
