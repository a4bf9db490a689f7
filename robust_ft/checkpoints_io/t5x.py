"""t5x checkpoints: a msgpack index named `checkpoint`, and a zarr directory for each large array.

A leaf of the index is an array (small ones), a map that describes a tensorstore array, or a
"PLACEHOLDER://" string with its name. tensorstore reads and writes them chunk by chunk. Only
parameters are read, no optimizer state. t5x's parameter paths are ours.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts

from robust_ft.checkpoints_io import native
from robust_ft.checkpoints_io.config_json import param_dtype
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.t5 import T5Config
from robust_ft.trainable import unflatten

INDEX = "checkpoint"
VERSION = 3
CHUNK_BYTES = 16 * 2**20
# Keys of the parameters: in t5x's own index, in its Orbax-style one, and in inference states.
_TARGETS = (("optimizer", "target"), ("_optimizer", "target"), ("target",), ("params",))
_PLACEHOLDER = "PLACEHOLDER://"
# Of `flax.serialization`: its msgpack extension types, and the key that marks a chunked array.
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
# One chunk at a time and no cache, so that reading takes the memory of the array and one chunk.
_CONTEXT = ts.Context(
    {
        "cache_pool": {"total_bytes_limit": 0},
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 1},
    }
)


def is_directory(path: Path) -> bool:
    """Returns whether a directory looks like t5x's."""
    return (path / INDEX).is_file()


def read(source: str, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a checkpoint of a T5, whose sizes are inferred from the arrays' shapes.

    Args:
        source: The `checkpoint_<step>` directory.
        overrides: Fields of T5Config that shapes do not determine: `relative_max_distance`, or
            another activation.

    Raises:
        UserError: It is no t5x checkpoint of a T5, or a file is missing or broken.
    """
    tensors = read_weights(Path(source).expanduser())
    config = config_from_shapes(source, tensors, overrides or {})
    native.check(source, config, tensors)
    return Checkpoint(source, "t5", config, tensors, {"pad": 0, "eos": 1, "start": 0})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns {parameter path: tensor}, without the optimizer's state.

    Raises:
        UserError: There is no readable index, it has no parameters, or a file is broken.
    """
    index = _read_index(folder)
    for keys in _TARGETS:
        tree: Any = index
        for key in keys:
            tree = tree.get(key) if isinstance(tree, dict) else None
        if isinstance(tree, dict) and tree:
            leaves = _leaves(tree)
            return {"/".join(path): _tensor(folder, path, leaf) for path, leaf in leaves}
    top = ", ".join(map(str, index))
    raise UserError(
        f"'{folder / INDEX}' holds no parameters (nothing under 'target'); it has {top}."
    )


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes parameters as t5x does: matrices as zarr, norms and biases inside the index.

    Raises:
        UserError: t5x has no such model.
    """
    if getattr(checkpoint.config, "scaled_head", False):
        raise UserError(
            f"'{checkpoint.source}' has T5Config.scaled_head=True, a head of its own that reads "
            "scaled states; t5x scales those of tied heads only."
        )
    target: dict[str, Any] = {}
    for path, tensor in sorted(checkpoint.tensors.items()):
        if path.split("/")[-1] in ("kernel", "embedding"):
            target[path] = _write_zarr(folder, f"target.{path.replace('/', '.')}", tensor)
        else:
            target[path] = _packed(tensor.load())
    step = _packed(np.asarray(0, np.int32))
    index = {
        "version": VERSION,
        "optimizer": {"target": unflatten(target), "state": {"step": step}},
    }
    (folder / INDEX).write_bytes(msgpack.packb(index))


def config_from_shapes(
    source: str, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> T5Config:
    """Returns the config of the T5 that has these parameters.

    A t5x checkpoint does not hold its config. Shapes determine all sizes and the number of relative
    position buckets. The largest distance is read from a `config.gin` beside the checkpoint;
    without one, 32 buckets mean 128, as in all published T5s, and for others it must be given.

    Args:
        source: What to call the checkpoint in errors, and where `config.gin` is looked for.
        tensors: {parameter path: tensor}.
        overrides: Fields that replace what is inferred.

    Raises:
        UserError: These are not a T5's parameters, or the largest distance is unknown.
    """

    def shape(path: str) -> tuple[int, ...]:
        if path not in tensors or len(tensors[path].shape) != 2:
            paths = ", ".join(sorted(tensors))
            raise UserError(
                f"'{source}' is no T5: it has no matrix '{path}'.\n  Its parameters: {paths}"
            )
        return tensors[path].shape

    vocab_size, emb_dim = shape("token_embedder/embedding")
    num_heads, num_buckets = shape("encoder/relpos_bias/rel_embedding")
    joined = shape("encoder/layers_0/attention/query/kernel")[1]  # heads * head_dim
    gated = "encoder/layers_0/mlp/wi_0/kernel" in tensors
    _, mlp_dim = shape(f"encoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")
    fields = {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "head_dim": joined // num_heads,
        "mlp_dim": mlp_dim,
        "num_encoder_layers": _layers("encoder", tensors),
        "num_decoder_layers": _layers("decoder", tensors),
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in tensors,
        "relative_num_buckets": num_buckets,
        "param_dtype": param_dtype(tensors),
    }
    if "relative_max_distance" not in overrides:
        fields["relative_max_distance"] = _max_distance(source, num_buckets)
    return T5Config(**{**fields, **overrides})


def _max_distance(source: str, num_buckets: int) -> int:
    folder = Path(source).expanduser()
    for file in (folder / "config.gin", folder.parent / "config.gin"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if match := re.search(r"RelativePositionBiases\.max_distance\s*=\s*(\d+)", text):
                return int(match[1])
    if num_buckets == 32:
        return 128
    raise UserError(
        f"'{source}' has {num_buckets} buckets of relative positions, and nothing in it tells the "
        "largest distance that they cover; set T5Config.relative_max_distance, for convert with "
        "--config=relative_max_distance=NUMBER."
    )


def _layers(stack: str, tensors: Mapping[str, Tensor]) -> int:
    matches = (re.match(rf"{stack}/layers_(\d+)/", path) for path in tensors)
    return len({match[1] for match in matches if match})


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        index = msgpack.unpackb(
            file.read_bytes(), raw=False, strict_map_key=False, ext_hook=_unpacked
        )
    except OSError:
        raise UserError(f"'{folder}' is no t5x checkpoint: it has no readable {INDEX}.") from None
    except Exception as error:  # msgpack's errors have no base class of their own
        reason = type(error).__name__
        raise UserError(
            f"'{file}' is no t5x index or is truncated: msgpack cannot read it ({reason})."
        ) from None
    if not isinstance(index, dict):
        raise UserError(f"'{file}' is no t5x index: it holds no map.")
    if "version" in index and index["version"] != VERSION:
        raise UserError(
            f"'{file}' is of version {index['version']} of t5x's format; only {VERSION} is known."
        )
    return index


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (keys, leaf); the maps that stand for an array are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and "driver" not in value and _CHUNKED not in value:
            yield from (((str(key), *path), leaf) for path, leaf in _leaves(value))
        else:
            yield (str(key),), value


def _tensor(folder: Path, path: tuple[str, ...], leaf: Any) -> Tensor:
    """Opens the array that a leaf of the index holds or points to."""
    where = f"'{'/'.join(path)}' in '{folder / INDEX}'"
    if isinstance(leaf, np.ndarray):
        return Tensor.of(leaf, where)
    if isinstance(leaf, dict) and _CHUNKED in leaf:
        return Tensor.of(_unchunked(leaf), where)
    if isinstance(leaf, dict):
        kvstore = leaf.get("kvstore")
        name = kvstore.get("path") if isinstance(kvstore, dict) else leaf.get("path")
        metadata, driver = leaf.get("metadata"), leaf["driver"]
        if metadata and "dtype" in leaf:
            metadata = {"dtype": _zarr_type(leaf["dtype"])} | metadata
    elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        name, metadata, driver = leaf.removeprefix(_PLACEHOLDER), None, "zarr"
    else:
        raise UserError(f"{where} is neither an array nor a pointer to one.")
    if driver != "zarr" or not isinstance(name, str):
        raise UserError(f"{where} is stored in a way that is not known ({driver!r}).")
    # Some writers store an absolute path; the array is beside the index in any case.
    return _zarr(folder / name.rstrip("/").split("/")[-1], metadata, where)


def _zarr(folder: Path, metadata: Any, where: str) -> Tensor:
    """Opens an array's directory, with the metadata of the index if it lacks its own `.zarray`."""
    if not folder.is_dir():
        raise UserError(f"{where} should be in '{folder}', which is missing.")
    spec: dict[str, Any] = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    stored = (folder / ".zarray").is_file()
    if not stored and not metadata:
        raise UserError(f"'{folder}' lacks its .zarray, and the index does not describe it either.")
    if not stored:
        spec["metadata"] = metadata
    try:
        store = ts.open(spec, open=True, assume_metadata=not stored, context=_CONTEXT).result()
    except Exception as error:  # tensorstore raises ValueError, OSError and others
        raise UserError(f"'{folder}' cannot be read ({where}): {_first_line(error)}") from None
    shape, dtype = tuple(store.shape), jnp.dtype(store.dtype.numpy_dtype)
    if metadata and (wanted := metadata.get("shape")) and tuple(wanted) != shape:
        raise UserError(f"{where} has shape {tuple(wanted)} in the index, {shape} in its .zarray.")
    steps = store.chunk_layout.read_chunk.shape or shape  # 0: the chunk spans the axis
    chunk = tuple(step or size for step, size in zip(steps, shape, strict=True))
    sparse = store.fill_value is not None  # chunks full of this value need no file

    def load() -> np.ndarray:
        array = np.empty(shape, dtype)
        for region, key in _regions(shape, chunk):
            # tensorstore reads a missing chunk as zeros, without an error.
            if not sparse and not (folder / key).is_file():
                raise UserError(f"'{folder / key}' is missing, a chunk of {where}.")
            try:
                array[region] = store[region].read().result()
            except Exception as error:
                raise UserError(
                    f"'{folder / key}' is broken or truncated, a chunk of {where}: "
                    f"{_first_line(error)}"
                ) from None
        return array

    return Tensor(shape, dtype, load, where)


def _regions(
    shape: tuple[int, ...], chunk: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], str]]:
    """Yields each chunk's slices of the array and the name of its file, such as "0.1"."""
    counts = [math.ceil(size / step) for size, step in zip(shape, chunk, strict=True)]
    for position in np.ndindex(*counts):
        region = tuple(
            slice(i * step, min(size, (i + 1) * step))
            for i, size, step in zip(position, shape, chunk, strict=True)
        )
        yield region, ".".join(map(str, position)) or "0"


def _write_zarr(folder: Path, name: str, tensor: Tensor) -> dict[str, Any]:
    """Writes an array in chunks of whole rows and returns its entry in the index."""
    shape = tensor.shape
    row_bytes = max(1, math.prod(shape[1:]) * tensor.dtype.itemsize)
    chunks = [max(1, min(shape[0], CHUNK_BYTES // row_bytes)), *shape[1:]]
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder / name}/"},
        "metadata": {
            "chunks": chunks,
            "compressor": {"id": "gzip", "level": 1},  # as t5x itself
            "dtype": _zarr_type(str(tensor.dtype)),
            "shape": list(shape),
        },
    }
    store = ts.open(spec, create=True, context=_CONTEXT).result()
    array = tensor.read()
    for start in range(0, shape[0], chunks[0]):
        block = np.ascontiguousarray(array[start : start + chunks[0]], dtype=tensor.dtype)
        store[start : start + len(block)].write(block).result()
    entry = {"driver": "zarr", "dtype": str(tensor.dtype), "metadata": spec["metadata"]}
    return entry | {"kvstore": {"driver": "file", "path": name}}


def _zarr_type(name: str) -> str:
    """Returns zarr's name of a dtype: "<f4" for "float32"."""
    kinds = {"float": "<f", "int": "<i", "uint": "<u"}
    match = re.fullmatch(r"(float|int|uint)(8|16|32|64)", name)
    # zarr has no name for bfloat16; tensorstore accepts its own, and refuses what it does not know.
    return f"{kinds[match[1]]}{int(match[2]) // 8}" if match else name


def _packed(array: np.ndarray) -> msgpack.ExtType:
    """Returns an array as Flax's msgpack extension type."""
    data = msgpack.packb((array.shape, str(array.dtype), array.tobytes()))
    return msgpack.ExtType(_NDARRAY, data)


def _unpacked(code: int, data: bytes) -> Any:
    if code in (_NDARRAY, _SCALAR):
        shape, dtype, buffer = msgpack.unpackb(data, raw=False)
        return np.frombuffer(buffer, jnp.dtype(dtype)).reshape(shape)
    if code == _COMPLEX:
        return complex(*msgpack.unpackb(data))
    return msgpack.ExtType(code, data)


def _unchunked(leaf: Mapping[str, Any]) -> np.ndarray:
    """Returns an array that Flax has split in chunks, as msgpack holds at most 2^32 bytes each."""
    # Flax stores lists as maps with the keys "0", "1", ...
    chunks = [leaf["chunks"][str(i)] for i in range(len(leaf["chunks"]))]
    shape = [leaf["shape"][str(i)] for i in range(len(leaf["shape"]))]
    return np.concatenate([np.ravel(chunk) for chunk in chunks]).reshape(shape)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]
