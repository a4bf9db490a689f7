"""Builds caches ahead of a run: python -m robust_ft.data.cache --gin_file=RECIPE [--task=NAME]

Tokenizes all that the recipe trains and is evaluated on, or only the task NAME, on all cores.
Without a recipe, --task, --vocabulary and the lengths say what the run will read. Ready caches are
left alone, and a build that was killed continues where it was.

Several machines with a common cache folder share the work: each runs the command with its own
--share=1/3, 2/3, 3/3; afterwards one runs it without.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_ft import command_line, console
from robust_ft.errors import UserError

if TYPE_CHECKING:
    from robust_ft.data.cache import TaskData

_POLL_SECONDS = 2.0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = command_line.data_parser("data.cache", __doc__)
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize; by default one a core",
    )
    parser.add_argument("--share", metavar="I/N", help="build the I-th of N shares and stop")
    # For workers: they end with the process that started them, which holds their standard input.
    parser.add_argument("--with_parent", action="store_true", help=argparse.SUPPRESS)
    arguments = command_line.parse_gin(parser, argv)
    datas = command_line.task_data(arguments)
    if not arguments.gin_file and not arguments.vocabulary:
        raise UserError(
            "A cache is made for a vocabulary; name the recipe with --gin_file=FILE, or a model's "
            "folder with --vocabulary=DIR."
        )
    if arguments.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        console.configure(enabled=False)
    from robust_ft.data import cache

    missing = [data for data in datas if cache.load(data) is None]
    if arguments.share is not None:
        _build_share(missing, arguments.share)
        return 0
    if missing and arguments.processes > 1:
        _build_together(missing, arguments.processes, argv)
    rows = []
    for data in datas:
        for task in cache.ensure(data):
            info = task.info
            cut = [f"{info.num_truncated[name]} {name}" for name in ("inputs", "targets")]
            rows.append((info.task, info.split, info.num_examples, ", ".join(cut)))
    console.print_table("Caches", ["task", "split", "examples", "cut"], dict.fromkeys(rows))
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _build_share(missing: "Sequence[TaskData]", share: str) -> None:
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", share)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--share={share} is not I/N with I from 1 to N, such as 1/3.")
    from robust_ft.data import quiet

    with quiet.without_native_log():
        from robust_ft.data import build
    build.build_share(missing, int(match[1]) - 1, int(match[2]))


def _build_together(missing: "Sequence[TaskData]", count: int, argv: Sequence[str]) -> None:
    """Builds one share in each of `count` processes, and shows their progress."""
    command = [sys.executable, "-m", "robust_ft.data.cache", *argv, "--with_parent"]
    workers = [
        subprocess.Popen(
            [*command, f"--share={index + 1}/{count}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for index in range(count)
    ]
    readers = [_Errors(worker) for worker in workers]
    progress = _Progress(missing)
    try:
        while any(worker.poll() is None for worker in workers):
            for worker, reader in zip(workers, readers, strict=True):
                if worker.poll():
                    raise reader.error()
            time.sleep(_POLL_SECONDS)
            progress.show()
        for worker, reader in zip(workers, readers, strict=True):
            if worker.poll():
                raise reader.error()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


class _Errors:
    """Reads a worker's standard error in a thread: on a full pipe the worker would block."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self._text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self._text = self._process.stderr.read()

    def error(self) -> Exception:
        """Returns the error that the process ended with."""
        self._thread.join()
        sentence = re.search(r"^Error: (.+)$", self._text, re.MULTILINE)
        if sentence and self._process.returncode == command_line.USER_ERROR:
            return UserError(sentence[1])
        return RuntimeError(f"a process that tokenizes has failed:\n{self._text[-4000:]}")


class _Progress:
    """Prints how many examples of all tasks are tokenized."""

    def __init__(self, missing: "Sequence[TaskData]"):
        from robust_ft.data import cache, quiet

        with quiet.without_native_log():
            from robust_ft.data import build
        folders = [
            cache.directory(dataclasses.replace(data, task=task))
            for data in missing
            for task in build.tasks_of(data)
        ]
        self._folders = list(dict.fromkeys(folders))
        self._start = time.monotonic()
        self._before, _ = self._count()
        self._shown = 0

    def show(self) -> None:
        """Prints a line if the number has changed."""
        done, ready = self._count()
        if done == self._shown:
            return
        self._shown = done
        rate = (done - self._before) / (time.monotonic() - self._start)
        console.print_line(
            f"[cache] {done} examples  {rate:.0f}/s  {ready} of {len(self._folders)} tasks ready"
        )

    def _count(self) -> tuple[int, int]:
        from robust_ft.data import cache, parts

        done = ready = 0
        for folder in self._folders:
            info = cache.read_info(folder)
            ready += info is not None
            done += info.num_examples if info else parts.num_done(parts.folder_of(folder))
        return done, ready


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
