"""What all families read from a Hugging Face `config.json` in the same way."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError

PAD, EOS, BOS = "pad_token_id", "eos_token_id", "bos_token_id"
DECODER_START = "decoder_start_token_id"


def ids(settings: Mapping[str, Any], key: str, file: str = "config.json") -> list[int]:
    """Returns the ids under a key, which holds one or a list; [] if there are none.

    Raises:
        UserError: It holds something else.
    """
    found = settings.get(key)
    listed = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(each) is int for each in listed):
        raise UserError(f"{file} says {key}={found!r}; known are an id, a list of ids and null.")
    return [each for each in listed if each >= 0]  # early Llamas have -1 for none


def token_ids(settings: Mapping[str, Any], pad: int, eos: int, start: int) -> dict[str, int]:
    """Returns "pad", "eos" and "start" of an encoder-decoder, by config.json or these defaults."""
    keys = {"pad": (PAD, pad), "eos": (EOS, eos), "start": (DECODER_START, start)}
    return {name: (*ids(settings, key), default)[0] for name, (key, default) in keys.items()}


def decoder_only_ids(settings: Mapping[str, Any], **defaults: int) -> dict[str, int]:
    """Returns the same of a decoder-only model, as far as they are known.

    The end-of-sequence token stands in for a padding token, and for the beginning-of-sequence
    token, which is the "start".

    Args:
        settings: The config.json.
        **defaults: What `transformers` takes for keys that config.json does not have.
    """
    settings = defaults | dict(settings)
    sources = {"pad": (PAD, EOS), "eos": (EOS,), "start": (BOS, EOS)}
    found = {
        name: [i for key in keys for i in ids(settings, key)] for name, keys in sources.items()
    }
    return {name: listed[0] for name, listed in found.items() if listed}


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


def check_tied(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], copies: Iterable[str], family: str
) -> None:
    """Raises a UserError where tensors that are one here are neither tied nor all in the files.

    Args:
        settings: The config.json.
        tensors: The tensors under Hugging Face's names; none if they are not known.
        copies: Names of all tensors that are one in our model.
        family: What to call the model in the error.
    """
    if not tensors or settings.get("tie_word_embeddings", True):
        return
    if lost := [name for name in copies if name not in tensors]:
        raise UserError(
            f"config.json says tie_word_embeddings=false, but the files lack {', '.join(lost)}; "
            f"if this {family} is tied, as all published ones, set it to true."
        )


def param_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the dtype to keep parameters in: "bfloat16" if all floats are saved as such."""
    floats = {t.dtype for t in tensors.values() if jnp.issubdtype(t.dtype, np.floating)}
    return "bfloat16" if floats == {jnp.dtype("bfloat16")} else "float32"
