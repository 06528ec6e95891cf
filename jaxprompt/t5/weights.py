"""Stored weights to the stacked parameter tree and back: `load_params`, `save_hf`, `match`.

Loading is closed on both sides: every key there is and every key that is wanted is accounted for,
or it stops and names them.
"""

import collections
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.files import replacing_directory, writing
from jaxprompt.quantize import is_quantized
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.placing import place
from jaxprompt.t5.quantized import Piece, quantized_piece
from jaxprompt.t5.weight_files import WeightFiles, name_some, open_weights
from jaxprompt.t5.weight_names import Layout, Weight, spell, weight_table
from jaxprompt.tensorfile import StoredTensor, reading_ahead, write_safetensors
from jaxprompt.trees import flatten, map_with_path
from jaxprompt.typing import ArrayTree, UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
HOST_BYTES = 64 * 2**20
SHARD_BYTES = 5 * 10**9

# copies of the embedding table; the first that is there is read, the others must equal it
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
T5X_TABLE, T5X_HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
_HEAD_NAMES = {
    Layout.TORCH: "lm_head.weight",
    Layout.FLAX: "lm_head/kernel",
    Layout.T5X: T5X_HEAD,
    Layout.T5X_SCANNED: T5X_HEAD,
}
# left over from a bug of early transformers: a bias of cross-attention that was never used
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def match(files: WeightFiles, config: T5Config) -> dict[str, list[tuple[Weight, StoredTensor]]]:
    """Gives every parameter its stored tensors: path -> one entry, or one for each layer.

    Raises: UserError naming keys that are missing, unknown, of another shape or not of numbers, and
      copies of the embedding table (or of a tied output layer) that differ from it.
    """
    layout, tensors = files.layout, dict(files.tensors)
    for name in IGNORED:
        tensors.pop(spell(name, "embedding") if layout is Layout.FLAX else name, None)
    table = weight_table(config)
    copies = _embedding_copies(tensors, layout, config.tie_word_embeddings)
    found: dict[str, list[tuple[Weight, StoredTensor]]] = collections.defaultdict(list)
    missing, misfits = [], []
    for weight in table:
        name = weight.stored_name(layout)
        is_table = weight.name == EMBEDDING_NAMES[0] and copies
        stored = copies[0][1] if is_table else tensors.pop(name, None)
        if stored is None:
            missing.append(name)
            continue
        expected = weight.stored_shape(layout)
        if stored.shape != expected:
            misfits.append(f"{name} {list(stored.shape)} instead of {list(expected)}")
        elif not jnp.issubdtype(stored.dtype, jnp.floating):
            misfits.append(f"{name} of {stored.dtype} instead of floating point numbers")
        found[weight.path].append((weight, stored))
    problems = {
        "missing": missing,
        "unknown": list(tensors),
        "of the wrong kind": misfits,
        "unlike the embedding table it should equal": [
            name for name, copy in copies[1:] if not _equal(copy, copies[0][1])
        ],
    }
    told = [f"{kind}: {name_some(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"{files.path}: does not fit its {_described(layout)}; {'; '.join(told)}")
    return dict(found)


def embedding_table(files: WeightFiles) -> StoredTensor:
    """The stored embedding table, whichever of its names it has.

    Raises: UserError if there is none.
    """
    copies = _embedding_copies(dict(files.tensors), files.layout, tied=False)
    if not copies:
        raise UserError(f"{files.path}: has no embedding table, so it is no T5 that can be read")
    return copies[0][1]


def embedding_is_output(files: WeightFiles) -> bool:
    """Whether the embedding table makes the logits: no output layer is stored, or an equal one."""
    if files.quantize != "none":  # written with an output layer only where it is one of its own
        return T5X_HEAD not in files.tensors
    copies = _embedding_copies(dict(files.tensors), files.layout, tied=True)
    if not copies or copies[-1][0] != _HEAD_NAMES[files.layout]:
        return True
    return _equal(copies[0][1], copies[-1][1])


def load_params(
    directory: Path,
    config: T5Config,
    *,
    dtype: str = "float32",
    quantize: str = "none",
    shardings: ArrayTree | None = None,
    host_bytes: int = HOST_BYTES,
) -> dict:
    """Loads a directory's weights, tensor by tensor, into (sharded) device arrays.

    Files stay memory-mapped; a process that is alone has the next tensors fetched while it works
    on one. The host holds one block of rows (layers) at a time in the target dtype and layout: at
    most `host_bytes`, or one layer's tensor if that is larger; on CPU it fills the arrays where
    they stay. Each process reads the bytes of its own shards only, and of what several hold its
    part (`sharding.read_sharding`). Of T5X, whose arrays are compressed, whole tensors are read,
    one at a time. What is quantised on the way is quantised on the host, some outputs of a layer's
    tensor at a time; scales take all inputs, so a process reads all rows of its columns.

    Args:
      directory: holds safetensors, torch .bin or Flax msgpack weights, single or sharded, or is a
        T5X checkpoint.
      config: what the weights must fit.
      dtype: of the arrays that are not quantised.
      quantize: "int8" or "int4": matrices become QArrays (see `quantize`); of a directory whose
        weights are quantised so, they are what is stored there.
      shardings: a tree like `param_specs` with a sharding for each; None = the first device.
      host_bytes: bound on the copy that the host makes.
    Returns: nested dict of arrays as `t5.layers.param_specs` describes it.
    Raises: UserError if files are damaged or do not fit the architecture, see `match`.
    """
    files = open_weights(directory)
    matched = match(files, config)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {} if shardings is None else flatten(shardings)
    stored = [tensor for found in matched.values() for _, tensor in found]
    # where several processes share the work each reads parts: nothing is fetched beyond them
    ahead = reading_ahead if jax.process_count() == 1 else contextlib.nullcontext
    with ahead(stored) as tensors:
        following = iter(tensors)
        sources = {
            path: [(weight, next(following)) for weight, _ in found]
            for path, found in matched.items()
        }
        return map_with_path(
            lambda path, leaf: place(
                sources[path], files.layout, leaf, places.get(path, alone), host_bytes
            ),
            abstract_params(config, dtype, quantize),
        )


def read_embedding(directory: Path, config: T5Config) -> np.ndarray:
    """The embedding table of a directory's weights and nothing else, float32 [V, D] on the host.

    Raises: UserError as `load_params`.
    """
    files = open_weights(directory)
    ((weight, stored),) = match(files, config)["token_embedder/embedding"]
    return weight.ours(stored.read(), files.layout).astype(np.float32)


def save_hf(
    directory: Path,
    params: ArrayTree,
    config: T5Config,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers` and `load_params` both load; atomic.

    Args:
      directory: takes the place of whatever is there.
      params: nested dict of arrays as `load_params` gives it, not quantised.
      config: goes into config.json.
      tokenizer_dir: its tokenizer files are copied.
      dtype: of the stored tensors, "float32" or "bfloat16".
      shard_bytes: more than this is cut into several files with an index, as on the hub; also what
        the host holds at most while writing.
    Raises: UserError if parameters and config disagree or the disk is full.
    """
    flat = _checked(params, config)

    def fetch(weight: Weight) -> np.ndarray:
        leaf = flat[weight.path]
        array = leaf if weight.layer is None else _take_row(leaf, weight.layer)
        return weight.theirs(np.asarray(array))

    told = config.to_hf() | {"dtype": dtype}
    _write_hf(directory, told, _torch_pieces(config, fetch, dtype), tokenizer_dir, shard_bytes)


def convert_hf(
    directory: Path,
    files: WeightFiles,
    config: T5Config,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """`save_hf` straight from stored weights of any format, tensor by tensor; no device is used.

    Args:
      quantization: of `quantized.config_entry`: matrices are written as it says, under T5X's names.
    Raises: UserError if files are damaged or do not fit the architecture, or the disk is full.
    """
    stored = {
        weight.name: tensor for found in match(files, config).values() for weight, tensor in found
    }

    def fetch(weight: Weight) -> np.ndarray:
        return weight.ours(stored[weight.name].read(), files.layout)

    told = config.to_hf() | {"dtype": dtype}
    if quantization is None:
        pieces = _torch_pieces(config, lambda weight: weight.theirs(fetch(weight)), dtype)
    else:
        told["quantization_config"] = dict(quantization)
        leaves = flatten(abstract_params(config, dtype, quantization["quantize"]))
        pieces = [
            quantized_piece(weight, stored[weight.name], files.layout, leaves[weight.path])
            for weight in weight_table(config)
        ]
    _write_hf(directory, told, pieces, tokenizer_dir, shard_bytes)


def _torch_pieces(
    config: T5Config, fetch: Callable[[Weight], np.ndarray], dtype: str
) -> list[Piece]:
    """Every weight under torch's name; `fetch` gives it in torch's layout."""
    kind = jnp.dtype(dtype)

    def piece(weight: Weight) -> Piece:
        size = math.prod(weight.shape) * kind.itemsize
        return Piece(
            {weight.name: size}, lambda: {weight.name: np.ascontiguousarray(fetch(weight), kind)}
        )

    return [piece(weight) for weight in weight_table(config)]


def _write_hf(
    directory: Path,
    config_json: Mapping[str, Any],
    pieces: list[Piece],
    tokenizer_dir: Path | None,
    shard_bytes: int,
) -> None:
    stem = "quantized" if "quantization_config" in config_json else "model"
    shards = _cut(stem, pieces, shard_bytes)
    with replacing_directory(directory) as temporary, writing(directory):
        _write_json(temporary / "config.json", config_json)
        for name in TOKENIZER_FILES:
            if tokenizer_dir is not None and (Path(tokenizer_dir) / name).exists():
                shutil.copy2(Path(tokenizer_dir) / name, temporary / name)
        for file, inside in shards.items():
            tensors = {name: array for piece in inside for name, array in piece.make().items()}
            write_safetensors(temporary / file, tensors)
            del tensors  # before the next are there
        if len(shards) > 1:
            places = {
                name: file for file, inside in shards.items() for piece in inside
                for name in piece.sizes
            }  # fmt: skip
            total = sum(piece.size for piece in pieces)
            index = {"metadata": {"total_size": total}, "weight_map": places}
            _write_json(temporary / f"{stem}.safetensors.index.json", index)


def _embedding_copies(
    tensors: dict[str, StoredTensor], layout: Layout, tied: bool
) -> list[tuple[str, StoredTensor]]:
    """Takes out every copy of the embedding table, the one to read first; all in its layout."""
    names = {
        Layout.TORCH: EMBEDDING_NAMES,
        Layout.FLAX: [spell(name, "embedding") for name in EMBEDDING_NAMES],
    }.get(layout, [T5X_TABLE])
    copies = [(name, tensors.pop(name)) for name in names if name in tensors]
    head = _HEAD_NAMES[layout]
    if tied and head in tensors:
        stored = tensors.pop(head)
        copies.append((head, stored if layout is Layout.TORCH else stored.transposed()))
    return copies


def _described(layout: Layout) -> str:
    """What the weights were held against, for error messages."""
    return "config.json" if layout in (Layout.TORCH, Layout.FLAX) else "architecture"


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Bitwise equality, a block of rows at a time; copies of one storage need no look."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = first.read(), second.read()
    if (one.ctypes.data, one.strides) == (other.ctypes.data, other.strides):
        return True
    rows = max(1, HOST_BYTES * len(one) // max(1, one.nbytes))
    starts = range(0, len(one), rows)
    return all(np.array_equal(one[at : at + rows], other[at : at + rows]) for at in starts)


@jax.jit
def _take_row(stacked: jax.Array, row: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, row, axis=0, keepdims=False)


def _checked(params: ArrayTree, config: T5Config) -> dict[str, Any]:
    """The parameters by path, after seeing that the config describes exactly these."""
    flat = flatten(params)
    if any(is_quantized(leaf) for leaf in flat.values()):
        raise UserError(
            "quantised parameters are not saved; `jaxprompt convert --quantize` does it"
        )
    wanted = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    given = {path: leaf.shape for path, leaf in flat.items()}
    differing = sorted(
        path for path in wanted.keys() | given.keys() if wanted.get(path) != given.get(path)
    )
    if differing:
        raise UserError(f"parameters and config differ in {name_some(differing)}")
    return flat


def _cut(stem: str, pieces: list[Piece], shard_bytes: int) -> dict[str, list[Piece]]:
    """File name -> its pieces; runs of at most `shard_bytes`, or one piece if that is larger."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{n:05}-of-{count:05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
