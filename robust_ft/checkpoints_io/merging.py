"""LoRA and (IA)³ merged into the weights of their base."""

import dataclasses
import re

import numpy as np

from robust_ft.checkpoints_io import adapters
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.peft import IA3, Lora, Peft


def split(adapter: Adapter) -> tuple[Adapter, tuple[Peft, ...]]:
    """Returns what can be merged into a base, and the methods that cannot.

    Those read vectors beside the input, or add layers: no weights can say it.
    """
    rest = tuple(each for each in adapter.methods if not isinstance(each, Lora | IA3))
    left_out = adapter.only(*rest).tensors.keys()
    methods = tuple(each for each in adapter.methods if each not in rest)
    tensors = {path: t for path, t in adapter.tensors.items() if path not in left_out}
    return dataclasses.replace(adapter, methods=methods, tensors=tensors), rest


def merged(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """Returns the base with an adapter merged into its weights, each computed when it is read.

    Raises:
        UserError: It belongs to another base, or has a method that is not an update of weights.
    """
    adapters.check(adapter, base)
    for method in adapter.methods:
        if not isinstance(method, Lora | IA3):
            raise UserError(
                f"'{adapter.source}' holds a {type(method).__name__}, which cannot be merged into "
                "a model's weights; write it with --to=peft or --to=robust_ft."
            )
    tensors = dict(base.tensors) | {path: adapter.tensors[path] for path in adapter.changed}
    # In the order of the dense layer's hooks: each method updates or rescales the outputs in turn;
    # (IA)³ on inputs rescales x for all methods, so those factors multiply the final kernel.
    inputs: list[tuple[str, Tensor]] = []
    for method in adapter.methods:
        owned = {path: tensor for path, tensor in adapter.tensors.items() if method.owns(path)}
        if isinstance(method, Lora):
            for path, a in owned.items():
                if path.endswith(ending := f"/{method.name}/a"):
                    layer = path.removesuffix(ending)
                    kernel, b = tensors[f"{layer}/kernel"], owned[f"{layer}/{method.name}/b"]
                    tensors[f"{layer}/kernel"] = _updated(method, kernel, a, b)
        elif isinstance(method, IA3):
            for path, vector in owned.items():
                layer = path.removesuffix(f"/{method.name}")
                if re.fullmatch(method.inputs, layer):
                    inputs.append((f"{layer}/kernel", vector))
                    continue
                for leaf in (f"{layer}/kernel", f"{layer}/bias"):
                    if leaf in tensors:
                        tensors[leaf] = _rescaled(tensors[leaf], vector, -1)
    for path, vector in inputs:
        tensors[path] = _rescaled(tensors[path], vector, 0)
    return dataclasses.replace(base, source=adapter.source, tensors=tensors)


def _updated(method: Lora, kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def read() -> np.ndarray:
        merged_kernel: np.ndarray = method.merged_kernel(kernel.load(), a.load(), b.load())
        return merged_kernel

    return dataclasses.replace(kernel, read=read)


def _rescaled(leaf: Tensor, vector: Tensor, axis: int) -> Tensor:
    """Returns a kernel [inputs, outputs] or a bias [outputs] with `axis` multiplied by a vector."""

    def read() -> np.ndarray:
        factors = vector.load().astype(np.float32)
        # [inputs, outputs] * [inputs, 1] or * [outputs]
        product = leaf.load().astype(np.float32) * (factors[:, None] if axis == 0 else factors)
        rescaled: np.ndarray = product.astype(leaf.dtype)
        return rescaled

    return dataclasses.replace(leaf, read=read)
