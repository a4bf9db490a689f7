"""Parameters in a stage's `checkpoint_<step>`, which Orbax has written."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from robust_ft.checkpoints_io import orbax_buckets
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.trainable import flatten, unflatten

ITEM = "params"  # Orbax's name for one of the things that a checkpoint holds


def is_directory(path: Path) -> bool:
    """Returns whether a directory is a stage's checkpoint."""
    return (path / ITEM).is_dir()


def metadata(checkpoint: Path) -> dict[str, Any]:
    """Returns {parameter path: what Orbax knows of the array, such as shape and dtype}.

    Raises:
        UserError: It is no checkpoint, or cannot be read.
    """
    folder = orbax_buckets.prepared((checkpoint / ITEM).absolute())
    try:
        return flatten(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    except Exception as error:  # Orbax raises whatever its storage raises
        raise UserError(f"'{folder}' is no readable checkpoint ({type(error).__name__}).") from None


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Returns {parameter path: tensor}, each restored when it is read."""
    return {path: _tensor(checkpoint, path, leaf) for path, leaf in metadata(checkpoint).items()}


def load(checkpoint: Path) -> dict[str, np.ndarray]:
    """Returns {parameter path: array}; restoring all at once is faster than one by one."""
    return flatten(_restore(checkpoint, metadata(checkpoint), partial=False))


def _tensor(checkpoint: Path, path: str, leaf: Any) -> Tensor:
    where = f"'{path}' in '{checkpoint / ITEM}'"

    def restore() -> np.ndarray:
        try:
            array: np.ndarray = flatten(_restore(checkpoint, {path: leaf}, partial=True))[path]
        except Exception as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__}).") from None
        return array

    return Tensor(tuple(leaf.shape), np.dtype(leaf.dtype), restore, where)


def _restore(checkpoint: Path, leaves: dict[str, Any], partial: bool) -> Any:
    item = unflatten(leaves)
    # Without restore_args Orbax would put arrays where they were saved, on a mesh that is gone.
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=to_numpy, partial_restore=partial)
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = orbax_buckets.prepared((checkpoint / ITEM).absolute())
        return checkpointer.restore(folder, args=arguments)
