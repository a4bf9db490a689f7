"""Shared by the GPU benchmarks: flags, model sizes, a process for each measurement, timing, tables.

Needs only jax, flax and optax; PyTorch where the peer (Hugging Face) is measured.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optional_jaxtyping  # noqa: F401, before robust_ft

from robust_ft import xla_flags
from robust_ft.errors import UserError
from robust_ft.files import write_json
from robust_ft.models.attention_kernels import KERNELS
from robust_ft.models.config import ModelConfig
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.options import DTYPES
from robust_ft.models.t5 import T5Config

GIB = 2**30
START = 0
T5: dict[str, Any] = {"mlp_activations": ("relu",), "logits_via_embedding": True}
# T5 1.0 and GPT-2 with the published sizes.
MODELS: dict[str, ModelConfig] = {
    "t5-small": T5Config(
        emb_dim=512, num_heads=8, mlp_dim=2048, num_encoder_layers=6, num_decoder_layers=6, **T5
    ),
    "t5-base": T5Config(
        emb_dim=768, num_heads=12, mlp_dim=3072, num_encoder_layers=12, num_decoder_layers=12, **T5
    ),
    "t5-large": T5Config(
        emb_dim=1024, num_heads=16, mlp_dim=4096, num_encoder_layers=24, num_decoder_layers=24, **T5
    ),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(emb_dim=1024, num_heads=16, mlp_dim=4096, num_layers=24),
}
# Dense bfloat16 TFLOP/s (float16 where a GPU has no bfloat16) from the data sheets. The first entry
# whose name is a word of the device's name counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        method: Such as "lora", or "beam4".
        who: "ours" or "theirs".
        seconds: Per step, the median over rounds; None if nothing was measured.
        tokens: Number of tokens that a step trains on, or generates.
        flops: FLOPs of a step's matrix products.
        peak_bytes: Peak memory on the device; None if it is not reported.
        device: The device's name.
        reason: Why nothing was measured.
    """

    method: str
    who: str
    seconds: float | None = None
    tokens: int = 0
    flops: int = 0
    peak_bytes: int | None = None
    device: str = ""
    reason: str = ""


def parser(description: str, methods: Iterable[str]) -> argparse.ArgumentParser:
    """Returns a parser of the flags of a benchmark.

    Args:
        description: The benchmark's docstring.
        methods: What it can measure; all of them by default.
    """
    methods = tuple(methods)
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", choices=MODELS, default="t5-base")
    flags.add_argument("--method", nargs="+", choices=methods, default=list(methods))
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--input_length", type=int, default=512, help="tokens")
    flags.add_argument("--target_length", type=int, default=128, help="tokens")
    flags.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations")
    flags.add_argument("--attention", choices=KERNELS, default="auto")
    flags.add_argument("--layers", type=int, help="of encoder and decoder each; the model's")
    flags.add_argument("--rounds", type=int, default=5, help="their median is reported")
    flags.add_argument("--peer", choices=("auto", "yes", "no"), default="auto", help="Hugging Face")
    flags.add_argument("--peak_tflops", type=float, help="the device's; see PEAK_TFLOPS")
    flags.add_argument("--xla_flags", choices=("gpu",), help="as in robust_ft.train")
    flags.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    flags.add_argument("--alone", nargs=2, metavar=("WHO", "METHOD"), help=argparse.SUPPRESS)
    return flags


def config_of(arguments: argparse.Namespace, **changes: Any) -> Any:
    """Returns the config of the model that is measured."""
    config: Any = MODELS[arguments.model]
    if arguments.layers:
        names = [name for name in vars(config) if name.endswith("layers")]
        changes = dict.fromkeys(names, arguments.layers) | changes
    settings = {"dtype": arguments.dtype, "attention": arguments.attention}
    return dataclasses.replace(config, **(settings | changes))


def run(
    flags: argparse.ArgumentParser,
    measures: dict[str, Callable[[argparse.Namespace, str], Measured]],
    argv: Sequence[str],
) -> None:
    """Measures what the command line asks for, prints a table and writes --json.

    Each measurement has its own process: peak memory is reported per process, and JAX preallocates
    most of the device's memory.

    Ends with status 1 if something of ours could not be measured.

    Args:
        flags: The parser, from `parser`.
        measures: {"ours" or "theirs": function that measures a method}.
        argv: The command line.
    """
    arguments = flags.parse_args(argv)
    if arguments.alone:
        who, method = arguments.alone
        if arguments.xla_flags and who == "ours":
            xla_flags.use(arguments.xla_flags)
        try:
            row = measures[who](arguments, method)
        except UserError as error:
            row = Measured(method, who, reason=str(error))
        print(json.dumps(dataclasses.asdict(row)))
        return
    peers = ("ours",) if arguments.peer == "no" else ("ours", "theirs")
    rows = []
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.input_length} tokens in, "
        f"{arguments.target_length} out, {arguments.dtype}"
    )
    names = f"{'ms':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>7} {'peak memory':>12}"
    print(f"{'':16} {names}", flush=True)
    for method in arguments.method:
        flops = 0
        for who in peers:
            row = _alone(argv, who, method)
            flops = row.flops or flops  # counted in our program, for both
            rows.append(dataclasses.replace(row, flops=flops))
            print(_line(rows[-1], arguments.peak_tflops), flush=True)
    devices = {
        row.device for row in rows if row.seconds and mfu(row, arguments.peak_tflops) is None
    }
    for device in sorted(devices):
        print(f"The peak of the device '{device}' is unknown: for the MFU, pass --peak_tflops.")
    if arguments.json:
        record = [
            dataclasses.asdict(row) | {"mfu": mfu(row, arguments.peak_tflops)} for row in rows
        ]
        settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "alone")}
        write_json(arguments.json, {"settings": settings, "measured": record})
    if any(row.seconds is None for row in rows if row.who == "ours"):
        sys.exit(1)


def _alone(argv: Sequence[str], who: str, method: str) -> Measured:
    command = [sys.executable, sys.argv[0], *argv, "--alone", who, method]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        return Measured(method, who, reason=f"failed with status {ended.returncode}, see above")
    return Measured(**json.loads(ended.stdout.splitlines()[-1]))


def _line(row: Measured, peak: float | None) -> str:
    begin = f"{row.method:8} {row.who:7}"
    if row.seconds is None:
        return f"{begin} {row.reason}"
    share, used = mfu(row, peak), row.peak_bytes
    return (
        f"{begin} {1000 * row.seconds:9.2f} {row.tokens / row.seconds:10.0f} "
        f"{row.flops / row.seconds / 1e12:8.2f} {'unknown' if share is None else f'{share:7.1%}'} "
        f"{'not reported' if used is None else f'{used / GIB:8.2f} GiB':>12}"
    )


def mfu(row: Measured, peak: float | None = None) -> float | None:
    """Returns the model FLOPs utilization, at most 1; None if the device's peak is unknown."""
    peak = peak or peak_tflops(row.device)
    if peak is None or row.seconds is None:
        return None
    return row.flops / row.seconds / (peak * 1e12)


def peak_tflops(device: str) -> float | None:
    """Returns the peak TFLOP/s of a device of this name, None if it is not in the table."""
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"(^|\W){re.escape(name)}(\W|$)", device):
            return peak
    return None


def seconds_a_step(step: Callable[[], Any], wait: Callable[[Any], Any], rounds: int) -> float:
    """Returns the median over rounds of a step's mean time.

    Two steps for compilation come first. A round is as many steps as take a second, at least three;
    it waits for the device only at its end, as training does.
    """
    for _ in range(2):
        wait(step())
    begin = time.perf_counter()
    wait(step())
    steps = max(3, round(1 / (time.perf_counter() - begin)))
    means = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            last = step()
        wait(last)
        means.append((time.perf_counter() - begin) / steps)
    return statistics.median(means)


def peak_bytes() -> int | None:
    """Returns JAX's peak memory on its first device."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def torch_device(arguments: argparse.Namespace, *packages: str) -> str:
    """Returns the device for PyTorch, "cuda" or "cpu".

    Raises:
        UserError: A package is not installed, or there is no GPU and --peer is "auto".
    """
    for name in ("torch", "transformers", *packages):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed")
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as JAX by default
    if torch.cuda.is_available():
        return "cuda"
    if arguments.peer == "auto":
        raise UserError("PyTorch sees no GPU; with --peer=yes it is measured on the CPU")
    return "cpu"


def torch_wait(_: Any) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_measured(method: str, seconds: float, tokens: int, device: str) -> Measured:
    """Returns the peer's row."""
    import torch

    if device == "cpu":
        return Measured(method, "theirs", seconds, tokens, device=device)
    used, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    return Measured(method, "theirs", seconds, tokens, peak_bytes=used, device=name)


def their_model(config: Any, device: str) -> Any:
    """Returns Hugging Face's model with these sizes and random weights in float32."""
    import torch
    import transformers

    # Imported here, as measuring ours does not need it.
    from robust_ft.checkpoints_io import families

    family = families.get("t5" if isinstance(config, T5Config) else "gpt2")
    settings = family.config_to_hf(config)
    kind = getattr(transformers, settings["architectures"][0])
    transformers.utils.logging.set_verbosity_error()
    with torch.device(device):
        return kind(kind.config_class.from_dict(settings))
