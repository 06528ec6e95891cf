"""Reads what `torch.save` wrote without torch and without unpickling.

A tiny machine runs the few opcodes and the few globals that a dict of tensors needs; everything
else in the file is refused by name. Called by `weight_files`.
"""

import dataclasses
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from jaxprompt.tensorfile import StoredTensor, map_bytes
from jaxprompt.typing import UserError

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# what a damaged or hostile file makes the code below raise
_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def read_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """Opens `pytorch_model.bin`: name -> memory-mapped tensor.

    Both formats of `torch.save` are read: the zip archive (torch 1.6 and newer) and the stream.
    Raises: UserError for a damaged file, for any global but those of tensors (it is named), for a
      name that is set twice and for a value that is not a tensor.
    Source: torch/serialization.py, `_load` and `_legacy_load`.
    """
    content = map_bytes(path)
    try:
        if content[:4].tobytes() == b"PK\x03\x04":
            views, locate = _read_zip(path, content)
        else:
            views, locate = _read_legacy(path, content)
        return {name: StoredTensor.of(view.array(locate)) for name, view in _tensors(views)}
    except _Refused as refusal:
        raise UserError(f"{path}: refused to load {refusal}; only tensors are read") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: is no torch weights file, or it is damaged: {error}") from error


class _Refused(Exception):
    """The file asks for something that a dict of tensors does not need."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage as the pickle names it; its bytes are elsewhere in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, locate: Callable[[_Storage], np.ndarray]) -> np.ndarray:
        """The view over the storage's bytes; numpy checks that it stays inside them."""
        item = self.storage.dtype.itemsize
        data = locate(self.storage)[: self.storage.size * item]
        if min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError("a tensor has a negative offset, size or stride")
        strides = tuple(stride * item for stride in self.strides)
        return np.ndarray(self.shape, self.storage.dtype, data, self.offset * item, strides)


@dataclasses.dataclass(frozen=True)
class _Allowed:
    """A callable global of the closed list."""

    call: Callable[..., Any]


def _rebuild_tensor(
    storage: Any,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _View:
    """torch._utils._rebuild_tensor_v2, as a view."""
    if not isinstance(storage, _Storage) or metadata:
        raise _Refused("a tensor with metadata or without a storage")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _ordered_dict(pairs: Any = ()) -> dict:
    result: dict = {}
    for key, value in pairs:
        _set_item(result, key, value)
    return result


_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _Allowed(_ordered_dict),
    "torch._utils _rebuild_tensor_v2": _Allowed(_rebuild_tensor),
    "torch._utils _rebuild_parameter": _Allowed(lambda data, requires_grad, hooks: data),
} | {f"torch {name}": np.dtype(dtype) for name, dtype in _STORAGES.items()}


class _Machine:
    """Runs a pickle over a table of opcodes: dicts, lists, tuples, strings, numbers and views."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: IO[bytes]) -> Any:
        """Executes up to STOP and leaves the stream right after it."""
        self.stack.clear()
        self.memo.clear()
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                break
            if opcode.name not in _OPCODES:
                raise _Refused(f"the pickle opcode {opcode.name}")
            _OPCODES[opcode.name](self, arg)
        if len(self.stack) != 1:
            raise ValueError("the pickle leaves no single object")
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError("the pickle takes more than it has put")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def find_global(self, module: str, name: str) -> None:
        if f"{module} {name}" not in _GLOBALS:
            raise _Refused(f"{module}.{name}")
        self.push(_GLOBALS[f"{module} {name}"])

    def reduce(self) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, _Allowed) or not isinstance(arguments, tuple):
            raise _Refused(f"a call of {type(function).__name__}")
        self.push(function.call(*arguments))

    def build(self) -> None:
        """Drops the attributes of an OrderedDict: torch keeps module versions there."""
        target, _ = self.last(2)
        if not isinstance(target, dict):
            raise _Refused(f"a state for {type(target).__name__}")
        self.push(target)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("the pickle sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(target, key, value)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("the pickle appends to something that is no list")
        self.stack[-1].extend(items)

    def find_storage(self) -> None:
        """A persistent id: ("storage", type, key, device, elements[, view of another])."""
        (saved_id,) = self.last(1)
        kind, dtype, key, _, size, *view = saved_id
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise _Refused("a persistent id that is no storage of a known type")
        if any(part is not None for part in view):
            raise _Refused("a view of a storage")
        self.storages[key] = _Storage(key, dtype, size)
        self.push(self.storages[key])


_MARK = object()
# opcode -> what it does to the machine; what torch writes for a dict of tensors, protocols 2 to 5
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "MARK": lambda machine, arg: machine.push(_MARK),
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "EMPTY_LIST": lambda machine, arg: machine.push([]),
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, arg: machine.push(machine.last(1)),
    "TUPLE2": lambda machine, arg: machine.push(machine.last(2)),
    "TUPLE3": lambda machine, arg: machine.push(machine.last(3)),
    "SETITEM": lambda machine, arg: machine.set_items(list(machine.last(2))),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, arg: machine.extend(list(machine.last(1))),
    "APPENDS": lambda machine, arg: machine.extend(machine.since_mark()),
    "MEMOIZE": lambda machine, arg: machine.remember(len(machine.memo)),
    "GLOBAL": lambda machine, arg: machine.find_global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, arg: machine.find_global(*machine.last(2)),
    "REDUCE": lambda machine, arg: machine.reduce(),
    "BUILD": lambda machine, arg: machine.build(),
    "BINPERSID": lambda machine, arg: machine.find_storage(),
}
for _name in ("BINPUT", "LONG_BINPUT"):
    _OPCODES[_name] = _Machine.remember
for _name in ("BINGET", "LONG_BINGET"):
    _OPCODES[_name] = lambda machine, arg: machine.push(machine.memo[arg])
for _name in ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"):
    _OPCODES[_name] = _Machine.push
for _name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"):
    _OPCODES[_name] = _Machine.push


def _set_item(target: dict, key: Any, value: Any) -> None:
    if not isinstance(key, str | int):
        raise ValueError(f"a key of type {type(key).__name__}")
    if key in target:
        raise ValueError(f"{key!r} is set twice")
    target[key] = value


def _tensors(loaded: Any) -> Iterator[tuple[str, _View]]:
    if not isinstance(loaded, dict):
        raise _Refused(f"{type(loaded).__name__} where a dict of tensors belongs")
    for name, value in loaded.items():
        if not isinstance(value, _View):
            raise _Refused(f"{name!r}, which is {type(value).__name__} and no tensor")
        yield str(name), value


def _read_zip(path: Path, content: np.ndarray) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    """The archive: NAME/data.pkl and, stored uncompressed, NAME/data/KEY for each storage."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} data.pkl in the archive")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("big-endian tensors")
        with archive.open(pickles[0]) as stream:
            loaded = _Machine().run(stream)

    def locate(storage: _Storage) -> np.ndarray:
        entry = entries[f"{root}data/{storage.key}"]
        header = content[entry.header_offset : entry.header_offset + 30].tobytes()
        if entry.compress_type != zipfile.ZIP_STORED or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{entry.filename} is compressed or not where the archive says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        return content[start : start + entry.file_size]

    return loaded, locate


def _read_legacy(path: Path, content: np.ndarray) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    """The stream: magic number, protocol, system, object, storage keys; then sizes and bytes."""
    machine = _Machine()
    with path.open("rb") as stream:
        if (machine.run(stream), machine.run(stream)) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise ValueError("no torch magic number")
        if not machine.run(stream).get("little_endian"):
            raise _Refused("big-endian tensors")
        loaded = machine.run(stream)
        keys = machine.run(stream)
        at = stream.tell()
    spans: dict[str, np.ndarray] = {}
    for key in keys:
        storage = machine.storages[key]
        stop = at + 8 + storage.size * storage.dtype.itemsize
        size = int.from_bytes(content[at : at + 8].tobytes(), "little")
        if size != storage.size or stop > len(content):
            raise ValueError(f"storage {key} is cut short")
        spans[key] = content[at + 8 : stop]
        at = stop
    return loaded, lambda storage: spans[storage.key]
