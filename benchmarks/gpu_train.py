"""A training step on a GPU: ours and Hugging Face's, for T5 and GPT-2.

    python benchmarks/gpu_train.py --model=t5-base --method full prompt lora
    python benchmarks/gpu_train.py --model=gpt2 --batch=32 --input_length=384 --json=gpt2.json

Random weights and tokens, no padding, AdamW, float32 parameters (--param_dtype) and activations in
bfloat16 (--dtype). Theirs is transformers' model with PEFT, torch.compile, torch.autocast (without
it where parameters are not float32) and fused AdamW, by default measured only where PyTorch sees a
GPU. Each measurement has its own process. A round is as many steps as fit into a second; figures
are medians over rounds.

Tokens are those of inputs and targets. MFU is the share of the device's peak FLOP/s that goes into
the step's matrix products, whose FLOPs are counted in our traced program without rematerialization,
for theirs too. (Theirs may compute more: GPT-2's logits of inputs, for example.)
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import Measured

from robust_ft import trainable
from robust_ft.models.model import Model
from robust_ft.models.options import DTYPES, REMAT_POLICIES
from robust_ft.models.peft import Lora, Peft, Prompt
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import AdamW, Schedule
from robust_ft.preflight import flops
from robust_ft.train_step import init_state, make_train_step
from robust_ft.types import Batch

RATE = 1e-4
METHODS = ("full", "prompt", "lora")


def parser() -> argparse.ArgumentParser:
    flags = common.parser(__doc__ or "", METHODS)
    flags.add_argument("--param_dtype", choices=DTYPES, default="float32")
    flags.add_argument("--remat", choices=REMAT_POLICIES, default="none", help="ours")
    flags.add_argument("--dropout", type=float, default=0.0)
    flags.add_argument("--prompt_length", type=int, default=100)
    flags.add_argument("--lora_rank", type=int, default=8)
    flags.add_argument("--no_compile", action="store_true", help="theirs without torch.compile")
    return flags


def config_of(arguments: argparse.Namespace, **changes: Any) -> Any:
    rates: dict[str, Any] = {"dropout_rate": arguments.dropout}
    if arguments.model.startswith("gpt2"):
        rates["attention_dropout_rate"] = arguments.dropout
    settings = {"param_dtype": arguments.param_dtype, "remat": arguments.remat}
    return common.config_of(arguments, **(rates | settings | changes))


def our_model(arguments: argparse.Namespace, method: str, **changes: Any) -> Model:
    methods: dict[str, tuple[Peft, ...]] = {
        "full": (),
        "prompt": (Prompt(length=arguments.prompt_length),),
        "lora": (Lora(rank=arguments.lora_rank, alpha=arguments.lora_rank),),
    }
    return Model(config_of(arguments, **changes), methods[method])


def split(model: Model, params: Any) -> tuple[Any, Any]:
    """Returns the trainable and the frozen parameters."""
    paths = trainable.flatten(params)
    return trainable.split(
        params, frozenset(p for p in paths if model.peft_owns(p) or not model.peft)
    )


def tokens_of(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets, none of them a special token."""
    random, vocab = np.random.default_rng(0), common.MODELS[arguments.model].vocab_size
    lengths = arguments.input_length, arguments.target_length
    inputs, targets = (random.integers(3, vocab - 128, (arguments.batch, n)) for n in lengths)
    return inputs, targets


def our_batch(arguments: argparse.Namespace) -> Batch:
    inputs, targets = (jnp.asarray(each, jnp.int32) for each in tokens_of(arguments))
    shifted = jnp.pad(targets, ((0, 0), (1, 0)), constant_values=common.START)[:, :-1]
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": jnp.ones(targets.shape, jnp.float32),
    }


def step_flops(arguments: argparse.Namespace, method: str, batch: Batch) -> int:
    """Returns the FLOPs of a step's matrix products.

    They are counted for one example, whose loss is not chunked: a chunked one computes products
    again.
    """
    model = our_model(arguments, method, attention="xla", remat="none")
    trained, frozen = split(model, model.shapes())
    optimizer = AdamW(Schedule(RATE))
    state = jax.eval_shape(lambda: init_state(optimizer, trained_like(trained)))
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    step = jax.jit(make_train_step(model, CrossEntropy(), optimizer))
    traced = step.trace(state, frozen, None, row, jax.random.key(0))
    return arguments.batch * flops.count(traced)


def trained_like(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def ours(arguments: argparse.Namespace, method: str) -> Measured:
    model = our_model(arguments, method)
    model.check_lengths(arguments.input_length, arguments.target_length)
    optimizer = AdamW(Schedule(RATE))
    trained, frozen = split(model, jax.jit(model.init)(jax.random.key(0)))
    state = jax.jit(lambda params: init_state(optimizer, params), donate_argnums=0)(trained)
    train_step = jax.jit(make_train_step(model, CrossEntropy(), optimizer), donate_argnums=0)
    batch, rng = our_batch(arguments), jax.random.key(1)

    def step() -> Any:
        nonlocal state
        state, sums = train_step(state, frozen, None, batch, rng)
        return sums

    seconds = common.seconds_a_step(step, jax.block_until_ready, arguments.rounds)
    return Measured(
        method,
        "ours",
        seconds,
        arguments.batch * (arguments.input_length + arguments.target_length),
        step_flops(arguments, method, batch),
        common.peak_bytes(),
        jax.local_devices()[0].device_kind,
    )


def their_peft(arguments: argparse.Namespace, method: str, model: Any) -> Any:
    if method == "full":
        return model
    import peft

    t5 = arguments.model.startswith("t5")
    task = {"task_type": "SEQ_2_SEQ_LM" if t5 else "CAUSAL_LM"}
    settings: Any
    if method == "prompt":
        # Before the encoder's input only, as ours.
        settings = peft.PromptTuningConfig(
            num_virtual_tokens=arguments.prompt_length, num_transformer_submodules=1, **task
        )
    else:
        rank = {"r": arguments.lora_rank, "lora_alpha": arguments.lora_rank}
        settings = peft.LoraConfig(
            target_modules=["q", "v"] if t5 else ["c_attn"], fan_in_fan_out=not t5, **rank, **task
        )
    return peft.get_peft_model(model, settings)


def their_batch(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    import torch

    inputs, targets = (torch.from_numpy(each).to(device) for each in tokens_of(arguments))
    if arguments.model.startswith("t5"):
        mask = torch.ones_like(inputs)
        return {"input_ids": inputs, "attention_mask": mask, "labels": targets}
    # The target's first token separates it from the input, as ours.
    start = torch.full_like(targets[:, :1], common.START)
    tokens = torch.cat([inputs, start, targets], 1)[:, :-1]
    ignored = torch.full_like(inputs, -100)
    # transformers shifts the labels itself: each is at its own token's position.
    labels = torch.cat([ignored, torch.full_like(start, -100), targets[:, :-1]], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def theirs(arguments: argparse.Namespace, method: str) -> Measured:
    device = common.torch_device(arguments, *(() if method == "full" else ("peft",)))
    import torch

    model = common.their_model(config_of(arguments), device)
    model = model.to(getattr(torch, arguments.param_dtype))
    model = their_peft(arguments, method, model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=device == "cuda")
    batch = their_batch(arguments, device)
    compiled: Any = model if arguments.no_compile else torch.compile(model)
    cast: Any = contextlib.nullcontext()
    if arguments.dtype != arguments.param_dtype:
        cast = torch.autocast(device, getattr(torch, arguments.dtype))

    def step() -> None:
        optimizer.zero_grad()
        with cast:
            loss = compiled(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()

    seconds = common.seconds_a_step(step, common.torch_wait, arguments.rounds)
    tokens = arguments.batch * (arguments.input_length + arguments.target_length)
    return common.torch_measured(method, seconds, tokens, device)


def main(argv: Sequence[str]) -> None:
    common.run(parser(), {"ours": ours, "theirs": theirs}, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
