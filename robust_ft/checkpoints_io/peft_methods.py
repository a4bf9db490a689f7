"""LoRA, prompt tuning and prefix tuning translated to and from PEFT's files.

The reference is PEFT's source (0.21): `LoraLayer`, `PeftModelForSeq2SeqLM` and `get_prompt`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ft.checkpoints_io import families
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.names import expand
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError, nearest
from robust_ft.models.peft import Lora, Peft, Prefix, Prompt
from robust_ft.models.peft.prefix import SITES

PEFT_TYPES = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING")
PROMPT = "prompt_embeddings"
# By task type, the stack that reads a prompt.
_STACKS = {"SEQ_2_SEQ_LM": "encoder", "CAUSAL_LM": "decoder"}
_LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields that, if they are set, make the adapter something other than a plain LoRA.
_LORA_VARIANTS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Initializations (init_lora_weights) that also change the base's weights.
_LORA_BASES = r"pissa.*|olora|loftq|corda"


def from_peft(source: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Translates a PEFT adapter.

    Args:
        source: What to call it in errors.
        config: Its adapter_config.json.
        tensors: {PEFT's name: tensor}.

    Raises:
        UserError: Its method or variant is unknown, or tensors and config do not match.
    """
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise UserError(
            f"'{source}' says peft_type={kind!r}, which is not known; known are "
            f"{', '.join(PEFT_TYPES)}." + nearest(str(kind), PEFT_TYPES)
        )
    translate = dict(zip(PEFT_TYPES, (_from_lora, _from_prefix, _from_prompt), strict=True))[kind]
    try:
        method, ours = translate(source, config, tensors)
    except KeyError as error:
        raise UserError(f"The {kind} config of '{source}' lacks {error}.") from None
    return Adapter(source, (method,), ours, peft_config=dict(config))


def to_peft(adapter: Adapter, base: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns an adapter_config.json and {PEFT's name: tensor}.

    Raises:
        UserError: PEFT cannot express the adapter.
    """
    translate: Any = {Lora: _to_lora, Prefix: _to_prefix, Prompt: _to_prompt}
    if len(adapter.methods) != 1 or adapter.changed or type(adapter.methods[0]) not in translate:
        known = ", ".join(kind.__name__ for kind in translate)
        raise UserError(
            f"'{adapter.source}' holds {adapter.kinds}, but a directory for PEFT holds exactly one "
            f"method of {known}; write it with --to=robust_ft."
        )
    (method,) = adapter.methods
    config, tensors = translate[type(method)](adapter, method, base)
    common = {
        "task_type": "SEQ_2_SEQ_LM" if _is_encoder_decoder(base) else "CAUSAL_LM",
        "base_model_name_or_path": base.source,
        "inference_mode": True,
    }
    return common | config, tensors


def _is_encoder_decoder(base: Checkpoint) -> bool:
    return any(path.startswith("encoder/") for path in base.tensors)


def recognized(source: str, tensors: Mapping[str, Tensor]) -> tuple[type[Peft], dict[str, Any]]:
    """Returns the method that these parameters belong to, and the settings that they determine.

    Raises:
        UserError: They belong to none, or to several.
    """
    names = {path: path.split("/") for path in tensors}
    # LoRA: <layer>/<name>/a [inputs, rank] and .../b [rank, outputs].
    if names and all(parts[-1] in ("a", "b") and len(parts) > 2 for parts in names.values()):
        name = {parts[-2] for parts in names.values()}
        ranks = {t.shape[-1] for path, t in tensors.items() if path.endswith("/a")}
        layers = sorted({path.rsplit("/", 2)[0] for path in names})
        if len(name) == 1 and len(ranks) == 1:
            return Lora, {"name": name.pop(), "rank": ranks.pop(), "target": pattern(layers)}
    # Soft prompt: <stack>/<name> [length, embed].
    if len(names) == 1:
        path, tensor = next(iter(tensors.items()))
        if re.fullmatch(r"(encoder|decoder)/\w+", path) and len(tensor.shape) == 2:
            return Prompt, {"name": path.split("/")[1], "length": tensor.shape[0]}
    # Prefix: <layer>/<attention>/<name>/key and .../value [length, heads, head_dim].
    if names and all(parts[-1] in ("key", "value") and len(parts) > 2 for parts in names.values()):
        name = {parts[-2] for parts in names.values()}
        lengths = {tensor.shape[0] for tensor in tensors.values()}
        present = {parts[-3] for parts in names.values()}
        if len(name) == 1 and len(lengths) == 1:
            switches = {switch: site in present for switch, site in SITES.items()}
            return Prefix, {"name": name.pop(), "length": lengths.pop(), **switches}
    shown = ", ".join(sorted(tensors)[:5]) + (", ..." if len(tensors) > 5 else "")
    raise UserError(
        f"The {len(tensors)} parameters of '{source}' are not those of one LoRA, prefix or "
        f"soft prompt: {shown}."
    )


def pattern(layers: Iterable[str]) -> str:
    """Returns a short regex that matches exactly these paths.

    Such as "encoder/layers_(0|1)/attention/(query|value)" for four paths.
    """
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    plain = []
    for path in layers:
        match = re.fullmatch(r"(.*?layers_)(\d+)/(.*)", path)
        if match:
            numbers[match[1], match[3]].append(int(match[2]))
        else:
            plain.append(re.escape(path))
    # Endings that occur in the same layers of a stack share one alternative.
    endings: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (start, ending), which in numbers.items():
        endings[start, tuple(sorted(which))].append(ending)
    grouped = [
        f"{start}{_alternatives(which)}/{_alternatives(ends)}"
        for (start, which), ends in endings.items()
    ]
    return "|".join([*grouped, *plain])


def _alternatives(values: Sequence[Any]) -> str:
    return f"({'|'.join(map(str, values))})" if len(values) > 1 else str(values[0])


# --- LoRA


def _from_lora(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Peft, dict[str, Tensor]]:
    for key in _LORA_VARIANTS:
        if config.get(key):
            raise UserError(f"'{source}' is a LoRA with {key}={config[key]!r}: not known here.")
    if config.get("bias", "none") != "none":
        raise UserError(f"'{source}' is a LoRA with trained biases: not known here.")
    if re.fullmatch(_LORA_BASES, str(start := config.get("init_lora_weights", True))):
        raise UserError(f"'{source}' was started with '{start}', which changes the base's weights.")
    matches = {name: _LORA_WEIGHT.fullmatch(name) for name in tensors}
    layers = _dense_layers({match[1] for match in matches.values() if match})
    unplaced = sorted(n for n, match in matches.items() if not (match and match[1] in layers))
    if unplaced or not tensors:
        raise UserError(
            f"'{source}' updates what is no dense layer of any model that is known: "
            f"{', '.join(unplaced) or 'it holds no tensors'}."
        )
    ours, rank = {}, config["r"]
    for name, match in matches.items():
        assert match
        module, half = match[1], match[2]
        other = name.replace(f".lora_{half}.", f".lora_{'AB'.replace(half, '')}.")
        if other not in tensors:
            raise UserError(f"'{source}' lacks the tensor '{other}'.")
        # PEFT's A is [rank, inputs] and its B [outputs, rank]; ours are their transposes.
        tensor = tensors[name].transposed()
        rank_axis = 1 if half == "A" else 0
        if len(tensor.shape) != 2 or tensor.shape[rank_axis] != rank:
            raise UserError(
                f"{tensor.where} has shape {tensors[name].shape}, its config says r={rank}."
            )
        ours[f"{layers[module]}/lora/{half.lower()}"] = tensor
    # Our update is scaled by alpha / rank; rank-stabilized LoRA scales by alpha / sqrt(rank).
    alpha = config["lora_alpha"] * (math.sqrt(rank) if config.get("use_rslora") else 1)
    target = pattern(sorted(set(layers.values())))
    dropout = float(config.get("lora_dropout") or 0)
    return Lora("lora", rank, float(alpha), dropout, target), ours


def _dense_layers(modules: set[str]) -> dict[str, str]:
    """Returns {Hugging Face's module: our dense layer}.

    A PEFT adapter does not name its base's family: it is the one that has most of the modules.
    """
    best: dict[str, str] = {}
    for family in sorted(set(families.MODEL_TYPES.values())):
        layers = {}
        for name in families.get(family).NAMES:
            if name.ours.endswith("/kernel"):
                inverse = dataclasses.replace(name, ours=name.theirs, theirs=name.ours)
                for module in modules:
                    if path := inverse.match(f"{module}.weight"):
                        layers[module] = path.removesuffix("/kernel")
        if len(layers) > len(best):
            best = layers
    return best


def _to_lora(
    adapter: Adapter, method: Lora, base: Checkpoint
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    modules = {
        path.removesuffix("/kernel"): (theirs.removesuffix(".weight"), transpose)
        for path, (theirs, transpose) in expand(
            families.get(base.family).NAMES, base.config
        ).items()
        if path.endswith("/kernel")
    }
    tensors, updated, transposed = {}, set(), False
    for path, tensor in adapter.tensors.items():
        layer, _, half = path.rsplit("/", 2)
        module, transpose = modules[layer]
        updated.add(module)
        transposed |= transpose
        tensors[f"base_model.model.{module}.lora_{half.upper()}.weight"] = tensor.transposed()
    if adapter.peft_config:
        return dict(adapter.peft_config), tensors
    config = {
        "peft_type": "LORA",
        "r": method.rank,
        "lora_alpha": int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
        "lora_dropout": method.dropout_rate,
        "bias": "none",
        "fan_in_fan_out": not transposed,  # PEFT's name for kernels [inputs, outputs]
        "init_lora_weights": True,
        "target_modules": _target_modules(updated, {module for module, _ in modules.values()}),
    }
    return config, tensors


def _target_modules(updated: set[str], all_modules: set[str]) -> list[str]:
    """Returns the modules' last names if PEFT then selects exactly these, else their full names."""
    short = {module.rsplit(".", 1)[-1] for module in updated}
    selected = {module for module in all_modules if module.rsplit(".", 1)[-1] in short}
    return sorted(short if selected == updated else updated)


# --- Prompt tuning


def _from_prompt(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Peft, dict[str, Tensor]]:
    table, length = _virtual_tokens(source, tensors), config["num_virtual_tokens"]
    # For encoder-decoders PEFT appends a second prompt, the decoder's, which it never reads.
    if len(table.shape) != 2 or table.shape[0] not in (length, 2 * length):
        raise UserError(
            f"{table.where} has shape {table.shape}, its config says num_virtual_tokens={length}."
        )
    first = dataclasses.replace(
        table, shape=(length, table.shape[1]), read=lambda: table.read()[:length]
    )
    return Prompt(length=length), {f"{_stack(source, config)}/prompt": first}


def _to_prompt(
    adapter: Adapter, method: Prompt, base: Checkpoint
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    del base
    if method.tasks or method.position != "before":
        raise UserError(
            f"'{adapter.source}' is a prompt that PEFT has no place for: it knows those before the "
            "input that all tasks share."
        )
    (tensor,) = adapter.tensors.values()
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": tensor.shape[0],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "token_dim": tensor.shape[1],
    }
    if adapter.peft_config:
        config = dict(adapter.peft_config) | {"num_transformer_submodules": 1}
    return config, {PROMPT: tensor}


def _virtual_tokens(source: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if tensors.keys() != {PROMPT}:
        names = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"'{source}' should hold one tensor '{PROMPT}'; it holds {names}.")
    return tensors[PROMPT]


def _stack(source: str, config: Mapping[str, Any]) -> str:
    task = config.get("task_type")
    if task not in _STACKS:
        raise UserError(
            f"'{source}' says task_type={task!r}; known are {', '.join(_STACKS)}."
            + nearest(str(task), _STACKS)
        )
    return _STACKS[task]


# --- Prefix tuning
#
# PEFT's table is [length, entries * heads * head_dim]. In decoder-only models entries 2i and 2i + 1
# are layer i's keys and values. For encoder-decoders PEFT concatenates the table with itself and
# takes four entries a layer: keys and values of the decoder's self-attention, and two that are not
# used. With n layers and 2n entries, layer i therefore reads entries 4i and 4i + 1 modulo 2n: if n
# is even, layers i and i + n / 2 share theirs. What we write has twice as many entries, so that no
# layers share any.


def _from_prefix(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Peft, dict[str, Tensor]]:
    table, length = _virtual_tokens(source, tensors), config["num_virtual_tokens"]
    count, heads, width = (
        config[key] for key in ("num_layers", "num_attention_heads", "token_dim")
    )
    if table.shape != (length, 2 * count * width) or width % heads:
        raise UserError(
            f"{table.where} has shape {table.shape}, its config says num_virtual_tokens={length}, "
            f"num_layers={count}, token_dim={width} and num_attention_heads={heads}."
        )
    step = 4 if _stack(source, config) == "encoder" else 2
    if step == 4 and config.get("num_transformer_submodules") == 1:
        raise UserError(f"'{source}' is a prefix of one submodule of two: not known here.")
    shape = (length, 2 * count, heads, width // heads)
    layers = count
    if step == 4 and count % 2 == 0 and config.get("init_weights") != "zero":
        # If all unused entries are zero, `_to_prefix` wrote the table: it has two unused entries a
        # layer, so twice as many entries as PEFT makes.
        unused = table.load().reshape(length, count // 2, 4, -1)[:, :, 2:]
        layers = layers if np.any(unused) else count // 2

    def entry(index: int) -> Tensor:  # [length, heads, head_dim]
        return dataclasses.replace(
            table,
            shape=(length, *shape[2:]),
            read=lambda: table.read().reshape(shape)[:, index],
        )

    ours = {
        f"decoder/layers_{i}/self_attention/prefix/{name}": entry((step * i + j) % (2 * count))
        for i in range(layers)
        for j, name in enumerate(("key", "value"))
    }
    return Prefix(length=length, encoder=False, cross=False, counted=True), ours


def _to_prefix(
    adapter: Adapter, method: Prefix, base: Checkpoint
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    encoder_decoder = _is_encoder_decoder(base)
    if not method.counted or (encoder_decoder and (method.encoder or method.cross)):
        raise UserError(
            f"'{adapter.source}' is a prefix that PEFT has no place for: it knows those with "
            "Prefix.counted=True, in encoder-decoders with encoder=False and cross=False."
        )
    numbers = {int(path.split("/")[1].removeprefix("layers_")) for path in adapter.tensors}
    first = next(iter(adapter.tensors.values()))
    length, heads, head_dim = first.shape
    step = 4 if encoder_decoder else 2
    shape = (length, step * len(numbers), heads, head_dim)

    def load() -> np.ndarray:
        table = np.zeros(shape, first.dtype)
        for i in sorted(numbers):
            for j, name in enumerate(("key", "value")):
                path = f"decoder/layers_{i}/self_attention/{method.name}/{name}"
                table[:, step * i + j] = adapter.tensors[path].load()
        return table.reshape(length, -1)

    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": shape[1] // 2,
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "num_transformer_submodules": 2 if encoder_decoder else 1,
        "prefix_projection": False,
    }
    flat = (length, math.prod(shape[1:]))
    return config, {PROMPT: Tensor(flat, first.dtype, load, first.where)}
