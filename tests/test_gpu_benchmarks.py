"""The benchmarks for GPUs, on CPUs and small: what they need, measure and print."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_without_tensorflow import FORBID

from robust_ft import gin_config
from robust_ft.trainable import flatten

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import common  # noqa: E402
import gpu_decode  # noqa: E402
import gpu_train  # noqa: E402
from common import Measured  # noqa: E402

NOT_NEEDED = ("gin", "grain", "jaxtyping", "orbax", "peft", "sentencepiece", "tensorstore")
NOT_NEEDED += ("tokenizers", "transformers")
SMALL = ["--model=t5-small", "--layers=1", "--batch=2", "--input_length=6", "--target_length=4"]
SMALL += ["--rounds=1", "--dtype=float32"]


def sizes(leaves):
    return sum(leaf.size for leaf in leaves)


@pytest.mark.slow
def test_they_need_nothing_but_jax_flax_and_optax():
    code = (
        FORBID.replace("('tensorflow'", f"({', '.join(map(repr, NOT_NEEDED))}, 'tensorflow'")
        + f"""
sys.path.insert(0, {str(BENCHMARKS)!r})
import common, gpu_decode, gpu_train
common.seconds_a_step = lambda step, wait, rounds: 1.0 if wait(step()) else 0.0
gpu_train.main([*sys.argv[1:], "--prompt_length=3", "--alone", "ours", "prompt"])
gpu_decode.main([*sys.argv[1:], "--alone", "ours", "beam4"])
"""
    )
    command = [sys.executable, "-c", code, *SMALL]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    trained, decoded = (Measured(**json.loads(line)) for line in ended.stdout.splitlines())
    assert (trained.method, trained.tokens, trained.device) == ("prompt", 2 * (6 + 4), "cpu")
    assert (decoded.method, decoded.tokens, decoded.who) == ("beam4", 2 * 4, "ours")
    for row in (trained, decoded):
        assert row.seconds > 0 and row.flops > 0 and row.peak_bytes is None and not row.reason


def test_flops_of_a_step():
    arguments = gpu_train.parser().parse_args([*SMALL, "--model=gpt2"])
    batch = gpu_train.our_batch(arguments)
    rows, length, embed, mlp, vocab = 2, 6 + 4, 768, 3072, 50257
    layer = 2 * length * embed * (4 * embed + 2 * mlp) + 4 * length * length * embed
    # Forward, and twice as much backward.
    expected = 3 * rows * (layer + 2 * 4 * embed * vocab)
    assert gpu_train.step_flops(arguments, "full", batch) == expected
    # Where only a prompt trains, no kernel has a gradient.
    arguments.prompt_length = 3
    assert gpu_train.step_flops(arguments, "prompt", batch) < expected


@pytest.mark.parametrize("name", common.MODELS)
def test_models_are_those_of_the_configs(name):
    file = f"gin_configs/models/{name.replace('-', '_')}.gin"
    recipe = gin_config.load(["gin_configs/full_rte.gin", file]).recipe
    config = recipe.stages[0].model.config
    flags = [f"--model={name}", f"--dtype={config.dtype}", f"--remat={config.remat}"]
    assert gpu_train.config_of(gpu_train.parser().parse_args(flags)) == config


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(device, peak):
    assert common.peak_tflops(device) == peak
    row = Measured("full", "ours", seconds=2.0, flops=10**13, device=device)
    assert common.mfu(row) == (None if peak is None else pytest.approx(5 / peak))
    assert common.mfu(row, 10) == 0.5


def test_the_table_and_the_file(monkeypatch, tmp_path, capsys):
    rows = {
        "ours": Measured("lora", "ours", 0.5, 100, 2 * 10**14, 3 * 2**30, "NVIDIA H100 80GB HBM3"),
        "theirs": Measured("lora", "theirs", reason="peft is not installed"),
    }
    monkeypatch.setattr(common, "_alone", lambda argv, who, method: rows[who])
    file = tmp_path / "figures.json"
    gpu_train.main(["--method", "lora", f"--json={file}"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "t5-base, batch 16, 512 tokens in, 128 out, bfloat16"
    assert printed[2].split() == ["lora", "ours", "500.00", "200", "400.00", "40.4%", "3.00", "GiB"]
    assert printed[3].split(maxsplit=2) == ["lora", "theirs", "peft is not installed"]
    record = json.loads(file.read_text())
    assert [row["who"] for row in record["measured"]] == ["ours", "theirs"]
    assert record["measured"][0]["mfu"] == pytest.approx(400 / 989)
    assert record["settings"]["batch"] == 16


def test_a_failure_is_in_the_table_and_the_status(monkeypatch, capsys):
    # A process of its own, which fails: GPT-2 has 1,024 positions.
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "gpu_train.py")])
    flags = ["--model=gpt2", "--input_length=1000", "--method=full", "--peer=no", "--layers=1"]
    with pytest.raises(SystemExit) as ended:
        gpu_train.main(flags)
    assert ended.value.code == 1
    assert "num_positions=1024; shorten one of them" in capsys.readouterr().out


def test_an_unknown_device_asks_for_its_peak(monkeypatch, capsys):
    row = Measured("greedy", "ours", 0.5, 100, 10, None, "cpu")
    monkeypatch.setattr(common, "_alone", lambda *_: row)
    gpu_decode.main(["--method", "greedy", "--peer=no"])
    printed = capsys.readouterr().out
    assert "unknown not reported" in printed and "pass --peak_tflops" in printed


def test_the_median_round_counts(monkeypatch):
    """Two steps compile, one says that three fit into a second; rounds take 6, 9 and 30 seconds."""
    clock = iter([0.0, 0.3, 1.0, 7.0, 10.0, 19.0, 20.0, 50.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    steps, waited = itertools.count(), []
    assert common.seconds_a_step(lambda: next(steps), waited.append, rounds=3) == 3.0
    assert waited == [0, 1, 2, 5, 8, 11]


@pytest.mark.parity
@pytest.mark.parametrize("name", common.MODELS)
def test_theirs_has_the_same_sizes(name):
    arguments = gpu_train.parser().parse_args([f"--model={name}"])
    theirs = common.their_model(gpu_train.config_of(arguments), "meta")
    ours = gpu_train.our_model(arguments, "full").shapes()
    assert sizes(jax.tree.leaves(ours)) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["t5-small", "gpt2"])
@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_theirs_trains_as_much(name, method):
    pytest.importorskip("peft")
    arguments = gpu_train.parser().parse_args([*SMALL, f"--model={name}", "--prompt_length=3"])
    model = gpu_train.our_model(arguments, method)
    trained, _ = gpu_train.split(model, model.shapes())
    bare = common.their_model(gpu_train.config_of(arguments), "cpu")
    theirs = gpu_train.their_peft(arguments, method, bare)
    expected = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sizes(flatten(trained).values()) == expected


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["t5-small", "gpt2"])
def test_theirs_is_measured_too(name, monkeypatch):
    monkeypatch.setattr(common, "seconds_a_step", lambda step, wait, rounds: wait(step()) or 1.0)
    flags = [*SMALL, f"--model={name}", "--peer=yes"]
    arguments = gpu_train.parser().parse_args([*flags, "--no_compile"])
    rows = [gpu_train.theirs(arguments, "full"), gpu_decode.theirs(arguments, "greedy")]
    assert [row.tokens for row in rows] == [20, 8]
    assert all(row.who == "theirs" and row.device == "cpu" for row in rows)


@pytest.mark.parity
def test_without_a_gpu_theirs_is_left_out(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    gpu_train.main([*SMALL, "--alone", "theirs", "full"])
    row = Measured(**json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert row.seconds is None and "sees no GPU" in row.reason
