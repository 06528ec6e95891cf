"""Finds a directory's weights: single or sharded in a format of the table `FORMATS`, or T5X's.

A new format is a reader (path -> {name: StoredTensor}) and one line here.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxprompt.t5.msgpack_file import read_msgpack
from jaxprompt.t5.quantized import QuantizedTensor, join
from jaxprompt.t5.t5x import open_t5x
from jaxprompt.t5.torch_bin import read_torch_bin
from jaxprompt.t5.weight_names import Layout
from jaxprompt.tensorfile import StoredTensor, read_safetensors
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
      file: name of the unsharded file; the index of a sharded one adds ".index.json".
      shards: pattern of a sharded one's files.
      read: opens one file.
      layout: how it spells names and stores matrices.
    """

    file: str
    shards: str
    read: Callable[[Path], dict[str, StoredTensor]]
    layout: Layout

    @property
    def index(self) -> str:
        """Name of the file that says which shard holds which tensor."""
        return f"{self.file}.index.json"


FORMATS = (
    Format("model.safetensors", "model-*.safetensors", read_safetensors, Layout.TORCH),
    Format("pytorch_model.bin", "pytorch_model-*.bin", read_torch_bin, Layout.TORCH),
    Format("flax_model.msgpack", "flax_model-*.msgpack", read_msgpack, Layout.FLAX),
    Format("quantized.safetensors", "quantized-*.safetensors", read_safetensors, Layout.T5X),
)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """What a directory stores: what was opened, its layout, every tensor by its name."""

    path: Path | str
    layout: Layout
    tensors: dict[str, StoredTensor]

    @property
    def quantize(self) -> str:
        """How they are quantised: "none", "int8" or "int4" (where some are int8 too)."""
        stored = self.tensors.values()
        kinds = {tensor.kind for tensor in stored if isinstance(tensor, QuantizedTensor)}
        return min(kinds, default="none")


def choose_files(names: Iterable[str]) -> tuple[Format, str] | None:
    """Of the file names of a directory or repository, the one to open; earlier formats win."""
    names = set(names)
    candidates = ((format_, file) for format_ in FORMATS for file in (format_.file, format_.index))
    return next(((format_, file) for format_, file in candidates if file in names), None)


def open_weights(directory: Path | str) -> WeightFiles:
    """Opens the weights of a directory, or of a T5X checkpoint, without reading tensors.

    Raises: UserError if there are none, or if index and shards disagree; both sides are named.
    """
    folder = Path(directory)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    chosen = choose_files(names)
    if chosen is None:
        checkpoint = open_t5x(str(directory))
        if checkpoint is not None:
            return WeightFiles(checkpoint.where, checkpoint.layout, checkpoint.tensors)
        wanted = ", ".join(format_.file for format_ in FORMATS)
        raise UserError(
            f"{directory}: holds no weights ({wanted}, or the index of sharded ones) and is no T5X "
            "checkpoint"
        )
    format_, file = chosen
    path = folder / file
    tensors = format_.read(path) if file == format_.file else _open_shards(path, format_)
    return WeightFiles(path, format_.layout, join(tensors, path))


def name_some(names: Iterable[str]) -> str:
    """The first five names and how many there are, for error messages."""
    names = list(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _open_shards(index: Path, format_: Format) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is no index of shards: {error}") from error
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(f"{index}: shards must lie beside the index, not at {name_some(outside)}")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        opened = format_.read(index.parent / shard)
        elsewhere = [name for name in opened if weight_map.get(name) != shard]
        absent = [name for name, file in weight_map.items() if file == shard and name not in opened]
        if elsewhere:
            raise UserError(f"{index}: {shard} holds {name_some(elsewhere)}, not so in the index")
        if absent:
            raise UserError(
                f"{index}: {shard} lacks {name_some(absent)}, which the index puts there"
            )
        tensors |= opened
    return tensors
