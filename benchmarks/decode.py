"""CPU-seconds of decoding: ours and Hugging Face's `generate`, alternately, on the same weights.

    python benchmarks/decode.py

A T5 small with random weights decodes 32 new tokens for a batch of 8, greedily and with 4 beams.
The benchmark stops unless both give the same tokens. Compile time does not count. CPU-seconds are
those of all threads, so other processes disturb little; PyTorch gets one thread, as several would
spin while they wait for each other. Prints medians and the median ratio. Needs the extra [parity].
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

import robust_ft
from robust_ft.vocabulary import ByteVocabulary

BATCH, TOKENS = 8, 32
SIZES: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
VOCAB, END = 32128, 1


def reference() -> Any:
    """Returns a T5 small whose outputs differ for each input and never end."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **SIZES)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 and "bias" not in name:
                value.normal_(0, 1 if "shared" in name else value.shape[1] ** -0.5)
        model.shared.weight[END] = 0
    return model


def cpu_seconds(decode: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Returns the CPU-seconds of one call, and the tokens."""
    begin = time.process_time()
    tokens = decode()
    return time.process_time() - begin, tokens


def compare(model: Any, beams: int, source: int, repeats: int) -> str:
    """Returns a line of the table."""
    tokens = np.random.default_rng(0).integers(3, VOCAB - 100, (BATCH, source)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        predictor = robust_ft.load(folder, vocabulary=ByteVocabulary())

    def ours() -> np.ndarray:
        generated = predictor.generate(
            {"encoder_input_tokens": tokens},
            max_decode_len=TOKENS,
            beam_size=beams,
            alpha=1.0,
            length_penalty="hf",
        )
        return np.asarray(generated.tokens)[:, 0]  # [batch, token] of the best beam

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            generated = model.generate(
                torch.from_numpy(tokens).long(),
                max_new_tokens=TOKENS,
                num_beams=beams,
                do_sample=False,
                length_penalty=1.0,
            )
        return generated[:, 1:].numpy()  # without the start token

    for decode in (ours, theirs, ours):
        decode()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for name, decode in (("theirs", theirs), ("ours", ours)):
            took, outputs = cpu_seconds(decode)
            seconds[name].append(took)
            if name == "theirs":
                expected = outputs
        np.testing.assert_array_equal(outputs, expected)
        assert outputs.shape == (BATCH, TOKENS) and not np.any(outputs == END)
    pairs = zip(seconds["ours"], seconds["theirs"], strict=True)
    ratio = statistics.median(mine / other for mine, other in pairs)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    kind = "greedy" if beams == 1 else f"beam {beams}"
    return f"{kind:8} ours {mine:.3f} theirs {other:.3f} CPU-s, ratio {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=int, default=64, help="tokens of an input")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = reference()
    for beams in arguments.beams:
        print(compare(model, beams, arguments.source, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
