"""Finds a directory's weights, single or sharded, in any format of the table `FORMATS`.

A new format is a reader (path -> {name: StoredTensor}) and one line here.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxprompt.t5.msgpack_file import read_msgpack
from jaxprompt.t5.torch_bin import read_torch_bin
from jaxprompt.tensorfile import StoredTensor, read_safetensors
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
      file: name of the unsharded file; the index of a sharded one adds ".index.json".
      shards: pattern of a sharded one's files.
      read: opens one file.
      flax: whether names and matrices are Flax's ("a/b/kernel", [in, out]) or torch's
        ("a.b.weight", [out, in]).
    """

    file: str
    shards: str
    read: Callable[[Path], dict[str, StoredTensor]]
    flax: bool

    @property
    def index(self) -> str:
        """Name of the file that says which shard holds which tensor."""
        return f"{self.file}.index.json"


FORMATS = (
    Format("model.safetensors", "model-*.safetensors", read_safetensors, flax=False),
    Format("pytorch_model.bin", "pytorch_model-*.bin", read_torch_bin, flax=False),
    Format("flax_model.msgpack", "flax_model-*.msgpack", read_msgpack, flax=True),
)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """What a directory stores: the file that was opened, its format, every tensor by its name."""

    path: Path
    format: Format
    tensors: dict[str, StoredTensor]


def choose_files(names: Iterable[str]) -> tuple[Format, str] | None:
    """Of the file names of a directory or repository, the one to open; earlier formats win."""
    names = set(names)
    candidates = ((format_, file) for format_ in FORMATS for file in (format_.file, format_.index))
    return next(((format_, file) for format_, file in candidates if file in names), None)


def open_weights(directory: Path) -> WeightFiles:
    """Opens the weights of a directory without reading tensors.

    Raises: UserError if there are none, or if index and shards disagree; both sides are named.
    """
    directory = Path(directory)
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    chosen = choose_files(names)
    if chosen is None:
        wanted = ", ".join(format_.file for format_ in FORMATS)
        raise UserError(f"{directory}: holds no weights ({wanted}, or the index of sharded ones)")
    format_, file = chosen
    path = directory / file
    tensors = format_.read(path) if file == format_.file else _open_shards(path, format_)
    return WeightFiles(path, format_, tensors)


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
