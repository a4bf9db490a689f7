"""What a stage's penalty holds its parameters to: those at its start, and how much each counts."""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft import console, multihost, trainable
from robust_ft.checkpoints_io import outputs, safetensors_files
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.data import loader
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives import CrossEntropy
from robust_ft.objectives.penalties import Anchor, Fisher
from robust_ft.partitioning import Partitioner
from robust_ft.run_context import RunContext
from robust_ft.stage import Stage, stage_seed
from robust_ft.types import Batch, Params
from robust_ft.vocabulary.base import same_vocabulary


def anchor(stage: Stage, params: Params, run: RunContext) -> Anchor | None:
    """Returns what the stage's penalty needs; None without one.

    The Fisher information is kept in the stage's folder, where a resumed run finds it.

    Args:
        stage: The stage.
        params: All parameters at the stage's start, on the mesh; the result shares none of them.
        run: Where it runs.
    """
    if stage.penalty is None:
        return None
    base, _ = trainable.split(params, _base_paths(stage.model))
    trained, frozen = trainable.split(base, stage.trainable_paths())
    origin: Params = jax.tree.map(jnp.copy, trained)
    if stage.penalty.fisher is None:
        return Anchor(origin)
    return Anchor(origin, _kept(stage, stage.penalty.fisher, trained, frozen, run))


def shapes(stage: Stage, trained: Params) -> Anchor | None:
    """Returns the shapes of `anchor`.

    Args:
        stage: The stage.
        trained: The shapes of all parameters that train, with their shardings.
    """
    if stage.penalty is None:
        return None
    origin, _ = trainable.split(trained, _base_paths(stage.model))
    if stage.penalty.fisher is None:
        return Anchor(origin)

    def in_float32(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

    return Anchor(origin, jax.tree.map(in_float32, origin))


def check(stage: Stage) -> None:
    """Raises a UserError if the stage's penalty does not fit what trains."""
    penalty, model = stage.penalty, stage.model
    if penalty is None:
        return
    kind = type(penalty).__name__
    if not stage.trainable_paths() & _base_paths(model):
        raise UserError(
            f"Stage.penalty={kind} of stage '{stage.name}' holds the pretrained model's parameters "
            "to what they were, but none of them trains there; leave it out."
        )
    if penalty.fisher is None:
        return
    data = penalty.fisher.data
    if not same_vocabulary(data.vocabulary, stage.data.vocabulary):
        raise UserError(
            f"Fisher.data of stage '{stage.name}' has another vocabulary than Stage.data; a model "
            "has one, so give both the same."
        )
    model.without_peft().check_lengths(data.inputs_length, data.targets_length)


def _base_paths(model: Model) -> frozenset[str]:
    return frozenset(trainable.flatten(model.without_peft().shapes()))


def fisher_information(
    model: Model,
    trained: Params,
    frozen: Params,
    batches: loader.BatchSource,
    examples: int,
    partitioner: Partitioner,
) -> Params:
    """Returns the diagonal of the empirical Fisher information of some parameters, in float32.

    Args:
        model: The model.
        trained: The parameters that it is asked for.
        frozen: All others.
        batches: Gives examples, one in each batch.
        examples: How many of them to take.
        partitioner: The mesh that the parameters are on.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def add(total: Params, trained: Params, frozen: Params, batch: Batch) -> Any:
        def loss(trained: Params) -> jax.Array:
            params = trainable.merge(trained, frozen)
            return CrossEntropy()(model, params, batch, None)[0]

        def squared(total: jax.Array, gradient: jax.Array) -> jax.Array:
            return total + jnp.square(gradient.astype(jnp.float32)) / examples

        return jax.tree.map(squared, total, jax.grad(loss)(trained))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    total: Params = jax.device_put(zeros, shardings)
    # An example has no rows to split: each device has the whole of it, at its share of the weight.
    copies = partitioner.batch_shards
    with console.progress("Fisher information", examples, 0) as progress:
        for done in range(1, examples + 1):
            row = {name: np.repeat(x, copies, axis=0) for name, x in next(batches).items()}
            row["decoder_loss_weights"] = row["decoder_loss_weights"] / np.float32(copies)
            total = add(total, trained, frozen, partitioner.share_batch(row))
            progress.update(done, 1)
    return total


def _kept(stage: Stage, fisher: Fisher, trained: Params, frozen: Params, run: RunContext) -> Params:
    """Returns the Fisher information that the stage's folder holds, else computes and writes it."""
    seed = stage_seed(run.seed, f"{stage.name}/fisher")
    model = stage.model.without_peft()
    # Every process reads the same examples.
    batches = loader.train_batches(fisher.data, 1, seed, start=model.decoder_start)
    identity = {k: v for k, v in batches.get_state().items() if k != "position"}
    available = sum(count for count, _ in identity["examples"].values())
    if fisher.examples > available:
        raise UserError(
            f"Fisher.examples={fisher.examples}, but '{fisher.data.task}' has {available} in its "
            f"split '{fisher.data.split}'; lower it."
        )
    known = zlib.crc32(json.dumps([identity, fisher.examples]).encode())
    file = run.directory / stage.name / f"fisher_{known:08x}.safetensors"
    if file.is_file():
        kept = safetensors_files.read(file)
        like = trainable.flatten(trained)
        arrays = {path: multihost.put(kept[path].load(), like[path].sharding) for path in like}
        return trainable.unflatten(arrays)
    total = fisher_information(model, trained, frozen, batches, fisher.examples, run.partitioner)
    batches.close()
    replicated = jax.jit(lambda tree: tree, out_shardings=run.partitioner.replicated)(total)
    if multihost.is_first():
        leaves = trainable.flatten(jax.device_get(replicated)).items()
        with outputs.replacing(file, overwrite=True) as temporary:
            safetensors_files.write(temporary, {p: Tensor.of(x, f"'{p}'") for p, x in leaves})
    multihost.barrier()
    return total
