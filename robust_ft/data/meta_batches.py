"""Meta-batches: for each of several tasks, support batches and a query batch of its examples."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from robust_ft.data.batching import Batcher
from robust_ft.data.cache import CachedTask
from robust_ft.data.records import EXAMPLES, Arrays
from robust_ft.errors import UserError


class MetaBatch(NamedTuple):
    """The shape of a meta-batch.

    Attributes:
        tasks: Its tasks; one may come up more than once.
        batches: Batches of each task, the last of which is the query.
    """

    tasks: int
    batches: int


def check_sizes(tasks: Sequence[CachedTask], rows: int, batches: int) -> None:
    """Checks that a query batch need not be a support batch again.

    Args:
        tasks: Of the mixture.
        rows: Examples in a batch.
        batches: Batches of each task.

    Raises:
        UserError: A task has too few examples.
    """
    apart = min(batches, 2)  # support batches may repeat each other's examples
    small = {task.task: task.info.num_examples for task in tasks}
    small = {name: size for name, size in small.items() if size < rows * apart}
    if not small:
        return
    name, size = min(small.items(), key=lambda item: item[1])
    others = f" (the fewest of {len(small)} such tasks)" if len(small) > 1 else ""
    what = "a query batch" if apart == 1 else "a support batch and another query batch"
    most = size // apart
    lower = f", or lower Stage.batch_size to {most}" if most else ""
    raise UserError(
        f"Task '{name}' has {size} examples in this split{others}, but {what} of {rows} each "
        f"need {rows * apart}; leave it out of the mixture{lower}."
    )


def episodes(
    task: CachedTask, numbers: grain.MapDataset, rows: int, batches: int
) -> grain.MapDataset:
    """Returns a task's endless episodes: the numbers of the examples of its batches, [examples].

    An episode repeats no example. In a task with fewer examples than that, support batches repeat
    their own, but the query has none of theirs.

    Args:
        task: The task, which `check_sizes` accepts.
        numbers: Its examples' numbers, in another order in each epoch.
        rows: Examples in a batch.
        batches: Batches in an episode.
    """
    size = task.info.num_examples
    if size >= rows * batches:
        return numbers.batch(rows * batches, drop_remainder=True).repeat()

    def repeated(epoch: Int[np.ndarray, " size"]) -> Int[np.ndarray, " examples"]:
        query, support = epoch[:rows], epoch[rows:]
        return np.concatenate([np.resize(support, rows * (batches - 1)), query])

    return numbers.batch(size).map(repeated).repeat()


def padded(
    batcher: Batcher, numbers: Int[np.ndarray, "tasks examples"], meta: MetaBatch, own_rows: slice
) -> Arrays:
    """Returns a meta-batch [rows, tasks, batches, length]: of each batch, some of its rows.

    Args:
        batcher: Reads and pads.
        numbers: The examples of each task's episode, one batch after the other.
        meta: Its shape.
        own_rows: The rows of this shard.
    """
    split = numbers.reshape(meta.tasks, meta.batches, -1)[:, :, own_rows]
    own = np.moveaxis(split, 2, 0)  # [rows, tasks, batches]
    flat = batcher.padded(own.reshape(-1))
    return {
        name: x if name == EXAMPLES else x.reshape(*own.shape, *x.shape[1:])
        for name, x in flat.items()
    }
