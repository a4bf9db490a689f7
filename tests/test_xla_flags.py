"""Presets reach the compiler, which knows every flag; the environment wins over them."""

import subprocess
import sys

import pytest

from robust_ft import command_line, cpu_settings, xla_flags
from robust_ft.errors import UserError

# What the compiler has read, a line a setting.
SHOW = """
from jaxlib import _jax
options = _jax.CompileOptions()  # lives longer than what it gives
build = options.executable_build_options
print(build.debug_options)
"""


GPU = xla_flags.PRESETS["gpu"][1]


def test_the_compiler_reads_every_flag(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_reduce=false")
    code = "from robust_ft import xla_flags\nxla_flags.use('gpu')" + SHOW
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    read = set(ended.stdout.splitlines())
    for flag in GPU:
        name, value = flag.removeprefix("--").split("=")
        value = "false" if name == "xla_gpu_enable_pipelined_all_reduce" else value
        assert f"{name}: {value}" in read


def test_the_compiler_reads_the_flags_for_cpus(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", cpu_settings.missing({})["XLA_FLAGS"])
    ended = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, check=False, timeout=60
    )
    expected = {"xla_backend_optimization_level: 1", "xla_cpu_use_fusion_emitters: false"}
    assert expected <= set(ended.stdout.splitlines()), ended.stderr


def test_the_environment_wins(monkeypatch):
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_autotune_level=2"
    monkeypatch.setenv("XLA_FLAGS", mine)
    xla_flags.use("gpu")
    flags = xla_flags.os.environ["XLA_FLAGS"]
    assert flags.startswith(mine) and flags.count("latency_hiding_scheduler") == 1
    assert "--xla_gpu_enable_pipelined_all_gather=true" in flags


def test_flags_of_tpus_have_a_variable_of_their_own(monkeypatch):
    (flag,) = xla_flags.PRESETS["tpu"][1]
    for mine, expected in (("--other=1", f"--other=1 {flag}"), (f"{flag}0", f"{flag}0")):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", mine)
        xla_flags.use("tpu")
        assert xla_flags.os.environ["LIBTPU_INIT_ARGS"] == expected


def test_command_lines_set_them_before_jax_is_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    arguments = command_line.parse("train", "", ["--xla_flags=gpu"])
    with pytest.raises(UserError, match="--gin_file"), command_line.started(arguments):
        pass
    assert set(xla_flags.os.environ["XLA_FLAGS"].split()) == set(GPU)
    code = (
        "import sys, robust_ft.command_line, robust_ft.xla_flags\nassert 'jax' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_preset_is_one_sentence():
    with pytest.raises(UserError, match=r"--xla_flags=gup is not .* Did you mean 'gpu'\?"):
        xla_flags.use("gup")
