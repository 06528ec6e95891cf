"""Tensors that stay on disk (`StoredTensor`), and the safetensors format, read and written.

Every reader of a weights format returns StoredTensors. Only this file touches safetensors.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save, save_file

from jaxprompt.typing import UserError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER_BYTES = 100_000_000
_AHEAD = 128 * 2**20  # bytes that are read before they are asked for
_TOUCHED = 8 * 2**20  # bytes in one go


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weights file, not read yet.

    Attributes:
      shape: as stored.
      dtype: as stored.
      read: gives the array; memory-mapped where the format allows, else a fresh copy.
      mapped: the bytes of the memory map that it is a view of, uint8 [size]; None if it is none.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    mapped: np.ndarray | None = None

    @classmethod
    def of(cls, array: np.ndarray) -> "StoredTensor":
        """Wraps an array (usually a view of a memory map)."""
        mapped = array.reshape(-1).view(np.uint8) if array.flags.c_contiguous else None
        return cls(tuple(array.shape), array.dtype, lambda: array, mapped)

    def transposed(self) -> "StoredTensor":
        """The same tensor with its axes reversed."""
        return StoredTensor(self.shape[::-1], self.dtype, lambda: self.read().T, self.mapped)

    def noticed(self, notice: Callable[[], None]) -> "StoredTensor":
        """The same tensor; `notice` is called whenever it is read, before."""

        def read() -> np.ndarray:
            notice()
            return self.read()

        return dataclasses.replace(self, read=read)


@contextlib.contextmanager
def reading_ahead(tensors: Sequence[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """The same tensors, to be read in this order: the disk goes on while one is worked on.

    A thread touches the pages of the next ones, at least of one and no further ahead than `_AHEAD`,
    so that the system reads them; it holds no copy.
    """
    sizes = [0 if tensor.mapped is None else tensor.mapped.nbytes for tensor in tensors]
    starts = [0, *itertools.accumulate(sizes)]
    asked, stop = 0, threading.Event()

    def notice(number: int) -> None:
        nonlocal asked
        asked = max(asked, number + 1)
        while asked < len(tensors) and starts[asked] - starts[number + 1] < _AHEAD:
            if (mapped := tensors[asked].mapped) is not None:
                pool.submit(_touch, mapped, stop)
            asked += 1

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            yield [
                tensor.noticed(functools.partial(notice, number))
                for number, tensor in enumerate(tensors)
            ]
        finally:
            stop.set()


def _touch(mapped: np.ndarray, stop: threading.Event) -> None:
    """Reads a byte of every page; not in one go, so that it can be stopped."""
    for first in range(0, len(mapped), _TOUCHED):
        if not stop.is_set():
            mapped[first : first + _TOUCHED : mmap.PAGESIZE].max()


def map_bytes(path: Path) -> np.memmap:
    """A whole file as a read-only memory map, uint8 [size].

    Raises: UserError if it is missing, empty or a Git LFS pointer.
    """
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if content[:24].tobytes() == b"version https://git-lfs.":
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` there")
    return content


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Opens a safetensors file: name -> memory-mapped tensor; bytes are read when touched.

    Raises: UserError for a damaged file, a doubled name or an unknown dtype.
    """
    return parse_safetensors(map_bytes(path), path)


def parse_safetensors(content: np.ndarray, where: Path | str) -> dict[str, StoredTensor]:
    """`read_safetensors` of a file's bytes, uint8 [size]; the tensors are views of them."""
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or length > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise UserError(f"{where}: is not a safetensors file, or it was cut short")
    try:
        header = json.loads(content[8 : 8 + length].tobytes(), object_pairs_hook=_without_doubles)
        header.pop("__metadata__", None)
        data = content[8 + length :]
        return {name: StoredTensor.of(_view(data, **entry)) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{where}: damaged safetensors header: {error}") from error


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes numpy arrays (C order is made where it is not); metadata defaults to {"format": "pt"}.

    Raises: OSError if the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # save_file keeps what it writes to its owner alone
    try:
        save_file(contiguous, path, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def safetensors_bytes(tensors: Mapping[str, np.ndarray], kind: str = "np") -> bytes:
    """What a safetensors file of some numpy arrays (in C order) holds; kind: its "format"."""
    return save(dict(tensors), metadata={"format": kind})


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    start, stop = data_offsets
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(_DTYPES)}")
    kind = np.dtype(_DTYPES[dtype])
    if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {stop} of {len(data)}")
    return data[start:stop].view(kind).reshape(shape)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise ValueError(f"{doubled[0]!r} is there twice")
    return dict(pairs)
