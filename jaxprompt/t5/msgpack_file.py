"""Reads Flax's msgpack (`flax_model.msgpack`) by walking its bytes: arrays stay memory-mapped.

Called by `weight_files`, names are the nested keys joined by "/", and by `t5x`, whose files of that
format hold more than arrays.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxprompt.tensorfile import StoredTensor, map_bytes
from jaxprompt.typing import UserError

_ARRAYS = (1, 3)  # flax.serialization's ext codes of (shape, dtype name, bytes): arrays, scalars
_CHUNKED = "__msgpack_chunked_array__"  # how flax splits arrays of more than 1 GiB
_MAX_DEPTH = 32
# first byte -> (kind, bytes of the length field) of every sized msgpack type Flax writes
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SIGNED = {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FLOATS = {0xCA: ">f", 0xCB: ">d"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_msgpack(path: Path) -> dict[str, StoredTensor]:
    """Opens a Flax msgpack file: "a/b/c" -> memory-mapped tensor (one in chunks is joined on read).

    Raises: UserError for a damaged file, a doubled key or a value that is no array.
    """
    content = map_bytes(path)
    try:
        return dict(_leaves(parse_msgpack(content), ()))
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path}: is not a Flax weights file, or it is damaged: {error}") from error


def parse_msgpack(content: np.ndarray) -> dict[str, Any]:
    """The nested dict of a file's bytes, uint8 [size]; arrays are StoredTensors, views of them.

    Raises: ValueError, TypeError or LookupError if it is none or is damaged.
    """
    tree, end = _value(content, 0, 0)
    if not isinstance(tree, dict) or end != len(content):
        raise ValueError("no map of arrays, or bytes after it")
    return _with_whole_arrays(tree)


def _value(data: np.ndarray, at: int, depth: int) -> tuple[Any, int]:
    """Decodes the value at a position; returns it and the position after it. Bytes stay a view."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    code = int(data[at])
    at += 1
    if code < 0x80:
        return code, at
    if code in _CONSTANTS:
        return _CONSTANTS[code], at
    if code in _UNSIGNED:
        return _number(data, at, _UNSIGNED[code]), at + _UNSIGNED[code]
    if code in _SIGNED:
        content = _take(data, at, _SIGNED[code]).tobytes()
        return int.from_bytes(content, "big", signed=True), at + _SIGNED[code]
    if code in _FLOATS:
        size = struct.calcsize(_FLOATS[code])
        return struct.unpack(_FLOATS[code], _take(data, at, size).tobytes())[0], at + size
    if code >= 0xE0:
        return code - 0x100, at
    if code < 0x90:
        return _map(data, at, code & 0x0F, depth)
    if code < 0xA0:
        return _array(data, at, code & 0x0F, depth)
    if code < 0xC0:
        return _text(data, at, code & 0x1F)
    if code in _FIXED_EXT:
        return _ext(data, at, _FIXED_EXT[code], depth)
    if code not in _SIZED:
        raise ValueError(f"type 0x{code:02x} at byte {at - 1}")
    kind, width = _SIZED[code]
    size, at = _number(data, at, width), at + width
    match kind:
        case "map":
            return _map(data, at, size, depth)
        case "array":
            return _array(data, at, size, depth)
        case "str":
            return _text(data, at, size)
        case "ext":
            return _ext(data, at, size, depth)
    return _take(data, at, size), at + size


def _take(data: np.ndarray, at: int, size: int) -> np.ndarray:
    if at + size > len(data):
        raise ValueError(f"cut short: {size} bytes wanted at byte {at} of {len(data)}")
    return data[at : at + size]


def _number(data: np.ndarray, at: int, width: int) -> int:
    return int.from_bytes(_take(data, at, width).tobytes(), "big")


def _text(data: np.ndarray, at: int, size: int) -> tuple[str, int]:
    return _take(data, at, size).tobytes().decode(), at + size


def _array(data: np.ndarray, at: int, size: int, depth: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(size):
        item, at = _value(data, at, depth + 1)
        items.append(item)
    return items, at


def _map(data: np.ndarray, at: int, size: int, depth: int) -> tuple[dict[str, Any], int]:
    result: dict[str, Any] = {}
    for _ in range(size):
        key, at = _value(data, at, depth + 1)
        value, at = _value(data, at, depth + 1)
        if not isinstance(key, str) or key in result:
            raise ValueError(f"{key!r} is there twice or is no name")
        result[key] = value
    return result, at


def _ext(data: np.ndarray, at: int, size: int, depth: int) -> tuple[StoredTensor, int]:
    if int(data[at]) not in _ARRAYS:
        raise ValueError(f"extension type {int(data[at])} at byte {at}")
    (shape, dtype, content), end = _value(data, at + 1, depth + 1)
    if end != at + 1 + size:
        raise ValueError(f"an array at byte {at} is not as long as it says")
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return StoredTensor.of(content.view(kind).reshape(shape)), end


def _with_whole_arrays(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with arrays in place of their chunks."""
    if _CHUNKED in tree:
        raise ValueError("the whole of it is one array")
    for name, value in tree.items():
        if isinstance(value, dict):
            tree[name] = _joined(value) if _CHUNKED in value else _with_whole_arrays(value)
    return tree


def _leaves(tree: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, StoredTensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        elif isinstance(value, StoredTensor):
            yield "/".join((*path, name)), value
        else:
            raise ValueError(f"{'/'.join((*path, name))} is no array")


def _joined(value: dict[str, Any]) -> StoredTensor:
    """An array cut into flat chunks: {"shape": {"0": n, ...}, "chunks": {"0": array, ...}}."""
    shape = tuple(value["shape"][str(axis)] for axis in range(len(value["shape"])))
    chunks = [value["chunks"][str(number)] for number in range(len(value["chunks"]))]
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of an array of shape {shape} do not fill it")

    def read() -> np.ndarray:
        return np.concatenate([chunk.read() for chunk in chunks]).reshape(shape)

    return StoredTensor(shape, chunks[0].dtype, read)
