"""Tokens that a model has and its checkpoint lacks, such as padding and a separator for GPT-2.

Their embeddings are the mean of the checkpoint's. A new token then gets about the logit of an
average token, so the probabilities of the others hardly change. With small random embeddings, the
other usual choice, its logit is near 0, which can outweigh all others where a model's logits are
far below 0.
"""

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np

from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.models.model import Model
from robust_ft.trainable import flatten


def extended(model: Model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Returns {parameter path: array} with embeddings for all tokens of the model.

    Arrays that do not fit the model in another way are returned as they are.
    """
    wanted = _too_small(model, {path: array.shape for path, array in arrays.items()}, source)
    return {
        path: _with_means(array, *wanted[path]) if path in wanted else array
        for path, array in arrays.items()
    }


def extended_tensors(model: Model, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Does the same to tensors that are read later."""
    wanted = _too_small(model, {path: tensor.shape for path, tensor in tensors.items()}, source)
    return {
        path: _extended(tensor, *wanted[path]) if path in wanted else tensor
        for path, tensor in tensors.items()
    }


def _too_small(
    model: Model, loaded: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, tuple[int, int]]:
    """Returns {path: (axis of the vocabulary, the model's size)} of what lacks tokens."""
    wanted = {}
    shapes = flatten(model.shapes())
    for path, axes in flatten(model.logical_axes()).items():
        if "vocab" not in axes or len(loaded.get(path, ())) != len(axes):
            continue
        axis = axes.index("vocab")
        size, present = shapes[path].shape[axis], loaded[path][axis]
        if 0 < present < size:
            wanted[path] = (axis, size)
            logging.warning(
                "%s in '%s' has %d of the model's %d tokens; the other %d start as their mean.",
                path,
                source,
                present,
                size,
                size - present,
            )
    return wanted


def _extended(tensor: Tensor, axis: int, size: int) -> Tensor:
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    return dataclasses.replace(
        tensor, shape=shape, read=lambda: _with_means(tensor.read(), axis, size)
    )


def _with_means(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    # Summed in float32: float16 and bfloat16 would lose most of 50,000 terms.
    mean = np.mean(array, axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, size - array.shape[axis], axis)], axis)
