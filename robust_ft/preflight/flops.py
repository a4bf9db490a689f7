"""FLOPs of a traced program's matrix products."""

from typing import Any

import jax
import numpy as np


def count(traced: jax.stages.Traced, trips: int = 1) -> int:
    """Returns the FLOPs of a program's matrix products, on all devices together.

    They are counted in the traced program, where a scan has its length; the compiler's own figures
    count a loop's body once. Custom kernels, such as cuDNN's attention, count as nothing.

    Args:
        traced: The program.
        trips: Number of iterations to assume for while loops.
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
            # A multiplication and an addition for each term of each entry of the result.
            total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
            continue
        times = {"scan": params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        inside = [_count(each, trips) for each in _jaxprs(params)]
        # One of a cond's branches runs.
        total += times * (max(inside, default=0) if "branches" in params else sum(inside))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns")]
