"""Reads checkpoints that T5X wrote, by itself or through Orbax, without either; for `weight_files`.

A checkpoint is a directory with a tree of names. Each leaf lies in the tree's file or in an array
of its own, decided leaf by leaf. Of what the file says about such an array only the last part of
its path counts: where it was written, and with which driver, is history.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxprompt.arraystore import ArrayStore, is_remote
from jaxprompt.t5.msgpack_file import parse_msgpack
from jaxprompt.t5.weight_names import Layout
from jaxprompt.tensorfile import StoredTensor
from jaxprompt.typing import UserError

VERSIONS = (2, 3)
_ORBAX_ROOT = "_optimizer"  # T5X's train state as Orbax sees it, where T5X hands it over whole
_PLACEHOLDER = "PLACEHOLDER://"
_TREE, _METADATA, _DATABASE = "checkpoint", "_METADATA", "manifest.ocdbt"
# what Orbax calls values that are no arrays
_NO_ARRAYS = ("None", "Dict", "List", "Tuple", "string")
_DAMAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SCANNED = re.compile(r"(?P<stack>encoder|decoder)/(?:layers|(?P=stack))/(?P<rest>.+)")
_MOST_LAYERS = 1000
_STEP = re.compile(r"checkpoint_(\d+)")


@dataclasses.dataclass(frozen=True)
class T5XCheckpoint:
    """An open checkpoint.

    Attributes:
      where: what to call it in messages.
      layout: whether layers are stacked ("scanned") or not.
      tensors: the backbone's, by the names of that layout.
      prompts: tensors of a prompt trained with it, by their names in the tree.
    """

    where: str
    layout: Layout
    tensors: dict[str, StoredTensor]
    prompts: dict[str, StoredTensor]


def open_t5x(location: str) -> T5XCheckpoint | None:
    """Opens a checkpoint, `.../checkpoint_N`, without reading arrays; None if there is none.

    Format versions 2 and 3 are read, and what T5X wrote through Orbax (msgpack or JSON tree; zarr
    directories or one OCDBT database). Stacked layers are given one by one.

    Args:
      location: a local directory or `gs://bucket/path`.
    Raises: UserError for another version, a damaged tree, or an array that is missing or damaged.
    """
    if not is_remote(location) and not Path(location).is_dir():
        return None
    for store in (ArrayStore(location), ArrayStore(location).inside("state")):
        metadata, tree = store.read_file(_METADATA), store.read_file(_TREE)
        where = f"{store.location}/{_METADATA if tree is None else _TREE}"
        if metadata is None and tree is None:
            continue
        version = 0
        try:
            leaves, zarr3 = _json_leaves(metadata) if metadata is not None else ({}, False)
            if tree is not None:  # where there are both, only this one has leaves inside
                leaves, version = _tree_leaves(tree, where)
        except _DAMAGE as error:
            raise UserError(f"{where}: is no T5X checkpoint, or damaged: {error}") from error
        target = {key[7:]: leaf for key, leaf in leaves.items() if key.startswith("target/")}
        if not target:
            raise UserError(f"{where}: is no T5X checkpoint of a model: it has no `target`")
        opened = _opened(store, target, zarr3)
        if version == 2:
            opened = {name: _as_bfloat16(stored) for name, stored in opened.items()}
        return _sorted(where, opened)
    return None


def newest_step(directory: Path) -> Path | None:
    """The `checkpoint_N` of the highest N in a run's directory; None if it has none."""
    found = [entry for entry in directory.iterdir() if _STEP.fullmatch(entry.name)]
    return max(found, key=lambda entry: int(entry.name.split("_")[1]), default=None)


# a leaf: the tensor itself, or the name of its array
_Leaf = StoredTensor | str


def _tree_leaves(content: np.ndarray, where: str) -> tuple[dict[str, _Leaf], int]:
    """The leaves of a msgpack tree by name, and its version (0 = Orbax, which says none)."""
    tree = parse_msgpack(content)
    version = tree.get("version")
    if isinstance(version, StoredTensor):
        version = int(version.read())
    if "optimizer" in tree or version is not None:
        if version not in VERSIONS:
            said = "names no version" if version is None else f"has version {version}"
            raise UserError(f"{where}: {said} of the T5X format; versions 2 and 3 can be read")
        tree = tree["optimizer"]
    elif _ORBAX_ROOT in tree:
        tree = tree[_ORBAX_ROOT]
    return dict(_walk({"target": tree.get("target", {})}, ())), version or 0


def _walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, _Leaf]]:
    for name, value in tree.items():
        below = (*path, name)
        match value:
            case StoredTensor():
                yield "/".join(below), value
            case {"driver": driver, "kvstore": dict(kvstore)}:
                if driver != "zarr":
                    raise ValueError(f"{'/'.join(below)} is stored by driver {driver!r}, not zarr")
                yield "/".join(below), _last(kvstore.get("path") or value["path"])
            case dict():
                yield from _walk(value, below)
            case str() if value.startswith(_PLACEHOLDER):
                yield "/".join(below), _last(value.removeprefix(_PLACEHOLDER))
            case None:
                pass
            case _:
                raise ValueError(f"{'/'.join(below)} is no array")


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _json_leaves(content: np.ndarray) -> tuple[dict[str, _Leaf], bool]:
    """The leaves of Orbax's metadata by name, and whether its arrays are zarr version 3."""
    metadata = json.loads(content.tobytes())
    leaves: dict[str, _Leaf] = {}
    for entry in metadata.get("tree_metadata", {}).values():
        keys = [str(part["key"]) for part in entry["key_metadata"]]
        if entry["value_metadata"].get("value_type") not in _NO_ARRAYS:
            start = 1 if keys[0] in ("optimizer", _ORBAX_ROOT) else 0
            leaves["/".join(keys[start:])] = ".".join(keys)
    return leaves, bool(metadata.get("use_zarr3"))


def _opened(store: ArrayStore, leaves: dict[str, _Leaf], zarr3: bool) -> dict[str, StoredTensor]:
    ocdbt = store.read_file(_DATABASE) is not None
    names = {leaf for leaf in leaves.values() if isinstance(leaf, str)}
    arrays = store.open_arrays(sorted(names), zarr3=zarr3, ocdbt=ocdbt)
    return {k: arrays[leaf] if isinstance(leaf, str) else leaf for k, leaf in leaves.items()}


def _as_bfloat16(stored: StoredTensor) -> StoredTensor:
    """Version 2 wrote bfloat16 as the integers of its bits."""
    if stored.dtype != np.uint16:
        return stored
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    return StoredTensor(stored.shape, bfloat16, lambda: stored.read().view(bfloat16))


def _sorted(where: str, target: dict[str, StoredTensor]) -> T5XCheckpoint:
    """Parts the prompt from the backbone and stacked layers from each other."""
    prompts = {name: stored for name, stored in target.items() if "/prompt/" in name}
    tensors: dict[str, StoredTensor] = {}
    layout, last = Layout.T5X, _LastRead()
    for name in (name for name in target if name not in prompts):
        spelled = name.replace("/relative_posemb/", "/relpos_bias/")
        scanned = _SCANNED.fullmatch(spelled)
        if scanned is not None:
            spelled = f"{scanned['stack']}/layers/{scanned['rest']}"
        if {spelled, f"{spelled}[0]"} & tensors.keys():
            raise UserError(f"{where}: {name} is there under two names")
        if scanned is None:
            tensors[spelled] = _joined(spelled, target[name])
            continue
        layout = Layout.T5X_SCANNED
        if not 1 <= (*target[name].shape, 0, 0)[1] <= _MOST_LAYERS:
            raise UserError(f"{where}: {name} has shape {list(target[name].shape)}, no layers in 1")
        for row, layer in enumerate(_layers(target[name], last)):
            tensors[f"{spelled}[{row}]"] = _joined(spelled, layer)
    return T5XCheckpoint(where, layout, tensors, prompts)


class _LastRead:
    """Keeps the stacked array that was read last: its layers are asked for one after another."""

    def __init__(self):
        self._stored: StoredTensor | None = None
        self._array: np.ndarray | None = None

    def row(self, stored: StoredTensor, layer: int) -> np.ndarray:
        if self._stored is not stored or self._array is None:
            self._array = None  # lets go of the one before first
            self._stored, self._array = stored, stored.read()
        return self._array[:, layer]


def _layers(stored: StoredTensor, last: _LastRead) -> Iterator[StoredTensor]:
    """The layers of an array stacked on axis 1."""
    shape = (stored.shape[0], *stored.shape[2:])
    for layer in range(stored.shape[1]):
        yield StoredTensor(shape, stored.dtype, functools.partial(last.row, stored, layer))


def _joined(name: str, stored: StoredTensor) -> StoredTensor:
    """An attention kernel with heads and head size as one axis, however it was written."""
    if len(stored.shape) != 3 or not name.endswith("/kernel"):
        return stored
    first, middle, last = stored.shape
    shape = (first * middle, last) if name.endswith("/out/kernel") else (first, middle * last)
    return StoredTensor(shape, stored.dtype, lambda: stored.read().reshape(shape))
