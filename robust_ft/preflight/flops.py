"""How much a traced program computes: its floating point operations in matrix products."""

from typing import Any

import jax
import numpy as np


def count(traced: jax.stages.Traced, trips: int = 1) -> int:
    """Returns a program's floating point operations in matrix products, on all devices together.

    They are counted in the traced program, where loops say how often they go round; what the
    compiler reports counts a loop's body once. Fused kernels, such as cuDNN's attention, are not
    looked into.

    Args:
        traced: The program.
        trips: How often loops without a fixed end go round.
    """
    return _count(traced.jaxpr.jaxpr, trips)


def _count(jaxpr: Any, trips: int) -> int:
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
            continue
        times = {"scan": params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        inside = [_count(each, trips) for each in _jaxprs(params)]
        # Of a condition's branches one runs.
        total += times * (max(inside, default=0) if "branches" in params else sum(inside))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns")]
