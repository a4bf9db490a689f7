"""Rotary positions in a `config.json`, as version 5 of `transformers` reads them."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from robust_ft.errors import UserError
from robust_ft.models.llama import LlamaConfig

# {rope type: {name in config.json: field of LlamaConfig}}
_REQUIRED = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
    },
}
_OPTIONAL = {
    "yarn": {
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "truncate": "rope_truncate",
        "attention_factor": "rope_attention_factor",
    }
}
_REASONS = {
    "dynamic": "its frequencies depend on the length of each sequence; without it, up to "
    "max_position_embeddings tokens are the same",
    "longrope": "its frequencies depend on the length of each sequence",
}
_THETA, _LENGTH = "rope_theta", "original_max_position_embeddings"


def from_hf(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a LlamaConfig that say how positions are rotated.

    Version 5 writes all of it into `rope_parameters`, earlier ones into `rope_scaling`, with
    `rope_theta` beside it. All are read, and where several stand, version 5's order holds:
    `rope_scaling` replaces `rope_parameters` as a whole; a `rope_theta` in the one that is used
    wins over the one beside it, an `original_max_position_embeddings` beside it over the one in it.

    Raises:
        UserError: The rope type, or a part of it, is not known.
    """
    rope = _used(settings)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _REQUIRED:
        reason = f" ({_REASONS[kind]})" if kind in _REASONS else ""
        raise UserError(
            f"config.json says rope_type={kind!r}, which is not known{reason}; known are "
            f"{', '.join(map(repr, _REQUIRED))}."
        )
    for where in (rope, settings):
        if where.get("partial_rotary_factor") not in (None, 1):
            raise UserError(
                f"config.json says partial_rotary_factor={where['partial_rotary_factor']}; Llama, "
                "Mistral and Qwen rotate whole heads, which is 1."
            )
    rope = {_THETA: settings.get(_THETA, LlamaConfig.rope_theta)} | rope
    if _LENGTH in settings:
        rope[_LENGTH] = settings[_LENGTH]
    rope.setdefault(_LENGTH, settings["max_position_embeddings"])
    names = _REQUIRED[kind]
    if lost := [name for name in names if name not in rope]:
        raise UserError(f"config.json says rope type '{kind}' but not its {', '.join(lost)}.")
    if kind == "yarn":
        rope = _resolved(rope, settings["max_position_embeddings"])
    names = names | {name: ours for name, ours in _OPTIONAL.get(kind, {}).items() if name in rope}
    fields = {ours: _number(rope, name) for name, ours in names.items()}
    scaling = {"rope_scaling": "none" if kind == "default" else kind}
    return scaling | {_THETA: float(_number(rope, _THETA))} | fields


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Returns the entries of a config.json, for every version of `transformers`."""
    kind = "default" if config.rope_scaling == "none" else config.rope_scaling
    names = _REQUIRED[kind] | _OPTIONAL.get(kind, {})
    rope = {"rope_type": kind} | {name: getattr(config, ours) for name, ours in names.items()}
    rope = {name: value for name, value in rope.items() if value is not None}
    return {
        _THETA: config.rope_theta,
        "rope_scaling": None if kind == "default" else {_THETA: config.rope_theta} | rope,
        "rope_parameters": {_THETA: config.rope_theta} | rope,
    }


def _used(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rope_scaling or the rope_parameters, whichever counts; {} for neither."""
    scaling, parameters = settings.get("rope_scaling"), settings.get("rope_parameters")
    rope = scaling or parameters or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"config.json says rotary positions are {rope}; known are those with the same "
            "settings, of which rope_type is one, in all layers."
        )
    ignored = parameters.get(_THETA) if scaling and isinstance(parameters, dict) else None
    theta = rope.get(_THETA, settings.get(_THETA, LlamaConfig.rope_theta))
    if ignored not in (None, theta):
        logging.warning(
            "config.json has rope_scaling beside rope_parameters: as in transformers 5 it replaces "
            "all of it, so rope_theta is %s, not %s; say rope_theta in rope_scaling, too.",
            theta,
            ignored,
        )
    return dict(rope)


def _resolved(rope: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Returns YaRN's parameters with those that follow from others, without empty ones."""
    # A null or a 0 is the default, as in `transformers`.
    found = {
        name: value
        for name, value in rope.items()
        if value is not None and (value or name not in ("beta_fast", "beta_slow"))
    }
    if "truncate" in rope:
        found["truncate"] = bool(rope["truncate"])
    if "factor" not in found:
        found["factor"] = max_length / _number(found, _LENGTH)
    scales = ("mscale", "mscale_all_dim")
    if "attention_factor" not in found and all(found.get(name) for name in scales):
        log = math.log(_number(found, "factor"))
        one, all_dim = (0.1 * _number(found, name) * log + 1 for name in scales)
        found["attention_factor"] = one / all_dim
    return found


def _number(rope: Mapping[str, Any], name: str) -> Any:
    value = rope.get(name)
    if not isinstance(value, int | float):
        raise UserError(f"config.json says {name}={value!r} of rotary positions, not a number.")
    return value
