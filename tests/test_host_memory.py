"""A program that computes on CPUs starts anew, once, so that it keeps the memory that it frees."""

import os
import runpy
import subprocess
import sys

import pytest

from robust_ft import host_memory

TRIM = "glibc.malloc.trim_threshold"
# Page faults of steps that need 512 MiB of temporary memory each, and the most memory in use.
STEPS = """
import resource
import jax
step = jax.jit(lambda x: x + (x[:, None] * x).cumsum(0)[-1] * 1e-9)
x = jax.numpy.ones(8192)
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults[2:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
PROGRAM = """
import os, sys
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
from robust_ft import host_memory
host_memory.keep_freed()
"""


class Restarted(Exception):
    pass


@pytest.fixture
def exec_calls(monkeypatch):
    calls = []

    def execve(*arguments):
        calls.append(arguments)
        raise Restarted

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(host_memory.glob, "glob", lambda pattern: [])
    return calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's")
def test_the_same_process_goes_on_with_the_same_arguments(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-u", str(file), "--a b", "c"]
    ended = subprocess.run(
        command,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, after = ended.stdout.splitlines()
    assert before.endswith("['--a b', 'c'] None")
    assert after.startswith(before.removesuffix("None")) and f"{TRIM}=" in after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_steps_use_the_memory_of_the_steps_before(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = []
    for changes in ({}, host_memory.keeping({})):
        ended = subprocess.run(
            [sys.executable, "-c", STEPS],
            env=os.environ | changes,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        *faults, peak = map(int, ended.stdout.split())
        found.append((sum(count > 1000 for count in faults), peak))
    (new, peak), (kept_new, kept_peak) = found
    assert new == 10 and kept_new <= 5
    assert kept_peak < peak + 3 * 512 * 1024


@pytest.mark.parametrize("program", ["train", "eval", "infer"])
def test_command_lines_that_compute_start_anew(exec_calls, monkeypatch, program):
    monkeypatch.delitem(sys.modules, f"robust_ft.{program}", raising=False)  # as `python -m` has it
    with pytest.raises(Restarted):
        runpy.run_module(f"robust_ft.{program}", run_name="__main__")
    assert exec_calls[0][1] == [sys.executable, *sys.orig_argv[1:]]


def test_what_else_is_set_stays(exec_calls, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=4")
    with pytest.raises(Restarted):
        host_memory.keep_freed()
    tunables = exec_calls[0][2]["GLIBC_TUNABLES"]
    assert tunables.startswith("glibc.rtld.nns=4:") and f":{TRIM}=" in tunables


@pytest.mark.parametrize(
    ("variable", "value", "platform", "devices"),
    [
        ("GLIBC_TUNABLES", f"{TRIM}=0", "linux", []),
        ("JAX_PLATFORMS", "cuda,cpu", "linux", []),
        ("JAX_PLATFORMS", "", "linux", ["/dev/nvidia0"]),
        ("JAX_PLATFORMS", "cpu", "darwin", []),
    ],
)
def test_elsewhere_nothing_changes(exec_calls, monkeypatch, variable, value, platform, devices):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(host_memory.glob, "glob", lambda pattern: devices)
    host_memory.keep_freed()
    assert not exec_calls


def test_cpus_are_used_where_asked_for(exec_calls, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(host_memory.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    with pytest.raises(Restarted):
        host_memory.keep_freed()
