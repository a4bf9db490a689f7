"""Which task gives the next example of a mixture: exact rates, found for any position at once."""

import sys
from collections.abc import Sequence

import grain

_RESOLUTION = 1 << 32


class MixedOrder(grain.transforms.DatasetSelectionMap):
    """Spreads the tasks of a mixture evenly over an endless sequence of positions.

    After any n examples every task has given its share of n to within a few examples; a random
    draw would be off by about the square root of n. A position leads to its task in log(tasks)
    steps, so that resuming needs no history: at each node of a binary tree over the tasks, the left
    half has given floor(n * share) of the first n examples.
    """

    def __init__(self, rates: Sequence[float]):
        """Takes positive rates, not normalized, one a task."""
        total = sum(rates)
        weights = [max(1, round(rate / total * _RESOLUTION)) for rate in rates]
        self._tree = _tree(weights, 0, len(weights))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns the task at position `index` and how many examples it has given before."""
        node = self._tree
        while not isinstance(node, int):
            share, total, left, right = node
            before = index * share // total
            if (index + 1) * share // total > before:
                node, index = left, before
            else:
                node, index = right, index - before
        return node, index


# A leaf is a task's index, a node (weight of the left half, weight of both, left, right).
_Node = int | tuple[int, int, "_Node", "_Node"]


def _tree(weights: Sequence[int], start: int, stop: int) -> "_Node":
    if stop - start == 1:
        return start
    middle = (start + stop) // 2
    left, both = sum(weights[start:middle]), sum(weights[start:stop])
    return left, both, _tree(weights, start, middle), _tree(weights, middle, stop)
