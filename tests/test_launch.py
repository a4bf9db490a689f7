"""Launchers say what they would do, and refuse what they cannot; no test starts anything."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
REQUIRED = {
    "local_processes": [],
    "gpu_machine": [],
    "slurm_gpu": ["--nodes=2", "--gpus_per_node=4", "--time=12:00:00"],
    "tpu_vm": ["--name=promot", "--zone=us-west4-a", "--type=v5litepod-16"],
}
# A value with a space and quotes has to reach the program as it is.
FLAGS = ["--gin_file=gin_configs/promot_rte.gin", "--gin.HELD_OUT_TASKS={0: ['a b']}"]


def launch(script, *flags, program_flags=FLAGS):
    command = ["bash", LAUNCH / f"{script}.sh", *flags]
    command += ["--", *program_flags] if program_flags else []
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def dry_run(script, *flags):
    ended = launch(script, *REQUIRED[script], *flags, "--dry_run")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def words_after_module(line):
    """Returns what the program robust_ft.<program> gets, as a shell would split it."""
    words = shlex.split(line)
    return words[words.index("-m") + 1 :]


def test_every_launcher_is_tested():
    assert {path.stem for path in LAUNCH.glob("*.sh")} == {*REQUIRED, "common"}


@pytest.mark.parametrize("script", REQUIRED)
def test_help_is_the_header(script):
    ended = launch(script, "--help", program_flags=())
    assert ended.returncode == 0
    assert f"launch/{script}.sh" in ended.stdout and "set -euo" not in ended.stdout


def test_local_processes_share_an_address():
    lines = dry_run("local_processes", "--processes=3", "--program=eval").splitlines()
    words = [words_after_module(line) for line in lines]
    assert len(lines) == 3 and all("JAX_PLATFORMS=cpu" in line for line in lines)
    for index, (module, *flags) in enumerate(words):
        assert module == "robust_ft.eval" and flags[:2] == FLAGS
        assert flags[3:] == ["--num_processes=3", f"--process_id={index}"]
    assert len({flags[3] for flags in words}) == 1


def test_gpu_machine():
    line = dry_run("gpu_machine", "--gpus=0,1")
    assert "CUDA_VISIBLE_DEVICES=0,1" in shlex.split(line)
    assert words_after_module(line) == ["robust_ft.train", "--num_processes=1", *FLAGS]
    assert "CUDA_VISIBLE_DEVICES" not in dry_run("gpu_machine")


def test_slurm_has_one_task_for_each_gpu_and_comes_back():
    job = dry_run("slurm_gpu", "--partition=big").splitlines()
    settings = {line.removeprefix("#SBATCH ") for line in job if line.startswith("#SBATCH")}
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= settings
    assert {"--time=12:00:00", "--partition=big", "--requeue", "--signal=TERM@120"} <= settings
    assert not any("account" in setting for setting in settings)
    (line,) = (line for line in job if line.startswith("srun"))
    assert words_after_module(line.split("||")[0]) == ["robust_ft.train", *FLAGS]
    assert any("75" in line and "scontrol requeue" in line for line in job)
    script = "\n".join(job[1:-1])
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0


def test_tpu_runs_on_all_workers():
    said = dry_run("tpu_vm", "--nfs=10.0.0.2:/share", "--spot", "--project=mine", "--delete")
    create, tar, copy, setup, start, delete = map(shlex.split, said.splitlines())
    assert create[3:5] == ["queued-resources", "create"] and "--spot" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert tar[0] == "tar" and copy[4] == "scp"
    for command in (create, copy, setup, start, delete):
        assert command[0] == "gcloud" and "--zone=us-west4-a" in command
        assert "--project=mine" in command
    for command in (copy, setup, start):
        assert "--worker=all" in command
    assert "mount 10.0.0.2:/share /mnt/shared" in setup[-1]
    assert words_after_module(start[-1].removeprefix("--command=")) == ["robust_ft.train", *FLAGS]
    assert "delete" in delete
    assert "mount" not in dry_run("tpu_vm") and "delete" not in dry_run("tpu_vm")


@pytest.mark.parametrize(
    ("script", "flag", "said"),
    [
        ("local_processes", "--processes=0", "--processes=0"),
        ("local_processes", "--proceses=2", "'--proceses=2'"),
        ("gpu_machine", "--gpus=a", "--gpus=a"),
        ("gpu_machine", "--stops=-1", "--stops=-1"),
        ("slurm_gpu", "--nodes=two", "--nodes=two"),
        ("slurm_gpu", "--time=soon", "--time=soon"),
        ("tpu_vm", "--name=Promot_1", "--name=Promot_1"),
        ("tpu_vm", "--type=v9-8", "v5litepod-N"),
        ("tpu_vm", "--zone=us", "--zone=us"),
        ("tpu_vm", "--nfs=/share", "HOST:/SHARE"),
        ("tpu_vm", "--program=convert", "train, eval or infer"),
        ("tpu_vm", "--spot=yes", "'--spot=yes'"),
        ("tpu_vm", "--name", "'--name'"),
        ("tpu_vm", "--name zone=a", "'--name zone=a'"),
    ],
)
def test_a_wrong_flag_is_one_sentence(script, flag, said):
    ended = launch(script, *REQUIRED[script], flag, "--dry_run")
    assert ended.returncode == 2 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: ") and said in line


@pytest.mark.parametrize("script", REQUIRED)
def test_the_program_needs_a_config(script):
    for flags in ((), ("--gin.BATCH_SIZE=8",)):
        ended = launch(script, *REQUIRED[script], "--dry_run", program_flags=flags)
        assert ended.returncode == 2 and "--gin_file" in ended.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "-x", *LAUNCH.glob("*.sh")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH.parent, check=False)
    assert found.returncode == 0, found.stdout
