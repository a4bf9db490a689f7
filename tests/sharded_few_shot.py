"""Runs few-shot evaluation of a tiny model on a mesh of CPU devices, in a process of its own.

    python sharded_few_shot.py DIRECTORY [INDEX ADDRESS]

With INDEX and ADDRESS this is one of two processes that are one run.
"""

import dataclasses
import sys
from pathlib import Path

import toy_few_shot

from robust_ft import multihost, runner
from robust_ft.partitioning import Partitioner


def main(directory, index="0", address=None):
    processes = multihost.Processes(address, 2 if address else 1, int(index), 60)
    with multihost.joined(processes, stops=True):
        made = toy_few_shot.recipe(Path(directory))
        mesh = Partitioner(fully_sharded=2, model_parallel=2)
        runner.run(dataclasses.replace(made, partitioner=mesh))


if __name__ == "__main__":
    main(*sys.argv[1:])
