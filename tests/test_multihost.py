"""Two processes on this machine are one run: they train, decode, stop and fail together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import multihost_run
import numpy as np
import pytest
import toy

from robust_ft import multihost
from robust_ft.command_line import RESUME
from robust_ft.errors import UserError
from robust_ft.runner import run
from robust_ft.stage_checkpoints import _of_this_process

TESTS = Path(__file__).parent


def two_processes(command_of, devices=1):
    """Returns [(exit status, stdout, stderr)] of both.

    Args:
        command_of: From a process's number and the address of the first to what Python runs.
        devices: Of each process.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    both = [
        subprocess.Popen(
            [sys.executable, *map(str, command_of(index, address))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = []
    try:
        for process in both:
            out, err = process.communicate(timeout=300)
            ended.append((process.returncode, out, err))
    finally:
        for process in both:
            process.kill()
    return ended


def script(what, directory=""):
    """Returns what runs `multihost_run`."""
    return lambda *process: [TESTS / "multihost_run.py", what, *process, directory]


def train(directory, *flags, of_the_second=()):
    """Returns what runs the command line with the toy recipe."""

    def command_of(index, address):
        return [
            "-m",
            "robust_ft.train",
            f"--gin_file={TESTS / 'toy_promot.gin'}",
            f"--gin.MODEL_DIR={directory}",
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={index}",
            *flags,
            *(of_the_second if index else ()),
        ]

    return command_of


def sentences(stderr):
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


# --- One run


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    run(multihost_run.recipe(directory))
    return directory


def assert_same_run(directory, expected):
    losses = [
        [x["loss"] for x in toy.read_lines(folder / "model" / "metrics.jsonl") if "loss" in x]
        for folder in (directory, expected)
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert json.loads((directory / "summary.json").read_text()) == json.loads(
        (expected / "summary.json").read_text()
    )
    folder = Path("model") / "inference_eval"
    files = sorted(path.name for path in (expected / folder).glob("*.jsonl"))
    assert "toy-000004.jsonl" in files
    for name in files:
        if not name.endswith("metrics.jsonl"):
            lines = [toy.read_lines(run / folder / name) for run in (directory, expected)]
            assert lines[0] == lines[1]
    params = [toy.final(run, "model") for run in (directory, expected)]
    for path, array in params[1].items():
        np.testing.assert_allclose(params[0][path], array, rtol=0, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_two_processes_train_and_decode_as_one(in_one_process, tmp_path):
    ended = two_processes(script("train", tmp_path))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_same_run(tmp_path, in_one_process)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "ctrl-c"])
def test_all_stop_before_the_same_step_and_go_on_together(in_one_process, tmp_path, how):
    ended = two_processes(script(how, tmp_path))
    assert [status for status, _, _ in ended] == [RESUME, RESUME], ended
    said = {out.splitlines()[-1] for _, out, _ in ended}
    assert len(said) == 1 and "Stopped at step" in said.pop()
    ended = two_processes(script("train", tmp_path))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_same_run(tmp_path, in_one_process)


@pytest.mark.slow
def test_nan_ends_all_with_the_examples_of_all(tmp_path):
    ended = two_processes(script("nan", tmp_path))
    assert [status for status, _, _ in ended] == [2, 2], ended
    for _, _, stderr in ended:
        [sentence] = sentences(stderr)
        assert re.search(
            r"of stage 'model' gives NaN .* from the examples [\d, ]+ of 'toy'", sentence
        )
        assert sentence.split(" of 'toy'")[0].count(",") >= 3  # the four of the global batch
    assert not list((tmp_path / "model").glob("checkpoint_*"))


# --- One end


@pytest.mark.parametrize(
    ("what", "statuses", "sentence"),
    [
        ("config", [2, 2], "Process 1 has another config than process 0: 'RATE = 0.1', not "),
        pytest.param(
            "lost",
            [multihost.LOST, -signal.SIGKILL],
            "Process 1 of 2 has given no sign of life",
            marks=pytest.mark.slow,
        ),
        pytest.param("mistake", [2, 2], "Line 3 of data.csv is empty", marks=pytest.mark.slow),
        pytest.param(
            "first lost",
            [-signal.SIGKILL, multihost.LOST],
            "Process 0 is gone",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_end_with_a_sentence(what, statuses, sentence):
    ended = two_processes(script(what))
    assert [status for status, _, _ in ended] == statuses, ended
    for status, _, stderr in ended:
        if status > 0:
            assert len(sentences(stderr)) == 1 and sentence in sentences(stderr)[0], stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "of_the_second", "sentence"),
    [
        (["--gin.MODEL_PARALLEL=3"], [], "model_parallel=3 does not divide the 4 devices"),
        (["--gin.MODEL_PARALLEL=4"], [], "num_heads: 2 heads do not divide over the 4 devices"),
        (["--gin.BATCH_SIZE=6"], [], "batch_size=6 of stage 'prompt' in 2 microbatches does not"),
        (
            ["--gin.EVAL_BATCH_SIZE=6"],
            [],
            "batch_size=6 of the evaluation on 'toy' does not divide over the 4 devices",
        ),
        ([], ["--gin.TRAIN_STEPS=13"], "another config than process 0: 'TRAIN_STEPS = 13'"),
        ([], ["--gin.MODEL_PARALLEL=3"], "another config than process 0: 'MODEL_PARALLEL = 3'"),
    ],
)
def test_a_mistake_is_one_sentence_on_every_host(flags, of_the_second, sentence, tmp_path):
    flags = ["--gin.MICROBATCHES=2", *flags]
    ended = two_processes(train(tmp_path, *flags, of_the_second=of_the_second), devices=2)
    for status, _, stderr in ended:
        (said,) = sentences(stderr)
        assert status == 2 and sentence in said
    assert not list(tmp_path.rglob("checkpoint_*"))


def test_one_changed_label_ends_all_before_training(tmp_path):
    ended = two_processes(script("other data", tmp_path / "run"))
    sentence = "Process 1 differs from process 0: data.mine.train.examples: task 'mine', split "
    sentence += "'train', has other examples: file 'mine.csv' has another content; give all"
    for status, _, stderr in ended:
        (said,) = sentences(stderr)
        assert status == 2 and sentence in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_may_have_own_copies_and_own_caches(tmp_path):
    ended = two_processes(script("own data", tmp_path / "run"))
    assert [status for status, _, _ in ended] == [0, 0], ended


# --- Which processes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_processes": 2}, "given together"),
        ({"coordinator_address": "a:1", "num_processes": 2}, "given together"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": -1}, "--process_id=-1"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 1}, "HOST:PORT"),
        ({"timeout": 0}, "--process_timeout=0"),
    ],
)
def test_flags_that_say_too_little(given, said):
    with pytest.raises(UserError, match=said):
        multihost.Processes(**given)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        processes = multihost.Processes(f"localhost:{port}", 2, 0)
        with pytest.raises(UserError, match=f"Port {port}"), multihost.joined(processes):
            pass


CLUSTERS = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_slurm_tells_who_is_who(monkeypatch):
    for name, value in CLUSTERS.items():
        monkeypatch.setenv(name, value)
    met = {}
    monkeypatch.setattr(multihost.distributed.State, "initialize", lambda *a, **k: met.update(k))
    monkeypatch.setattr(multihost.distributed.xla_bridge, "backends_are_initialized", bool)
    with multihost.joined(multihost.Processes(timeout=20)):
        pass
    assert met["heartbeat_timeout_seconds"] > 20
    found = jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 1
    )
    assert found[0].startswith("node3:") and found[1:] == (2, 1, [0])


@pytest.mark.parametrize(
    "environment",
    [
        {**CLUSTERS, "SLURM_NTASKS": "1"},
        {"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_process_alone_joins_nobody(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    with multihost.joined(multihost.Processes()):
        assert multihost.is_first()


# --- What is the same with one process


def test_one_process_agrees_with_itself():
    multihost.check_same("config", "a")
    assert multihost.gathered("a") == ["a"]
    array = multihost.put(np.arange(3), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert multihost.whole({"x": array})["x"] is array


def test_sigterm_is_a_wish_for_as_long_as_the_block_lasts():
    before = signal.getsignal(signal.SIGTERM)
    with multihost.stop_on_sigterm() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
    found = []

    def in_a_thread():
        with multihost.stop_on_sigterm() as stop:
            found.append(stop.is_set())

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [False]


def test_ctrl_c_is_a_wish_once(capfd):
    default = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        _ctrl_c_is_a_wish_once(capfd)
    finally:
        signal.signal(signal.SIGINT, default)


def _ctrl_c_is_a_wish_once(capfd):
    before, stop = signal.getsignal(signal.SIGINT), threading.Event()
    with multihost.stop_on_ctrl_c(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        assert capfd.readouterr().err.strip().count("\n") == 0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    # A shell's background jobs are not meant.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with multihost.stop_on_ctrl_c(stop):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_process_gets_its_own_position_back(monkeypatch):
    saved = {"processes": [{"position": 3}, {"position": 4}]}
    for index, position in ((0, 3), (1, 4), (2, 3)):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert _of_this_process(saved) == {"position": position}
        assert _of_this_process({"position": 5}) == {"position": 5}
