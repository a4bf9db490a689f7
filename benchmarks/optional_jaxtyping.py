"""Lets robust_ft be imported where jaxtyping, which annotates shapes, is not installed."""

import importlib.util
import sys
import types
from typing import Any


class _Anything:
    """Stands for Float, Int, ... and, like them, takes an array type and a shape."""

    def __class_getitem__(cls, _: Any) -> Any:
        return Any


if importlib.util.find_spec("jaxtyping") is None:
    _module: Any = types.ModuleType("jaxtyping")
    _module.__getattr__ = lambda name: _Anything
    sys.modules["jaxtyping"] = _module
