"""Tensors that are read when they are needed, and the checkpoint that they make up."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ft.models.config import ModelConfig

# Bytes copied at once: enough to keep a disk busy, little against a checkpoint.
BLOCK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint; nothing of it is in memory until it is read.

    Attributes:
        shape: Its shape.
        dtype: The dtype that `blocks` and `load` return; `read` may return another, so that a cast
            costs no copy of the whole.
        read: Reads all of it; the result may be a view, such as a transposed array.
        where: The file and the name in it, for errors.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    where: str

    @classmethod
    def of(cls, array: np.ndarray, where: str) -> "Tensor":
        """Wraps an array that is in memory."""
        return cls(array.shape, array.dtype, lambda: array, where)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> "Tensor":
        return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().T)

    def cast(self, dtype: str | np.dtype | None) -> "Tensor":
        """Returns the tensor as `dtype` if it holds floats; unchanged otherwise, or for None."""
        if dtype is None or not jnp.issubdtype(self.dtype, np.floating):
            return self
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields contiguous blocks of rows, so that a cast or a copy needs memory for one block."""
        array = self.read()
        if array.shape != self.shape:
            raise ValueError(f"{self.where} is {array.shape}, not {self.shape}.")
        if array.ndim == 0:
            array = array.reshape(1)
        # What is cast takes the wider of both types.
        row_bytes = max(1, math.prod(array.shape[1:]) * max(array.itemsize, self.dtype.itemsize))
        rows = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, array.shape[0], rows):
            yield np.ascontiguousarray(array[start : start + rows], dtype=self.dtype)

    def load(self) -> np.ndarray:
        """Returns all of it as a contiguous array."""
        return np.asarray(self.read(), dtype=self.dtype, order="C")

    def equals(self, other: "Tensor") -> bool:
        """Returns whether another tensor has the same shape, dtype and bytes."""
        return self.shape == other.shape and self.digest() == other.digest()

    def digest(self) -> str:
        """Returns a hash of its bytes."""
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        for block in self.blocks():
            digest.update(block.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk in any format, under our parameter paths.

    Attributes:
        source: What to call it in errors.
        family: "t5", "bart", ...; see `families`.
        config: The family's config dataclass.
        tensors: {parameter path: tensor}, exactly the model's parameters.
        token_ids: "pad", "eos", "start" and, if there are any, "separator" and "stop" (a list of
            further ids that end decoding), as far as the checkpoint knows them.
        vocabulary: {"kind": class name in `robust_ft.vocabulary`, and its fields}, None if there
            is none. "path" is a file's name among `files`.
        files: Files beside the weights that are copied into outputs, such as the vocabulary's.
        hugging_face: What else is needed to write the same Hugging Face directory again: "config"
            (its config.json) and `names.Resolved.notes`. Empty for other formats.
    """

    source: str
    family: str
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocabulary: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = ()
    hugging_face: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def cast(self, dtype: str | None) -> "Checkpoint":
        """Returns the checkpoint with floats of this dtype; unchanged for None."""
        if dtype is None:
            return self
        tensors = {path: tensor.cast(dtype) for path, tensor in self.tensors.items()}
        # float16 is a type to store weights in; models are not trained in it.
        param_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
        config = dataclasses.replace(self.config, param_dtype=param_dtype)
        notes = dict(self.hugging_face)
        if "config" in notes:
            key = "torch_dtype" if "torch_dtype" in notes["config"] else "dtype"
            notes["config"] = dict(notes["config"]) | {key: dtype}
        return dataclasses.replace(self, tensors=tensors, config=config, hugging_face=notes)

    def load(self) -> dict[str, np.ndarray]:
        """Reads all tensors into memory."""
        return {path: tensor.load() for path, tensor in self.tensors.items()}
