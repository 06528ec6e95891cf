"""Directories of stored arrays, local or on Google Cloud Storage: T5X's and Orbax's leaves.

Only this file touches tensorstore. Nothing that a file says chooses a driver or a place: callers
name arrays below the directory, and this file makes the specification.
"""

import concurrent.futures
import dataclasses
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxprompt.tensorfile import StoredTensor, map_bytes
from jaxprompt.typing import UserError

REMOTE = "gs://"
_NAME = re.compile(r"[^/\\\0]+")
_MISSING = re.compile(r"^NOT_FOUND", re.IGNORECASE)
_RETRIES = {"max_retries": 4}  # the library's own 32 take a quarter of an hour to say no
_AT_ONCE = 32


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether it is a place on Google Cloud Storage."""
    return str(location).startswith(REMOTE)


@dataclasses.dataclass(frozen=True)
class ArrayStore:
    """One directory.

    Attributes:
      location: a local path or `gs://bucket/path`.
    """

    location: str

    def inside(self, name: str) -> "ArrayStore":
        """The directory of that name in this one."""
        return ArrayStore(f"{self.location.rstrip('/')}/{name}")

    def read_file(self, name: str) -> np.ndarray | None:
        """A file's bytes, uint8 [size], memory-mapped if it is local; None if there is none.

        Raises: UserError if it cannot be read.
        """
        if not is_remote(self.location):
            path = Path(self.location) / name
            return map_bytes(path) if path.is_file() else None
        import tensorstore

        try:
            kvstore = tensorstore.KvStore.open(self._kvstore(""), context=_context()).result()
            found = kvstore.read(name).result()
        except _errors() as error:
            raise UserError(f"{self.location}: cannot be read: {_reason(error)}") from error
        return np.frombuffer(found.value, np.uint8) if found.state == "value" else None

    def open_arrays(
        self, names: Iterable[str], *, zarr3: bool = False, ocdbt: bool = False
    ) -> dict[str, StoredTensor]:
        """Opens arrays without reading them: name -> tensor, each read when asked for.

        Args:
          names: of arrays below this directory.
          zarr3: whether they are in version 3 of the zarr format; else in version 2.
          ocdbt: whether the directory is one OCDBT database, as Orbax writes it by now.
        Raises: UserError for an array that is missing, damaged or larger than this machine's
          memory, now or when it is read; it is named.
        """
        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            opened = {
                name: pool.submit(self._open, name, "zarr3" if zarr3 else "zarr", ocdbt)
                for name in names
            }
        return {name: future.result() for name, future in opened.items()}

    def _open(self, name: str, driver: str, ocdbt: bool) -> StoredTensor:
        import tensorstore

        where = f"{self.location}/{name}"
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise UserError(f"{self.location}: refused to read the array {name!r} elsewhere")
        kvstore = self._kvstore(f"{name}/")
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": self._kvstore(""), "path": f"{name}/"}
        # a chunk that is not there must not read as zeros
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        try:
            array: Any = tensorstore.open(
                spec, open=True, read=True, create=False, context=_context()
            ).result()
            _check_size(array, where)
        except _errors() as error:
            raise _unreadable(where, error) from error

        def read() -> np.ndarray:
            try:
                return np.asarray(array.read().result())
            except _errors() as error:
                raise _unreadable(where, error) from error

        return StoredTensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)

    def _kvstore(self, below: str) -> dict[str, str]:
        """tensorstore's words for a path below the directory."""
        if is_remote(self.location):
            bucket, _, path = self.location.removeprefix(REMOTE).partition("/")
            prefix = f"{path.rstrip('/')}/" if path else ""
            return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}{below}"}
        return {"driver": "file", "path": f"{os.path.abspath(self.location)}/{below}"}


def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"gcs_request_retries": _RETRIES})


def _errors() -> tuple[type[Exception], ...]:
    """What tensorstore makes of damage, of hostile metadata and of networks."""
    return (ValueError, TypeError, LookupError, OSError, RuntimeError, MemoryError, OverflowError)


def _check_size(array: Any, where: str) -> None:
    """Refuses what cannot be: reading it would end the process, not raise."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chunk = array.chunk_layout.read_chunk.shape or ()
    for shape in (array.shape, chunk):
        if math.prod(shape) * np.dtype(array.dtype.numpy_dtype).itemsize > memory:
            raise UserError(f"{where}: says {list(shape)}, more than this machine's memory")


def _unreadable(where: str, error: Exception) -> UserError:
    if _MISSING.match(str(error)) and "chunk" not in str(error):
        return UserError(f"{where}: there is no such array")
    return UserError(f"{where}: cannot be read, it may be damaged: {_reason(error)}")


def _reason(error: Exception) -> str:
    """tensorstore's first sentence, without the specification that it appends."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r" \[(?:tensorstore_spec|source locations)=.*$", "", text)
