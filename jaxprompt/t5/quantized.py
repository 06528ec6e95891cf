"""Quantised weights in a backbone's directory (`join`), and codes made of float ones (`Coded`).

A quantised tensor is stored as NAME (I8; or U8, two int4 codes a byte) and NAME_scale (F32), named
and laid out as T5X has it: inputs by outputs, as it is computed with, so that loading only copies.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprompt.quantize import codes_of, is_quantized, scales_of, spread
from jaxprompt.t5.copying import copy_into
from jaxprompt.t5.weight_names import Layout, Weight
from jaxprompt.tensorfile import StoredTensor
from jaxprompt.typing import UserError

SCALE = "_scale"  # behind the name of what it scales
METHOD = "jaxprompt"  # `quant_method` in a config.json
_STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}
_BLOCK_BYTES = 2**20  # of a tensor as float32 that are quantised at a time

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor(StoredTensor):
    """A stored tensor that is quantised; read as any other, it is float32.

    Attributes:
      kind: "int8" or "int4".
      codes: int8 [inputs, outputs] of either kind.
      scale: float32 [groups, outputs], of an embedding table [words, 1].
    """

    kind: str
    codes: StoredTensor
    scale: StoredTensor

    def noticed(self, notice: Callable[[], None]) -> "QuantizedTensor":
        """The same tensor; `notice` is called whenever it or its codes are read, before."""
        floats = super().noticed(notice)
        return dataclasses.replace(self, read=floats.read, codes=self.codes.noticed(notice))


def join(tensors: Mapping[str, StoredTensor], where: object) -> dict[str, StoredTensor]:
    """Puts codes and their scales together.

    Raises: UserError for codes and scales that do not fit each other.
    """
    joined = dict(tensors)
    kinds = {dtype: kind for kind, dtype in _STORED.items()}
    for scale_name in [name for name in tensors if name.endswith(SCALE)]:
        name = scale_name.removesuffix(SCALE)
        kind = kinds.get(tensors[name].dtype) if name in tensors else None
        if kind is not None:
            joined[name] = _pair(kind, tensors[name], joined.pop(scale_name), f"{where}: {name}")
    return joined


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is written together: bytes by the names in the file, and a way to make the arrays."""

    sizes: Mapping[str, int]
    make: Callable[[], dict[str, np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(self.sizes.values())


def quantized_piece(weight: Weight, stored: StoredTensor, layout: Layout, leaf: Any) -> Piece:
    """A weight as it is stored in a quantised directory.

    Args:
      stored, layout: where it comes from, float or quantised.
      leaf: of `abstract_params`, what it is in the tree: its dtype, or codes and scales.
    """
    name, shape = weight.stored_name(Layout.T5X), weight.flat_shape()
    if not is_quantized(leaf):

        def read() -> np.ndarray:
            return weight.ours(stored.read(), layout).reshape(shape).astype(leaf.dtype)

        return Piece({name: math.prod(shape) * leaf.dtype.itemsize}, lambda: {name: read()})
    of_scale = dataclasses.replace(weight, shape=leaf.scale.shape[leaf.ndim - len(weight.shape) :])
    columns = shape[1] if leaf.qtype == "int8" else -(-shape[1] // 2)
    scales = 4 * math.prod(of_scale.shape)

    def make() -> dict[str, np.ndarray]:
        coded = Coded(weight, stored, layout, leaf.qtype, of_scale.shape)
        codes, scale = np.empty(weight.shape, np.int8), np.empty(of_scale.shape, np.float32)
        coded.fill_codes(codes, _all(codes.shape))
        coded.fill_scale(scale, _all(scale.shape))
        flat = codes.reshape(shape)
        stored_codes = flat if leaf.qtype == "int8" else _packed(flat)
        return {name: stored_codes, name + SCALE: scale.reshape(of_scale.flat_shape())}

    return Piece({name: shape[0] * columns, name + SCALE: scales}, make)


def config_entry(kind: str, fingerprint: str) -> dict[str, Any]:
    """Of config.json, under `quantization_config`; the fingerprint is of the float weights."""
    return {"quant_method": METHOD, "quantize": kind, "fingerprint": fingerprint}


def read_entry(raw: Mapping[str, Any], kind: str, where: object) -> str:
    """Holds a config.json against its weights, and says the fingerprint of their float originals.

    Args:
      kind: what the weights are, "none" too.
    Returns: the fingerprint; empty for weights that are not quantised.
    Raises: UserError for weights that another program quantised, or that it says are another kind.
    """
    entry = raw.get("quantization_config")
    if entry is None and kind == "none":
        return ""
    entry = entry if isinstance(entry, Mapping) else {}
    method = entry.get("quant_method")
    if method not in (None, METHOD):
        raise UserError(
            f"{where}: the weights were quantised by {method!r}, which cannot be read; take the "
            "float ones and quantise while loading (backbone.quantize)"
        )
    if entry.get("quantize") != kind or not isinstance(entry.get("fingerprint"), str):
        raise UserError(
            f"{where}: quantization_config is {dict(entry)}, the weights beside it are "
            f"{'float' if kind == 'none' else kind}; they do not belong together"
        )
    return entry["fingerprint"]


def _all(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


class Coded:
    """Codes and scales of one tensor in our layout, any part of them; made if they are not stored.

    A scale belongs to all inputs of its group, wherever they go: those of every column that is
    asked for are looked at, however few rows are. Scales that were found are kept.

    Args:
      weight: its place in our tree.
      stored: float, or quantised.
      layout: of its file.
      kind: "int8" or "int4", what is wanted.
      scale_shape: of its scales, without the layer axis.
    """

    def __init__(
        self,
        weight: Weight,
        stored: StoredTensor,
        layout: Layout,
        kind: str,
        scale_shape: tuple[int, ...],
    ):
        self.weight, self.kind, self.scale_shape = weight, kind, scale_shape
        self._layout = layout
        read = functools.partial(_read, weight, stored, layout)
        self._values = functools.cache(read) if weight.layer is None else read
        self._pair = stored if isinstance(stored, QuantizedTensor) and stored.kind == kind else None
        sizes = zip(weight.shape, scale_shape, strict=True)
        self._is_output = [size == count for size, count in sizes]
        self._scales: dict[tuple, np.ndarray] = {}

    def fill_codes(self, block: np.ndarray, index: Index) -> None:
        """Writes a part of the codes into a block of its shape, int8 or int4."""
        if self._pair is not None:
            copy_into(block, self.weight.ours(self._pair.codes.read(), self._layout)[index])
            return
        values = functools.cache(self._values)
        for within, some in self._blocks(index):
            columns = self._columns(some)
            scale = spread(self._scale(columns, values), values()[columns].shape)
            rows = tuple(
                slice(None) if output or count == 1 else part
                for part, output, count in zip(some, self._is_output, scale.shape, strict=True)
            )
            copy_into(block[within], codes_of(values()[some], scale[rows], self.kind))

    def fill_scale(self, block: np.ndarray, index: Index) -> None:
        """Writes a part of the scales into a block of its shape, float32."""
        if self._pair is not None:
            weight = dataclasses.replace(self.weight, shape=self.scale_shape)
            block[...] = weight.ours(self._pair.scale.read(), self._layout)[index]
            return
        values = functools.cache(self._values)
        for within, some in self._blocks(index):
            groups = zip(some, self._is_output, strict=True)
            chosen = tuple(slice(None) if output else part for part, output in groups)
            block[within] = self._scale(self._columns(some), values)[chosen]

    def _blocks(self, index: Index) -> Iterator[tuple[Index, Index]]:
        """An index cut along the first axis of outputs: each piece's place within, and itself."""
        cut = self._is_output.index(True)
        row_bytes = 4 * math.prod(self.weight.shape) // self.weight.shape[cut]
        step = max(1, _BLOCK_BYTES // row_bytes)
        start, stop = index[cut].start, index[cut].stop
        for first in range(start, stop, step):
            last = min(first + step, stop)
            within = [slice(None)] * len(index)
            within[cut] = slice(first - start, last - start)
            yield tuple(within), (*index[:cut], slice(first, last), *index[cut + 1 :])

    def _scale(self, columns: Index, values: Callable[[], np.ndarray]) -> np.ndarray:
        """Scales of all groups of some outputs."""
        key = tuple((part.start, part.stop) for part in columns)
        if key not in self._scales:
            of_columns = values()[columns]
            sizes = zip(self._is_output, of_columns.shape, self.scale_shape, strict=True)
            shape = [size if output else count for output, size, count in sizes]
            self._scales[key] = scales_of(of_columns, shape, self.kind)
        return self._scales[key]

    def _columns(self, index: Index) -> Index:
        """The same outputs, all inputs."""
        outputs = zip(index, self._is_output, strict=True)
        return tuple(part if output else slice(None) for part, output in outputs)


def _read(weight: Weight, stored: StoredTensor, layout: Layout) -> np.ndarray:
    return weight.ours(stored.read(), layout)


def _pair(kind: str, stored: StoredTensor, scale: StoredTensor, where: str) -> QuantizedTensor:
    fits = len(stored.shape) == len(scale.shape) == 2 and scale.dtype == np.float32
    if fits:
        rows, columns = stored.shape
        outputs = scale.shape[1] if kind == "int4" else columns
        counts = zip((rows, outputs), scale.shape, strict=True)
        fits = columns == (-(-outputs // 2) if kind == "int4" else columns)
        fits = fits and all(count and size % count == 0 for size, count in counts)
    if not fits:
        raise UserError(
            f"{where}: codes of shape {list(stored.shape)} and scales of {scale.dtype} "
            f"{list(scale.shape)} do not fit each other"
        )
    shape = (rows, outputs)

    def read_codes() -> np.ndarray:
        return stored.read() if kind == "int8" else _unpacked(stored.read(), outputs)

    def read() -> np.ndarray:
        return read_codes().astype(np.float32) * spread(scale.read(), shape)

    codes = StoredTensor(shape, np.dtype(np.int8), read_codes, stored.mapped)
    return QuantizedTensor(
        shape, np.dtype(np.float32), read, stored.mapped, kind=kind, codes=codes, scale=scale
    )


def _packed(codes: np.ndarray) -> np.ndarray:
    """int8 codes of -8..7 [rows, columns] -> uint8 [rows, columns / 2], the earlier one low."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8)
    return (even[:, 0::2] & 15) | (even[:, 1::2] << 4)


def _unpacked(stored: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of `_packed`."""
    codes = np.empty((len(stored), 2 * stored.shape[1]), np.int8)
    codes[:, 0::2] = ((stored & 15) ^ 8).view(np.int8) - 8
    codes[:, 1::2] = stored.view(np.int8) >> 4
    return codes[:, :columns]
