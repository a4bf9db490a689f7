"""Writes a stage's checkpoints on some meshes and reads them on others; runs in processes alone.

    python sharded_checkpoints.py write|read DIRECTORY MESHES [INDEX ADDRESS]

MESHES is a JSON list of meshes as in `sharded_training`. What is written is random and the same on
all of them, so that who reads knows it. A reader takes each checkpoint in the directory.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from sharded_training import CASES, begun, one_of_two, partitioner_of

from robust_ft import multihost
from robust_ft.stage_checkpoints import StageCheckpoints

CASE = CASES["adafactor"]
DATA = {"position": 3}


def written(leaves):
    """Returns what is written in place of such leaves."""
    rng = np.random.default_rng(0)
    return [np.asarray(100 * rng.random(leaf.shape), leaf.dtype) for leaf in leaves]


def state_of(mesh):
    partitioner = partitioner_of(mesh)
    with partitioner.activate():
        return begun(CASE, partitioner)[1]


def write(directory, meshes):
    for number, mesh in enumerate(meshes):
        leaves, structure = jax.tree.flatten(state_of(mesh))
        values = zip(written(leaves), leaves, strict=True)
        leaves = [multihost.put(value, leaf.sharding) for value, leaf in values]
        checkpoints = StageCheckpoints(directory / str(number))
        checkpoints.save(structure.unflatten(leaves), DATA, 1.0)
        # It is written while steps go on, which donate the state.
        jax.block_until_ready(jax.jit(lambda x: [2 * each for each in x], donate_argnums=0)(leaves))
        checkpoints.close()


def read(directory, meshes):
    """Raises an error unless everything comes back bit by bit, and to where it belongs."""
    for mesh in meshes:
        like = state_of(mesh)
        for folder in sorted(directory.iterdir()):
            checkpoints = StageCheckpoints(folder)
            state, data = checkpoints.restore(like)
            best = checkpoints.restore_params(int(state.step), like.trainable)
            checkpoints.close()
            assert data == DATA
            check(state, like, written(jax.tree.leaves(like)))
            check(best, like.trainable, [np.asarray(x) for x in jax.tree.leaves(state.trainable)])


def check(tree, like, values):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for leaf, model, value in zip(*map(jax.tree.leaves, (tree, like)), values, strict=True):
        assert leaf.sharding == model.sharding and leaf.dtype == value.dtype
        assert np.asarray(leaf).tobytes() == value.tobytes()


def main(what, directory, meshes, *process):
    with one_of_two(*process):
        {"write": write, "read": read}[what](Path(directory), json.loads(meshes))


if __name__ == "__main__":
    main(*sys.argv[1:])
