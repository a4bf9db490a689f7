"""Seconds from the command to the first training step of gin_configs/promot_rte.gin, and of --help.

    python benchmarks/startup.py [--repeats=1] [--without_evaluations]

Each run is its own process: "cold" with empty JAX_COMPILATION_CACHE_DIR and ROBUST_FT_CACHE_DIR,
"warm" with the caches of the cold run. The recipe evaluates the pretrained model before its first
step; --without_evaluations skips that. Metrics of a step are written when the device has computed
them and the next step has begun: the first line of a training step in metrics.jsonl ends the
measurement, and the process. CPU-seconds (user and system) are those of the process and its
children. Prints medians.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "robust_ft.train"]
STAGE = "prompt"  # the recipe's first
POLL_SECONDS = 0.02


def seconds(flags: list[str], caches: Path, metrics: Path | None) -> tuple[float, float]:
    """Returns wall and CPU seconds of one process.

    Args:
        flags: The command's flags.
        caches: The folder for its caches.
        metrics: The process is killed once this file has a line of a training step; None if it
            exits by itself.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(caches / "xla"),
        "ROBUST_FT_CACHE_DIR": str(caches / "data"),
    }
    begin = time.perf_counter()
    command = [*TRAIN, *flags]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while metrics is not None and not _has_step(metrics) and _runs(process.pid):
            time.sleep(POLL_SECONDS)
        took = time.perf_counter() - begin
        if metrics is not None:
            # `process.kill` may reap it, which loses its resource usage.
            os.kill(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if metrics is None:
            took = time.perf_counter() - begin
        if (process.returncode != 0) if metrics is None else not _has_step(metrics):
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    return took, usage.ru_utime + usage.ru_stime


def _runs(pid: int) -> bool:
    # Without reaping it, so that `os.wait4` still gets its resource usage.
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _has_step(metrics: Path) -> bool:
    """Returns whether a complete line of the file is of a training step, not of an evaluation."""
    if not metrics.exists():
        return False
    *lines, _ = metrics.read_text(encoding="utf-8").split("\n")
    return any("task" not in json.loads(line) for line in lines)


def runs(flags: list[str]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yields "cold", "warm" and "--help", each with its (wall, CPU) seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("cold", "warm"):
            output = folder / kind
            recipe = ["--gin_file=gin_configs/promot_rte.gin", f"--gin.MODEL_DIR={output}"]
            metrics = output / STAGE / "metrics.jsonl"
            yield kind, seconds([*recipe, *flags], folder / "caches", metrics)
        yield "--help", seconds(["--help"], folder / "caches", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--without_evaluations", action="store_true")
    arguments = parser.parse_args()
    flags = ["--gin.Stage.log_period=1"]
    if arguments.without_evaluations:
        flags += ["--gin.Stage.evaluations=[]", "--gin.Stage.final_evaluations=[]"]
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        for kind, took in runs(flags):
            measured.setdefault(kind, []).append(took)
            print(f"{kind:7} {took[0]:7.2f} s wall {took[1]:7.2f} CPU-s", flush=True)
    if arguments.repeats > 1:
        print("medians")
        for kind, each in measured.items():
            wall, cpu = (statistics.median(column) for column in zip(*each, strict=True))
            print(f"{kind:7} {wall:7.2f} s wall {cpu:7.2f} CPU-s")


if __name__ == "__main__":
    main()
