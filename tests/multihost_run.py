"""One of two processes that are one run; started by `test_multihost`.

    python multihost_run.py WHAT INDEX ADDRESS DIRECTORY

WHAT is "train", "nan" (all diverge), or what goes wrong in process 1 (in process 0: "first lost").
Each process of "own data" has its own copy of a data file and its own cache, and that of "other
data" another label.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import toy

from robust_ft import command_line, multihost, trainer
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.optim import AdamW, Schedule
from robust_ft.runner import run

TIMEOUT = 10


def recipe(directory):
    """Full finetuning of a tiny model, with an evaluation whose batches two processes share."""
    stage = toy.stage(
        steps=4,
        evaluations=toy.evaluations("validation", held_out=False),
        final_evaluations=(),
    )
    return toy.Recipe("toy", str(directory), (stage,))


def with_own_files(recipe, host, is_other):
    """Returns a recipe that reads a file and has a cache in a host's folder."""
    host.mkdir(parents=True)
    (host / "mine.csv").write_text(f"q,a\nx,a\ny,b\nz,{'b' if is_other else 'a'}\n")
    task = FileTask(name="mine", train=f"{host}/mine.csv", inputs="{q}", targets="{a}")
    changes = {"task": "mine", "module": None, "file_tasks": (task,), "cache_dir": str(host)}
    (stage,) = recipe.stages
    data = dataclasses.replace(stage.data, **changes)
    stage = dataclasses.replace(stage, data=data, evaluations=())
    return dataclasses.replace(recipe, stages=(stage,))


def train(what, directory):
    # As in a terminal: what a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def terminate():
        if what in ("stop", "ctrl-c") and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM if what == "stop" else signal.SIGINT)
            # The loop may not end before the signal has gone around.
            time.sleep(3)

    started = recipe(directory)
    if what == "nan":
        (stage,) = started.stages
        stage = dataclasses.replace(stage, optimizer=AdamW(Schedule(1e38)))
        started = dataclasses.replace(started, stages=(stage,))
    if what.endswith("data"):
        index = jax.process_index()
        is_other = index == 1 and what == "other data"
        started = with_own_files(started, Path(f"{directory}.host{index}"), is_other)
    try:
        run(started, [toy.At("model", 1, terminate)])
    except trainer.Stopped as stopped:
        print(stopped)
        return command_line.RESUME
    return 0


def fail(what):
    mine = jax.process_index() == (0 if what == "first lost" else 1)
    multihost.check_same("config", f"STEPS = 3\nRATE = {0.1 if mine and what == 'config' else 1}")
    if mine and what.endswith("lost"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mine and what == "mistake":
        raise UserError("Line 3 of data.csv is empty.")
    # All others wait for ever, as for a collective.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    print(jax.jit(lambda x: x.sum())(multihost.put(np.ones(2), sharding)))
    multihost.barrier()


def main(what, index, address, directory):
    processes = multihost.Processes(address, 2, int(index), 60 if directory else TIMEOUT)
    with multihost.joined(processes, stops=True):
        return train(what, directory) if directory else fail(what)


if __name__ == "__main__":
    command_line.run(main, *sys.argv[1:])
