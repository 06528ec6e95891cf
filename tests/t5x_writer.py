"""Checkpoints as T5X writes them, made of our parameters: msgpack tree, arrays in zarr, or Orbax.

Names, shapes and spec dictionaries are those of t5x/checkpoints.py and of the two networks in
t5x/examples (t5: a layer after the other; scalable_t5: layers stacked on axis 1, heads apart).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import tensorstore

from jaxprompt.trees import flatten, unflatten

Flat = dict[str, np.ndarray]


def t5x_tree(params: Mapping[str, Any]) -> Flat:
    """`target` of the plain network: kernels [in, out] with heads joined, one entry a layer."""
    flat: Flat = {}
    for path, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if "/layers/" not in path:
            flat[path] = array
            continue
        for number, layer in enumerate(array):
            if path.endswith("out/kernel"):
                heads, size, width = layer.shape
                layer = layer.reshape(heads * size, width)
            elif layer.ndim == 3:
                layer = layer.reshape(len(layer), -1)
            flat[path.replace("/layers/", f"/layers_{number}/")] = layer
    return flat


def scanned_tree(params: Mapping[str, Any], stack: str = "layers") -> Flat:
    """`target` of a scanned network; `stack` is "layers", or "same" for encoder/encoder/..."""
    flat: Flat = {}
    for path, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if "/layers/" in path:
            array = np.moveaxis(array, 0, 1)
            side = path.split("/")[0]
            path = path.replace("/layers/", f"/{side if stack == 'same' else stack}/")
            if stack == "layers":
                path = path.replace("relpos_bias", "relative_posemb")
        flat[path] = array
    return flat


def _write_array(directory: Path, name: str, array: np.ndarray, driver: str) -> dict[str, Any]:
    """Writes one array in chunks that do not divide it; returns what T5X records of it."""
    chunks = [max(1, size // 2 + size % 2) if size > 3 else size for size in array.shape]
    dtype = {"bfloat16": "bfloat16"}.get(array.dtype.name, array.dtype.str)
    compressor = {"id": "gzip", "level": 1}
    metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": compressor}
    place = {"driver": "file", "path": f"{directory / name}/"}
    spec = {"driver": "zarr", "kvstore": place, "metadata": metadata | {"dtype": dtype}}
    tensorstore.open(spec, create=True, open=True).result().write(array).result()
    kvstore: dict[str, Any] = {"driver": driver, "path": name}
    if driver == "gcs":
        kvstore["bucket"] = "t5x-dummy-bucket"
    if driver == "old":  # tensorstore before 0.1.14
        return {"driver": "zarr", "kvstore": {"driver": "file"}, "path": name, "metadata": metadata}
    return {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}


def write_t5x(
    directory: Path,
    target: Flat,
    *,
    version: int | None = 3,
    inline: Callable[[str], bool] = lambda name: name.endswith(("scale", "rel_embedding")),
    driver: str = "gfile",
) -> Path:
    """A checkpoint of T5X's own; leaves that `inline` says lie in the tree's file."""
    directory.mkdir(parents=True, exist_ok=True)
    leaves: dict[str, Any] = {}
    for name, array in target.items():
        if version == 2 and array.dtype == ml_dtypes.bfloat16:
            array = array.view(np.uint16)
        if inline(name):
            leaves[name] = array
        else:
            file = "target." + name.replace("/", ".")
            leaves[name] = _write_array(directory, file, np.ascontiguousarray(array), driver)
    # as T5X has them: slots of trained parameters, None where nothing is trained
    moments = {"v": np.float32(3), "v_row": np.zeros(1, np.float32)}
    param_states = {
        name: moments if number % 2 else None for number, name in enumerate(sorted(target))
    }
    state = {"step": np.int32(-7), "param_states": unflatten(param_states)}
    state |= {"numbers": {"a": -3, "b": -300, "c": -(2**40), "d": 0.5, "e": 2**40, "f": True}}
    tree: dict[str, Any] = {"optimizer": {"target": unflatten(leaves), "state": state}}
    if version is not None:
        tree["version"] = version
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    return directory


def write_orbax(directory: Path, target: Flat, *, whole: bool = False, **options: Any) -> Path:
    """A checkpoint that T5X wrote through Orbax; `whole`: its train state as it is."""
    import orbax.checkpoint

    handler = orbax.checkpoint.PyTreeCheckpointHandler(**options)
    tree = {"state": {"step": np.int32(3), "param_states": {}}, "target": unflatten(target)}
    if whole:
        tree = {"_optimizer": tree, "flax_mutables": None, "params_axes": None}
    with orbax.checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory / "state", tree)
    return directory


def write_old_orbax(directory: Path, target: Flat) -> Path:
    """The same by the Orbax of its first years: a msgpack tree of placeholders; one leaf inside."""
    state = directory / "state"
    leaves: dict[str, Any] = {}
    for name, array in target.items():
        file = "_optimizer.target." + name.replace("/", ".")
        _write_array(state, file, np.ascontiguousarray(array), "file")
        inside = name == "encoder/encoder_norm/scale"
        leaves[name] = array if inside else f"PLACEHOLDER://{file}"
    step = "PLACEHOLDER://_optimizer.state.step"
    optimizer = {"target": unflatten(leaves), "state": {"step": step}}
    tree = {"_optimizer": optimizer, "flax_mutables": None, "params_axes": None}
    (state / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    (state / "_METADATA").write_text('{"tree_metadata": {}, "use_zarr3": false}')
    return directory
