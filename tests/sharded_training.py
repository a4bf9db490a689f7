"""Trains tiny models on meshes of CPU devices; runs in processes of their own.

    python sharded_training.py OUTPUT.npz PLAN [INDEX ADDRESS]

PLAN is a JSON list of pairs: a mesh, an object of a Partitioner's fields and of "devices", of
which it takes the first; and a list of names in CASES. With INDEX and ADDRESS this is one of two
processes that are one run. The output has "<number of the pair>/<case>/loss", of six steps, and
"<number>/<case>/<parameter path>", after them.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import toy
from every_method import METHODS, OPTIMIZER, small
from tiny_families import CONFIGS, START, params_of
from tiny_models import random_batch

from robust_ft import multihost
from robust_ft.half_finetuning import HalfFinetuning
from robust_ft.objectives import (
    L2SP,
    Cocktail,
    CrossEntropy,
    Dft,
    Eaft,
    Flow,
    KlAnchor,
    Objective,
    Teacher,
)
from robust_ft.objectives.penalties import Anchor
from robust_ft.optim import Adafactor, Optimizer, Schedule
from robust_ft.partitioning import STANDARD_RULES, Partitioner
from robust_ft.restore import place_params
from robust_ft.stage_step import compile_train_step, place_state
from robust_ft.trainable import flatten, split

ROWS, TASKS, STEPS = 16, 2, 6
# Every axis that meshes split is even.
SIZES = {"emb_dim": 16, "num_heads": 2, "mlp_dim": 24, "dropout_rate": 0.0}
ADAFACTOR = Adafactor(Schedule(0.02, warmup_steps=2), clip_norm=1.0)


class Case(NamedTuple):
    """What trains, and how.

    Attributes:
        method: A name in METHODS.
        family: Of the model.
        optimizer: Its state is sharded too.
        microbatches: Parts of a batch.
        objective: If it takes a teacher, this has a prefix.
        sizes: That differ from SIZES.
        changes: Further fields of the stage.
    """

    method: str
    family: str = "t5"
    optimizer: Optimizer = OPTIMIZER
    microbatches: int = 1
    objective: Objective = CrossEntropy(0.1, 1e-3)
    sizes: dict[str, Any] | None = None
    changes: dict[str, Any] | None = None


# By family and method, and what else a step can do.
CASES = {f"{family} {method}": Case(method, family) for family in CONFIGS for method in METHODS} | {
    # Large enough for Adafactor to factor the table and the MLP.
    "adafactor": Case(
        "full", optimizer=ADAFACTOR, sizes={"vocab_size": 256, "emb_dim": 128, "mlp_dim": 136}
    ),
    "cocktail": Case("full", objective=Cocktail(0.5, 2.0)),
    "asft": Case("full", "llama", objective=KlAnchor(0.3, CrossEntropy(token_weights=Dft()))),
    "eaft": Case("full", objective=CrossEntropy(token_weights=Eaft(top=5))),
    "flow": Case("full", "llama", objective=CrossEntropy(token_weights=Flow(tau=3.0))),
    "remedies": Case(
        "full",
        optimizer=HalfFinetuning(optimizer=OPTIMIZER, period=2),
        changes={"penalty": L2SP(weight=0.1), "ema_decay": 0.9},
    ),
    "dropout": Case("all together", microbatches=2, sizes={"dropout_rate": 0.1}),
}


def model_of(case: Case, method: str):
    return small(case.family, *METHODS[method].peft, **SIZES | (case.sizes or {}))


def placed(model, partitioner, seed=0):
    key = jax.random.key(0)  # of nothing: all parameters are known
    return place_params(model, partitioner, flatten(params_of(model, seed)), key, key)


def begun(case: Case, partitioner: Partitioner):
    """Returns (stage, state, frozen parameters) before the first step."""
    model = model_of(case, case.method)
    stage = toy.stage(
        model=model,
        trainable=METHODS[case.method].patterns(model.config),
        optimizer=case.optimizer,
        objective=case.objective,
        teacher="/a/teacher" if case.objective.takes_teacher else None,
        batch_size=ROWS,
        microbatches=case.microbatches,
        **(case.changes or {}),
    )
    params = placed(model, partitioner)
    trained, frozen = split(params, stage.trainable_paths())
    return stage, place_state(stage, trained, partitioner), frozen


def train(case: Case, partitioner: Partitioner):
    """Returns the losses of all steps, {"loss": [steps]}, and parameters by their paths."""
    stage, state, frozen = begun(case, partitioner)
    teacher = None
    if stage.teacher:
        tutor = model_of(case, "prefix")
        teacher = Teacher(tutor, placed(tutor, partitioner, seed=1))
    anchor = Anchor(placed(stage.model, partitioner, seed=1)) if stage.penalty else None
    step = compile_train_step(stage, state)
    losses = []
    for i in range(STEPS):
        batch = put_batch(i, partitioner)
        state, sums, flags = step(state, frozen, teacher, batch, jax.random.key(0), anchor)
        assert not flags.any()
        losses.append(sums["loss"] / sums["weight"])
    assert step._cache_size() == 1, "compiled anew"
    check_state(state, flatten(stage.model.logical_axes()), partitioner)
    average = flatten(state.average or {})
    averaged = {f"average/{path}": leaf for path, leaf in average.items()}
    return {"loss": jnp.stack(losses), **flatten(state.trainable), **averaged}


def put_batch(seed, partitioner):
    """Returns a batch of which each process gives the rows that are its own."""
    rng = np.random.default_rng(seed)
    batch = random_batch(seed, *([*rng.integers(1, 7, ROWS - 1), 7] for _ in range(2)))
    batch["decoder_input_tokens"][:, 0] = START
    batch["task_index"] = rng.integers(0, TASKS, ROWS, dtype=np.int32)
    index, count = partitioner.data_shard()
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    batch = partitioner.put_batch({name: rows[mine] for name, rows in batch.items()})
    for rows in batch.values():
        check_sharded(rows, ("batch",), partitioner)
    return batch


def check_state(state, axes, partitioner):
    """Checks that parameters and optimizer state are still where they belong after the steps."""
    params = flatten(state.trainable)
    for path, leaf in params.items():
        check_sharded(leaf, axes[path], partitioner)
    checked = 0
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        assert len(leaf.sharding.device_set) == partitioner.mesh.size, "state on one device"
        path = "/".join(k.key for k in key_path if isinstance(k, jax.tree_util.DictKey))
        if path not in params or leaf.size == 1:
            continue
        left = axes[path]
        if leaf.shape != params[path].shape:  # factored: one axis is left of a matrix
            sizes = zip(axes[path], params[path].shape, strict=True)
            left = [name for name, size in sizes if size == leaf.size]
        if len(left) == leaf.ndim:
            check_sharded(leaf, left, partitioner)
            checked += 1
    assert checked


def check_sharded(array, axes, partitioner):
    """The size of each device's shard is what the rules say, computed independently."""
    mesh_axes = dict(STANDARD_RULES)

    def parts(axis):
        place = mesh_axes.get(axis) or ()
        place = (place,) if isinstance(place, str) else place
        return math.prod(partitioner.mesh.shape[mesh_axis] for mesh_axis in place)

    expected = tuple(
        size // parts(axis)
        for size, axis in zip(array.shape, (*axes, *[None] * array.ndim), strict=False)
    )
    assert {s.data.shape for s in array.addressable_shards} == {expected}, (array.shape, axes)


def main(output, plan, index="0", address=None):
    results = {}
    with one_of_two(index, address):
        for number, (mesh, cases) in enumerate(json.loads(plan)):
            partitioner = partitioner_of(mesh)
            for case in cases:
                with partitioner.activate():
                    found = multihost.whole(train(CASES[case], partitioner))
                results |= {f"{number}/{case}/{name}": leaf for name, leaf in found.items()}
        if multihost.is_first():
            np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


def one_of_two(index="0", address=None):
    """Returns a context in which this process is one of two, if there is an address."""
    return multihost.joined(multihost.Processes(address, 2 if address else 1, int(index), 60))


def partitioner_of(mesh):
    """Returns the partitioner of a mesh as in a plan."""
    fields = dict(mesh)
    devices = jax.devices()[: fields.pop("devices")]
    partitioner = Partitioner(**fields).on(devices)
    assert partitioner.mesh.size == len(devices)
    return partitioner


def run(script, *arguments, devices=8, processes=1, patience=300):
    """Runs a script of this folder on so many CPU devices; several processes share them.

    Each of several gets two more arguments, its number and the address of the first.
    """
    environment = {
        **os.environ,
        # With the last two XLA compiles in half the time, which is most of all.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes} "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        "JAX_PLATFORMS": "cpu",
    }
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [*command, *([str(index), address] if processes > 1 else [])],
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        for process in started:
            _, stderr = process.communicate(timeout=patience)
            assert process.returncode == 0, stderr
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
