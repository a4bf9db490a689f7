"""Which task gives the next example of a mixture: exact rates, random access to any position."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain

# Rates become integers out of this, so that positions are computed exactly, however large.
_RESOLUTION = 1 << 32


class _Node(NamedTuple):
    """A node of a binary tree whose leaves are the indices of tasks.

    Attributes:
        share: Weight of the tasks in the left half.
        total: Weight of all tasks below the node.
        left: Node or leaf of the first half of the tasks.
        right: Of the second half.
    """

    share: int
    total: int
    left: "int | _Node"
    right: "int | _Node"


class MixedOrder(grain.transforms.DatasetSelectionMap):
    """Spreads the tasks of a mixture evenly over an endless sequence of positions.

    After any n examples every task has given its share of n to within a few examples; a random
    draw would be off by about the square root of n. At each node of a binary tree over the tasks,
    the left half has given floor(n * share / total) of the first n examples. So the task of a
    position is found in log2(tasks) steps, and resuming needs no history.
    """

    def __init__(self, rates: Sequence[float]):
        """Takes the tasks' rates, positive and not normalized."""
        total = sum(rates)
        # max(1, ...): a task with a tiny rate still takes part.
        weights = [max(1, round(rate / total * _RESOLUTION)) for rate in rates]
        self._tree = _tree(weights, 0, len(weights))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns the task at position `index` and how many examples it has given before."""
        node = self._tree
        while not isinstance(node, int):
            before = index * node.share // node.total  # examples of the left half up to here
            if (index + 1) * node.share // node.total > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index


def _tree(weights: Sequence[int], start: int, stop: int) -> int | _Node:
    """Returns the tree over the tasks from `start` to `stop`."""
    if stop - start == 1:
        return start
    middle = (start + stop) // 2
    share, total = sum(weights[start:middle]), sum(weights[start:stop])
    return _Node(share, total, _tree(weights, start, middle), _tree(weights, middle, stop))
