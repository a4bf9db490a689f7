"""The order of examples, and which task gives the next one: exact rates, any position at once."""

import hashlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain

from robust_ft.data.cache import CachedTask

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
        """Takes the tasks' rates, positive and not normalized; integers are taken as they are."""
        total = sum(rates)
        weights = [rate for rate in rates if isinstance(rate, int)]
        if len(weights) < len(rates):
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


def mixed(tasks: Sequence[CachedTask], each: Sequence[grain.MapDataset]) -> grain.MapDataset:
    """Returns the endless mixture of the tasks' endless datasets at their rates."""
    if len(tasks) == 1:
        return each[0]
    order = MixedOrder([float(task.rate) for task in tasks])
    return grain.MapDataset.select_from_datasets(each, order)


def endless(
    tasks: Sequence[CachedTask], own: int, seed: int, rates: tuple[int, int] = (0, 1)
) -> grain.MapDataset:
    """Returns the order of all examples: the tasks' own mixture, and others among it.

    Of the first n examples floor(n * rate / total) are replayed, whatever n is.

    Args:
        tasks: The stage's own tasks, and behind them those that are replayed.
        own: The number of the former.
        seed: Of the order.
        rates: The rate of the latter, and of the former.
    """
    orders = [numbers.repeat() for numbers in shuffled(tasks, seed)]
    order = mixed(tasks[:own], orders[:own])
    if own == len(tasks):
        return order
    replayed = mixed(tasks[own:], orders[own:])
    return grain.MapDataset.select_from_datasets([replayed, order], MixedOrder(rates))


def shuffled(tasks: Sequence[CachedTask], seed: int) -> list[grain.MapDataset]:
    """Returns the `ExampleReader`'s numbers of each task's examples, reordered in every epoch."""
    datasets, start = [], 0
    for task in tasks:
        stop = start + task.info.num_examples
        # Grain adds 1 to the seed in every epoch, so run seeds are hashed: with seeds 0 and 1, the
        # second run would begin with the first one's second epoch. The task's name is hashed too,
        # else tasks of equal size would share one order.
        datasets.append(grain.MapDataset.range(start, stop).shuffle(hashed(seed, task.task)))
        start = stop
    return datasets


def hashed(seed: int, name: str) -> int:
    """Returns a 32-bit seed, independent of those for other seeds and names."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def _tree(weights: Sequence[int], start: int, stop: int) -> int | _Node:
    """Returns the tree over the tasks from `start` to `stop`."""
    if stop - start == 1:
        return start
    middle = (start + stop) // 2
    share, total = sum(weights[start:middle]), sum(weights[start:stop])
    return _Node(share, total, _tree(weights, start, middle), _tree(weights, middle, stop))
