"""Decoding on a GPU: ours and Hugging Face's `generate`, for T5 and GPT-2.

    python benchmarks/gpu_decode.py --model=t5-base --method greedy beam4
    python benchmarks/gpu_decode.py --model=gpt2 --batch=32 --input_length=256 --json=gpt2.json

Random weights in --dtype and random inputs without padding; every sequence gets all --target_length
new tokens, as none of them is the end-of-sequence token. A step is prefill and all decode steps of
one batch; its tokens are the new ones. Theirs is `generate` with its defaults, by default measured
only where PyTorch sees a GPU. Each measurement has its own process; figures are medians over
rounds. MFU is the share of the device's peak FLOP/s that goes into matrix products, whose FLOPs are
counted in our traced program, for theirs too.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np
from common import START, Measured

from robust_ft.decoding import Decoder
from robust_ft.models.model import Model
from robust_ft.predictor import decode
from robust_ft.preflight import flops

BEAMS = {"greedy": 1, "beam4": 4}
# An id that no token has: nothing is padding, and no sequence ends.
NONE = 2**31 - 1


def inputs_of(arguments: argparse.Namespace) -> np.ndarray:
    vocab = common.MODELS[arguments.model].vocab_size
    shape = arguments.batch, arguments.input_length
    return np.random.default_rng(0).integers(3, vocab - 128, shape)


def ours(arguments: argparse.Namespace, method: str) -> Measured:
    config = common.config_of(arguments, param_dtype=arguments.dtype)
    model = Model(config, pad_id=NONE, eos_id=NONE, start_id=START)
    model.check_lengths(arguments.input_length, arguments.target_length)
    decoder = Decoder(
        max_decode_len=arguments.target_length,
        beam_size=BEAMS[method],
        alpha=1.0,
        length_penalty="hf",
    )
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {"encoder_input_tokens": jax.device_put(inputs_of(arguments).astype(np.int32))}

    def step() -> Any:
        return decode(model, decoder, params, batch, None)

    seconds = common.seconds_a_step(step, jax.block_until_ready, arguments.rounds)
    peak = common.peak_bytes()
    # FLOPs are counted with attention in plain XLA: custom kernels would count as nothing.
    counted = Model(
        common.config_of(arguments, param_dtype=arguments.dtype, attention="xla"),
        pad_id=NONE,
        eos_id=NONE,
        start_id=START,
    )
    traced = decode.trace(counted, decoder, params, batch, None)
    return Measured(
        method,
        "ours",
        seconds,
        arguments.batch * arguments.target_length,
        flops.count(traced, trips=arguments.target_length),
        peak,
        jax.local_devices()[0].device_kind,
    )


def theirs(arguments: argparse.Namespace, method: str) -> Measured:
    device = common.torch_device(arguments)
    import torch

    model = common.their_model(common.config_of(arguments), device)
    model = model.to(getattr(torch, arguments.dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = START
    inputs = torch.from_numpy(inputs_of(arguments)).to(device)

    def step() -> Any:
        with torch.inference_mode():
            return model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=arguments.target_length,
                num_beams=BEAMS[method],
                do_sample=False,
            )

    # GPT-2's outputs begin with the inputs, T5's with the start token.
    skipped = arguments.input_length if arguments.model.startswith("gpt2") else 1
    new_tokens = step().shape[1] - skipped
    assert new_tokens == arguments.target_length, new_tokens
    seconds = common.seconds_a_step(step, common.torch_wait, arguments.rounds)
    return common.torch_measured(method, seconds, arguments.batch * arguments.target_length, device)


def main(argv: Sequence[str]) -> None:
    parser = common.parser(__doc__ or "", BEAMS)
    common.run(parser, {"ours": ours, "theirs": theirs}, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
