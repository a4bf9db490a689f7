"""What all families read from a Hugging Face `config.json` in the same way."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError

TOKEN_IDS = {"pad": "pad_token_id", "eos": "eos_token_id", "start": "decoder_start_token_id"}


def token_id(settings: Mapping[str, Any], key: str) -> int | None:
    """Returns the id under a key, the first one of a list; None if there is none."""
    ids = settings.get(key)
    if isinstance(ids, list):
        return ids[0] if ids else None
    return ids


def token_ids(settings: Mapping[str, Any], **defaults: int) -> dict[str, int]:
    """Returns "pad", "eos" and "start", as far as config.json or the family's defaults know them.

    Args:
        settings: The config.json.
        **defaults: What the ids are where config.json does not set them.
    """
    ids = {name: token_id(settings, key) for name, key in TOKEN_IDS.items()}
    return defaults | {name: value for name, value in ids.items() if value is not None}


def activation(
    settings: Mapping[str, Any], key: str, default: str, known: Mapping[str, Any]
) -> Any:
    """Returns our activation for the one that config.json names.

    Raises:
        UserError: It is not among the known ones.
    """
    name = settings.get(key, default)
    if name not in known:
        raise UserError(f"config.json says {key}={name!r}; known are {', '.join(known)}.")
    return known[name]


def check_fixed(settings: Mapping[str, Any], fixed: Mapping[str, Any], family: str) -> None:
    """Raises a UserError where config.json sets a field that our model has one value for.

    Args:
        settings: The config.json.
        fixed: The fields and their only values, which are also their defaults.
        family: What to call the model in the error.
    """
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise UserError(
                f"config.json says {name}={settings[name]}; {family} here has {value}, as all "
                "published ones."
            )


def param_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the dtype to keep parameters in: "bfloat16" if all floats are saved as such."""
    floats = {t.dtype for t in tensors.values() if jnp.issubdtype(t.dtype, np.floating)}
    return "bfloat16" if floats == {jnp.dtype("bfloat16")} else "float32"
