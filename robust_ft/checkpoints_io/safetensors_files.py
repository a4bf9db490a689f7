"""Safetensors files, read and written tensor by tensor.

The `safetensors` package can only write tensors that are all in memory, hence this module. Its
layout is kept (wide dtypes first, then by name), so that rewriting a file gives the same bytes.

A file is: the header's length [8 bytes, little-endian], the header (JSON, padded to 8 bytes), and
the tensors' bytes without gaps, in the order of their `data_offsets`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.files import as_path, read_json, write_json

# In the package's order, which is also the order of tensors in a file: the widest dtype first.
TYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
BFLOAT16 = jnp.dtype("bfloat16")
_CODES = {jnp.dtype(name): code for code, name in TYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(TYPES)}
_LONGEST_HEADER = 100_000_000  # the package's own limit
SHARD_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"


def read(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of one file; only its header is read now.

    Raises:
        UserError: It is not a safetensors file, is truncated, or has an unknown dtype.
    """
    file = as_path(file)
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, max(0, size - 8)):
                raise UserError(f"'{file}' is no readable safetensors file: its header is cut off.")
            header = json.loads(stream.read(length))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(
            f"'{file}' is no readable safetensors file: its header is no JSON."
        ) from None
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from None
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(file, name, entry, start, size) for name, entry in header.items()}
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise UserError(f"'{file}' has {size:,} bytes, its header says {end:,}.")
    return tensors


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Returns the tensors of all files that an index (`*.safetensors.index.json`) names.

    Raises:
        UserError: A file is missing or unreadable, or lacks a tensor that it should have.
    """
    where = weight_map(index)
    files = sorted(set(where.values()))
    check_shards(index, where)
    shards = {file: read(index.parent / file) for file in files}
    tensors: dict[str, Tensor] = {}
    for name, file in where.items():
        if name not in shards[file]:
            raise UserError(
                f"'{index.parent / file}' has no tensor '{name}', though '{index.name}' says so."
            )
        tensors[name] = shards[file][name]
    # Tensors that the index leaves out are returned too: the model then reports them as unexpected.
    return {name: t for shard in shards.values() for name, t in shard.items()} | tensors


def weight_map(index: Path) -> dict[str, str]:
    """Returns {tensor: file} of an index file.

    Raises:
        UserError: It is not such an index.
    """
    try:
        mapped = read_json(index)["weight_map"]
        if not isinstance(mapped, dict) or not all(isinstance(f, str) for f in mapped.values()):
            raise TypeError
        return mapped
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"'{index}' is no index of shards: it has no readable 'weight_map'."
        ) from None


def check_shards(index: Path, where: Mapping[str, str]) -> None:
    """Raises a UserError that names the missing shards and the tensors in them."""
    missing = [f for f in sorted(set(where.values())) if not (index.parent / f).is_file()]
    if missing:
        lost = sorted(name for name, file in where.items() if file in missing)
        raise UserError(
            f"'{index.parent}' lacks {len(missing)} of {len(set(where.values()))} shards that "
            f"'{index.name}' names: {', '.join(missing)}.\n"
            f"  Tensors in them: {', '.join(lost)}"
        )


def write(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; memory is needed for one tensor's block at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: (_RANKS[_code(item[1])], item[0]))
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _code(tensor), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for block in tensor.blocks():
                stream.write(block.reshape(-1).view(np.uint8).data)


def write_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in tensors.items():
        if shards[-1] and sizes[-1] + tensor.nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    if len(shards) == 1:
        write(folder / WEIGHTS, shards[0], metadata)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write(folder / file, shard, metadata)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / f"{WEIGHTS}.index.json", index)


def _tensor(file: Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    where = f"'{name}' in '{file}'"
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        dtype = jnp.dtype(TYPES.get(code, "uint8"))
        fits = 0 <= begin <= end and end - begin == math.prod(shape) * dtype.itemsize
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{where} has no readable entry in the file's header.") from None
    if code not in TYPES:
        raise UserError(f"{where} has the type {code}; known are {', '.join(TYPES)}.")
    if not fits:
        raise UserError(f"{where} has {end - begin:,} bytes, which does not fit its shape {shape}.")
    if start + end > size:
        raise UserError(f"'{file}' is truncated: it ends inside or before the tensor '{name}'.")

    def load() -> np.ndarray:
        array = np.empty(shape, dtype)
        with file.open("rb") as stream:
            stream.seek(start + begin)
            if stream.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise UserError(f"'{file}' is truncated inside the tensor '{name}'.")
        return array

    return Tensor(shape, dtype, load, where)


def _code(tensor: Tensor) -> str:
    if tensor.dtype not in _CODES:
        raise UserError(f"{tensor.where} is {tensor.dtype}, which safetensors cannot hold.")
    return _CODES[tensor.dtype]
