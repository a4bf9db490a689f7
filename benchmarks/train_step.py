"""CPU-seconds of a training step: ours and Hugging Face's (with PEFT), alternately.

    python benchmarks/train_step.py [--only full lora] [--repeats=7]

A T5 small with random weights, 8 examples of 128 tokens in and 32 out, float32, no dropout. Full
finetuning, prompts of 20 and of 100 vectors, LoRA of rank 8 on queries and values: all with
Adafactor, theirs being the one in transformers. Both start from the same weights; the benchmark
stops unless their first losses and gradient norms agree. Compile time does not count. CPU-seconds
(user and system) are those of all threads, so other processes disturb little; PyTorch gets one
thread, as several would spin while they wait for each other. Each side has its own process, with
the settings that its users have (ours: robust_ft/cpu_settings.py); malloc settings in
GLIBC_TUNABLES apply to both. Prints medians and the median ratio. Needs the extra [parity].
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import peft
import torch
import transformers

import robust_ft
from robust_ft import cpu_settings, trainable
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import Adafactor, Schedule
from robust_ft.train_step import init_state, make_train_step
from robust_ft.vocabulary import ByteVocabulary

BATCH, SOURCE, TARGET = 8, 128, 32
SIZES: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
VOCAB, START = 32128, 0
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "decoder_start_token_id": START}
RATE = 1e-3
T5: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM"}
# A prompt in the encoder only, as ours; by default PEFT adds one in the decoder.
PROMPT = T5 | {"num_transformer_submodules": 1}
METHODS: dict[str, Callable[[], peft.PeftConfig | None]] = {
    "full": lambda: None,
    "prompt 20": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **PROMPT),
    "prompt 100": lambda: peft.PromptTuningConfig(num_virtual_tokens=100, **PROMPT),
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q", "v"], **T5),
}
ENVIRONMENTS = {"theirs": {}, "ours": cpu_settings.missing(os.environ)}

# Takes a step; returns its loss (a mean over targets) and, for True, its gradient norm.
Step = Callable[[bool], list[float]]


def their_model(method: str, folder: Path) -> Any:
    """Returns their model, and saves its base and adapter in a folder."""
    torch.manual_seed(0)
    config = transformers.T5Config(dropout_rate=0.0, **TOKENS, **SIZES)
    model: Any = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder / "base")
    if (peft_config := METHODS[method]()) is not None:
        model = peft.get_peft_model(model, peft_config)
        model.save_pretrained(str(folder / "adapter"))
    return model.train()


def data() -> list[np.ndarray]:
    """Returns inputs and targets."""
    random = np.random.default_rng(0)
    return [
        random.integers(3, VOCAB - 100, (BATCH, length)).astype(np.int32)
        for length in (SOURCE, TARGET)
    ]


def their_step(method: str, folder: Path) -> Step:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = their_model(method, folder)
    inputs, targets = data()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = transformers.Adafactor(parameters, lr=RATE, relative_step=False)
    tokens, labels = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def step(norm: bool) -> list[float]:
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        figures = [float(loss.detach())]
        if norm:
            gradients = [p.grad for p in parameters if p.grad is not None]
            figures.append(float(torch.nn.utils.get_total_norm(gradients)))
        optimizer.step()
        return figures

    return step


def our_step(method: str, folder: Path) -> Step:
    weights = None if METHODS[method]() is None else folder / "adapter"
    predictor = robust_ft.load(folder / "base", weights=weights, vocabulary=ByteVocabulary())
    inputs, targets = data()
    model, params = predictor.model, predictor.params
    owned = (path for path in trainable.flatten(params) if model.peft_owns(path) or not model.peft)
    trained, frozen = trainable.split(params, frozenset(owned))
    optimizer = Adafactor(Schedule(RATE))
    train_step = jax.jit(make_train_step(model, CrossEntropy(), optimizer), donate_argnums=0)
    state = init_state(optimizer, trained)
    shifted = np.pad(targets, ((0, 0), (1, 0)), constant_values=START)[:, :-1]
    batch = predictor.partitioner.put_batch(
        {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": shifted,
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones(targets.shape, np.float32),
        }
    )
    rng = jax.random.key(0)

    def step(norm: bool) -> list[float]:
        nonlocal state
        with predictor.partitioner.activate():
            state, sums = jax.block_until_ready(train_step(state, frozen, None, batch, rng))
        loss = float(sums["loss"] / sums["weight"])
        return [loss, float(sums["grad_norm"])] if norm else [loss]

    return step


def serve(who: str, method: str, folder: Path, requests: Connection) -> None:
    """Takes a step for each request and answers with its CPU-seconds.

    The first answer is the first step's loss and gradient norm.
    """
    step = {"ours": our_step, "theirs": their_step}[who](method, folder)
    requests.send(step(True))
    step(False)  # may still compile or set up something
    while requests.recv():
        begin = time.process_time()
        step(False)
        requests.send(time.process_time() - begin)


def compare(method: str, repeats: int) -> str:
    """Returns a line of the table."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    first = {}
    with tempfile.TemporaryDirectory() as folder:
        for who in ("theirs", "ours"):  # theirs writes the weights that ours reads
            connections[who], requests = context.Pipe()
            arguments = (who, method, Path(folder), requests)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            with mock.patch.dict(os.environ, ENVIRONMENTS[who]):
                processes[-1].start()
            requests.close()
            first[who] = connections[who].recv()
    np.testing.assert_allclose(first["ours"], first["theirs"], rtol=1e-3)
    seconds: dict[str, list[float]] = {who: [] for who in connections}
    for _ in range(repeats):
        for who, connection in connections.items():
            connection.send(True)
            seconds[who].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    for process in processes:
        process.join()
    pairs = zip(seconds["ours"], seconds["theirs"], strict=True)
    ratio = statistics.median(mine / other for mine, other in pairs)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    return f"{method:10} {mine:10.3f} {other:10.3f} {ratio:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print("CPU-seconds a step, medians")
    print(f"{'method':10} {'ours':>10} {'theirs':>10} {'ratio':>10}", flush=True)
    for method in arguments.only:
        print(compare(method, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
