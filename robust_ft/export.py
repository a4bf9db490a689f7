"""The export of a stage, `<stage>/export/`: an adapter that records its base and its tokens.

It holds all parameters of PEFT methods, trained or not, and those of the base that were trained.
Where the whole base was trained, as in ProMoT's second stage, it holds those of PEFT methods alone,
and its base is the one that the stage ended with.
"""

from pathlib import Path

import jax

from robust_ft import console
from robust_ft.checkpoints_io import adapters, outputs
from robust_ft.checkpoints_io.adapters import Adapter, Base
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.fingerprint import fingerprint
from robust_ft.models.model import Model
from robust_ft.partitioning import Partitioner
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params

FOLDER = "export"


def base_of(
    model: Model, params: Params, trained: frozenset[str], restored_from: str
) -> Base | None:
    """Returns the base that a stage's export will record, None if the whole base will train.

    Args:
        model: The stage's model with its PEFT methods.
        params: All parameters at the start of the stage.
        trained: The paths of the trainable ones.
        restored_from: What the stage restores, for errors.
    """
    base = {path: leaf for path, leaf in flatten(params).items() if not model.peft_owns(path)}
    return Base(fingerprint(base.items()), restored_from) if base.keys() - trained else None


def write(
    folder: Path,
    model: Model,
    params: Params,
    trained: frozenset[str],
    base: Base | None,
    tokens: Tokens,
    partitioner: Partitioner,
) -> None:
    """Writes an export atomically; an earlier one is replaced.

    Called by all processes, as arrays may be sharded over them; the first process writes. Nothing
    is written where the whole model was trained: its checkpoint holds all.

    Args:
        folder: Where to write it.
        model: The stage's model with its PEFT methods.
        params: All parameters at the end of the stage.
        trained: The paths of the trainable ones.
        base: From `base_of`.
        tokens: What it was trained with.
        partitioner: The mesh that the parameters are on.
    """
    flat = flatten(params)
    owned = {path: leaf for path, leaf in flat.items() if model.peft_owns(path)}
    exported = owned | {path: flat[path] for path in trained}
    if base is None:
        if not owned:
            return
        exported = owned
        base = base_of(model, params, frozenset(), str(folder.parent))
    replicated = jax.jit(model.export, out_shardings=partitioner.replicated)(unflatten(exported))
    if jax.process_index() != 0:
        return
    tensors = {
        path: Tensor.of(array, f"'{path}'")
        for path, array in flatten(jax.device_get(replicated)).items()
    }
    adapter = Adapter(str(folder), model.exported().peft, tensors, base, tokens)
    with outputs.replacing(folder, overwrite=True) as temporary:
        temporary.mkdir()
        adapters.write(adapter, temporary)
        size = sum(file.stat().st_size for file in temporary.iterdir())
    console.print_line(f"{len(tensors)} arrays ({adapter.kinds}), {size:,} bytes, in {folder}.")
