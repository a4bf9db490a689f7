"""A program that computes on CPUs starts anew, once, with settings for memory and the compiler."""

import os
import runpy
import subprocess
import sys

import pytest

from robust_ft import cpu_settings

VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS")
TRIM = "glibc.malloc.trim_threshold"
LEVEL, EMITTERS = "--xla_backend_optimization_level", "--xla_cpu_use_fusion_emitters"
FLAGS = f"{LEVEL}=1 {EMITTERS}=false"
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
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), os.environ.get("XLA_FLAGS"))
from robust_ft import cpu_settings
cpu_settings.use()
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
    for variable in (*VARIABLES, "JAX_PLATFORMS"):
        monkeypatch.setenv(variable, "")  # so that it is as before when the test has ended
        monkeypatch.delenv(variable)
    monkeypatch.setattr(cpu_settings.glob, "glob", lambda pattern: [])
    return calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's")
def test_the_same_process_goes_on_with_the_same_arguments(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
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
    assert before.endswith("['--a b', 'c'] None None")
    assert after.startswith(before.removesuffix("None None"))
    assert f"{TRIM}=" in after and after.endswith(f" {FLAGS}")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_steps_use_the_memory_of_the_steps_before(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = []
    for changes in ({}, cpu_settings.missing({})):
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
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/run")
    with pytest.raises(Restarted):
        cpu_settings.use()
    tunables, flags = (exec_calls[0][2][variable] for variable in VARIABLES)
    assert tunables.startswith("glibc.rtld.nns=4:") and f":{TRIM}=" in tunables
    assert flags == f"--xla_dump_to=/tmp/run {FLAGS}"


def test_a_flag_that_is_set_stays():
    changes = cpu_settings.missing({"XLA_FLAGS": f"{LEVEL}=3"})
    assert changes["XLA_FLAGS"] == f"{LEVEL}=3 {EMITTERS}=false"


def test_nothing_is_missing_twice():
    assert cpu_settings.missing(cpu_settings.missing({})) == {}


@pytest.mark.parametrize(
    ("variable", "value", "platform", "devices"),
    [
        ("GLIBC_TUNABLES", f"{TRIM}=0", "linux", []),
        ("JAX_PLATFORMS", "cuda,cpu", "linux", []),
        ("JAX_PLATFORMS", "", "linux", ["/dev/nvidia0"]),
        ("JAX_PLATFORMS", "cpu", "darwin", []),
    ],
)
def test_elsewhere_the_program_goes_on(exec_calls, monkeypatch, variable, value, platform, devices):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cpu_settings.glob, "glob", lambda pattern: devices)
    cpu_settings.use()
    assert not exec_calls
    on_cpu = variable == "GLIBC_TUNABLES" or value == "cpu"
    assert os.environ.get("XLA_FLAGS") == (FLAGS if on_cpu else None)


def test_cpus_are_used_where_asked_for(exec_calls, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(cpu_settings.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    with pytest.raises(Restarted):
        cpu_settings.use()
