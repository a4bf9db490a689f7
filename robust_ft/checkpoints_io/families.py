"""The model families whose checkpoints can be read: one `hf_<family>.py` each."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from robust_ft.checkpoints_io.names import Name, Redundant
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError, nearest
from robust_ft.models.config import ModelConfig

# Hugging Face's model_type -> our family.
MODEL_TYPES = {
    "t5": "t5",
    "mt5": "t5",
    "bart": "bart",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
}
_MODULES = {family: f"robust_ft.checkpoints_io.hf_{family}" for family in MODEL_TYPES.values()}


@runtime_checkable
class Family(Protocol):
    """What a `hf_<family>.py` module defines.

    A module may also define functions that `optional` looks up:
    - `tied(settings) -> {name: the name it is tied to}`, for heads that a file leaves out;
    - `scaling(settings, config) -> {name: value}` of config.json, for heads whose input is scaled.

    Attributes:
        CONFIG: The family's config dataclass.
        NAMES: Our paths and Hugging Face's names, for all configs of the family.
        REDUNDANT: What files may hold besides these.
        TIED_BY_DEFAULT: What a config.json without tie_word_embeddings means.
    """

    CONFIG: type
    NAMES: tuple[Name, ...]
    REDUNDANT: Redundant
    TIED_BY_DEFAULT: bool

    @staticmethod
    def config_from_hf(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
        """Reads a config.json, given as a dict; `tensors` has Hugging Face's names."""

    @staticmethod
    def config_to_hf(config: Any) -> dict[str, Any]:
        """Returns the config.json of a config, with "model_type" and "architectures"."""

    @staticmethod
    def token_ids(settings: Mapping[str, Any]) -> dict[str, int]:
        """Returns "pad", "eos" and "start", as far as a config.json or defaults know them."""


def get(family: str) -> Family:
    """Returns the family's module.

    Raises:
        UserError: There is no such family.
    """
    if family not in _MODULES:
        known = ", ".join(sorted(_MODULES))
        raise UserError(f"'{family}' is no model family; known are {known}.")
    return cast(Family, importlib.import_module(_MODULES[family]))


def name_of(config: ModelConfig) -> str:
    """Returns the family of a config; of a user's own, the name of its class."""
    names = (name for name in _MODULES if get(name).CONFIG is type(config))
    return next(names, type(config).__name__)


def of_model_type(model_type: Any, source: str) -> str:
    """Returns the family of Hugging Face's `model_type`."""
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"'{source}' says model_type={model_type!r}, an architecture that is not known; known "
            f"are {', '.join(MODEL_TYPES)}." + nearest(str(model_type), MODEL_TYPES)
        )
    return MODEL_TYPES[model_type]


def optional(family: str, function: str) -> Callable[..., Any] | None:
    """Returns a function that a family's module may have."""
    return getattr(get(family), function, None)
