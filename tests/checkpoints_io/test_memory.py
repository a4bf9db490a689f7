"""Conversions stream: peak memory is the largest tensor and little more."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.checkpoints_io import hf
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config
from robust_ft.trainable import flatten

# mT5's vocabulary makes two tensors that are a third of the model each: the hardest case.
SIZES = {
    "vocab_size": 250112,
    "emb_dim": 1024,
    "num_heads": 16,
    "mlp_dim": 2816,
    "num_encoder_layers": 10,
    "num_decoder_layers": 10,
    "param_dtype": "bfloat16",
}
PROGRAM = """
import json, sys, time
from robust_ft.checkpoints_io import hf, native, outputs, safetensors_files, sources, t5x
from robust_ft.convert import convert
from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config

def memory(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines[field].split()[0]) * 1024

Model(T5Config(num_encoder_layers=1, num_decoder_layers=1)).shapes()  # starts JAX
source, output, to = sys.argv[1:]
open("/proc/self/clear_refs", "w").write("5")  # sets the peak to what is in use now
baseline, begin = memory("VmRSS"), time.time()
convert(source, output, output_format=to)
print(json.dumps({"peak": memory("VmHWM") - baseline, "seconds": time.time() - begin}))
"""


def random_tensor(shape, seed):
    """A tensor of random bytes that are drawn anew whenever it is read."""

    def read():
        words = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
        return words.view(jnp.bfloat16)

    return Tensor(shape, jnp.dtype("bfloat16"), read, str(seed))


@pytest.mark.slow
def test_peak_memory_of_800_million_parameters(tmp_path, record_property):
    config = T5Config(**SIZES)
    tensors = {
        path: random_tensor(leaf.shape, seed)
        for seed, (path, leaf) in enumerate(flatten(Model(config).shapes()).items())
    }
    checkpoint = Checkpoint("random", "t5", config, tensors)
    assert 780e6 < checkpoint.nbytes / 2 < 830e6
    largest = max(tensor.nbytes for tensor in tensors.values())
    allowed = largest + 0.2 * checkpoint.nbytes
    (tmp_path / "0").mkdir()
    hf.write(checkpoint, tmp_path / "0", shard_bytes=600 * 10**6)
    before = digests(tmp_path / "0")
    try:
        for i, to in enumerate(["robust_ft", "t5x", "hf"]):
            paths = [str(tmp_path / str(i)), str(tmp_path / str(i + 1))]
            output = subprocess.run(
                [sys.executable, "-c", PROGRAM, *paths, to],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            measured = json.loads(output.splitlines()[-1])
            record_property(f"peak above baseline, to {to}", measured["peak"])
            print(f"to {to}: {measured}, largest tensor {largest}, allowed {allowed:.0f}")
            assert measured["peak"] <= allowed
            shutil.rmtree(paths[0])
        assert digests(tmp_path / "3") == before
    finally:
        for i in range(4):
            shutil.rmtree(tmp_path / str(i), ignore_errors=True)


def digests(folder):
    return {name: tensor.digest() for name, tensor in hf.read_weights(folder).items()}
