"""Quantised weights in a backbone's directory (`join`), and codes made of float ones (`Coded`).

A quantised tensor is stored as NAME (I8; or U8, two int4 codes a byte) and NAME_scale (F32), named
and laid out as T5X has it: inputs by outputs, as it is computed with, so that loading only copies.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprompt.quantize import codes_of, is_quantized, scales_of, spread
from jaxprompt.t5.weight_names import Layout, Weight
from jaxprompt.tensorfile import StoredTensor
from jaxprompt.typing import UserError

SCALE = "_scale"  # behind the name of what it scales
METHOD = "jaxprompt"  # `quant_method` in a config.json
_STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint8)}

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
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
    coded = Coded(weight, stored, layout, leaf.qtype, of_scale.shape)
    columns = shape[1] if leaf.qtype == "int8" else -(-shape[1] // 2)
    scales = 4 * math.prod(of_scale.shape)

    def make() -> dict[str, np.ndarray]:
        codes = coded.codes(_all(weight.shape)).astype(np.int8).reshape(shape)
        scale = coded.scale(_all(of_scale.shape)).reshape(of_scale.flat_shape())
        return {name: codes if leaf.qtype == "int8" else _packed(codes), name + SCALE: scale}

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

    def codes(self, index: Index) -> np.ndarray:
        """A part of the codes, int8 or int4."""
        if self._pair is not None:
            return self.weight.ours(self._pair.codes.read(), self._layout)[index]
        values, columns = self._values(), self._columns(index)
        scale = spread(self._scale(columns, values), values[columns].shape)
        rows = tuple(
            slice(None) if output or count == 1 else part
            for part, output, count in zip(index, self._is_output, scale.shape, strict=True)
        )
        return codes_of(values[index], scale[rows], self.kind)

    def scale(self, index: Index) -> np.ndarray:
        """A part of the scales, float32."""
        if self._pair is not None:
            weight = dataclasses.replace(self.weight, shape=self.scale_shape)
            return weight.ours(self._pair.scale.read(), self._layout)[index]
        groups = zip(index, self._is_output, strict=True)
        within = tuple(slice(None) if output else part for part, output in groups)
        return self._scale(self._columns(index))[within]

    def _scale(self, columns: Index, values: np.ndarray | None = None) -> np.ndarray:
        """Scales of all groups of some outputs."""
        key = tuple((part.start, part.stop) for part in columns)
        if key not in self._scales:
            of_columns = (self._values() if values is None else values)[columns]
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

    codes = StoredTensor(shape, np.dtype(np.int8), read_codes)
    return QuantizedTensor(shape, np.dtype(np.float32), read, kind, codes, scale)


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
