"""Prompts in the files of Hugging Face PEFT, read and written: tuned T5s, byte for byte.

What PEFT 0.21 does with each on a T5, docs/importing.md tells. Called by `importing`, `exporting`
and whatever reads a prompt.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxprompt.artifact import BackboneIdentity, PromptArtifact
from jaxprompt.interop.peft_config import (
    KEYS,
    PLACES,
    TASK_TYPE,
    VALUES,
    card,
    check_expressible,
    new_config,
)
from jaxprompt.prompts.base import Sizes
from jaxprompt.t5.torch_bin import read_torch_bin
from jaxprompt.tensorfile import StoredTensor, read_safetensors, safetensors_bytes
from jaxprompt.typing import UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_NAME = "adapter_model.bin"
CARD_NAME = "README.md"
_ROWS, _COLUMNS, _FACTORS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_REST = "rest"  # rows or slots of `prompt_embeddings` that PEFT stores and T5 never sees
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """PEFT's two files, read.

    Attributes:
      where: the directory.
      config: of the config file.
      tensors: float32 arrays by name.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def count(self, key: str, default: int | None = None) -> int:
        """A number of the config, above 0."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}/{CONFIG_NAME}: {key} is {value!r}, not a number above 0")
        return value

    def tensor(self, name: str, *shape: int | None) -> np.ndarray:
        """A tensor of that shape; None = any size."""
        array = self.tensors[name]
        fits = array.ndim == len(shape) and all(
            size == want or want is None for size, want in zip(array.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise UserError(
                f"{self.where}: {name} has shape {array.shape}, {CONFIG_NAME} makes it [{wanted}]"
            )
        return array


@dataclasses.dataclass(frozen=True)
class _Read:
    """What an adapter is here: options of a method, its arrays, what is kept beside them."""

    method: Mapping[str, Any]
    values: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray]
    d_model: int = 0


def read_peft(source: str, task: int | None = None) -> PromptArtifact | None:
    """The prompt of a PEFT adapter of a T5; None if `source` is no such directory.

    Args:
      source: the directory that `save_pretrained` wrote, or one of its two files.
      task: which of the tasks of multitask prompt tuning; None = there is only one.
    Returns: a prompt of a backbone that is known by name and, but for prefixes, width alone. It
      keeps all that `peft_files` needs to give the same bytes back.
    Raises: UserError for an adapter of another kind or another model, or a damaged one.
    """
    place = Path(source)
    if place.name in (CONFIG_NAME, WEIGHTS_NAME, LEGACY_NAME) and place.is_file():
        place = place.parent
    if not (place / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in place.glob(f"*/{CONFIG_NAME}"))
        if inside and not (place / WEIGHTS_NAME).exists():
            raise UserError(
                f"{source} holds PEFT adapters in {', '.join(inside)}: name one of them"
            )
        return None
    text, config = _config(place / CONFIG_NAME)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(
            f"{place}/{CONFIG_NAME}: peft_type {kind} is no prompt that can be imported; "
            f"{', '.join(_KINDS)} are"
        )
    if config.get("task_type") not in (None, TASK_TYPE):
        raise UserError(
            f"{place}/{CONFIG_NAME}: task_type is {config['task_type']}, a prompt of a T5 has "
            f"{TASK_TYPE}"
        )
    names, read = _KINDS[kind]
    stored = _tensors(place, names)
    adapter = _Adapter(str(place), config, {name: _float32(place, name, tensor)
                                            for name, tensor in stored.items()})  # fmt: skip
    if task is not None and kind != "MULTITASK_PROMPT_TUNING":
        raise UserError(f"{place} is {kind}, which has one task; leave out --peft-task")
    found = read(adapter, task)
    dtypes = {name: _dtype_name(tensor) for name, tensor in stored.items()}
    return PromptArtifact(
        method=found.method,
        layout="{prompt}{input}",
        task={},
        backbone=BackboneIdentity(
            str(config.get("base_model_name_or_path") or ""), d_model=found.d_model
        ),
        values=found.values,
        training={"from": f"PEFT {kind}"} | ({} if task is None else {"peft_task": task}),
        origin={"format": "peft", "config": _canonical_or_text(text, config), "dtypes": dtypes},
        kept=found.kept,
        path=source,
    )


def for_decoder(prompt: PromptArtifact, layers: int) -> PromptArtifact:
    """A prompt from `read_peft` for a decoder of fewer layers than PEFT counts.

    PEFT counts the encoder's layers; a shallower decoder uses the first of them.
    """
    if KEYS not in prompt.values or len(prompt.values[KEYS]) <= layers:
        return prompt
    slots_PLHK = _slots(prompt, len(prompt.values[KEYS]))
    values, kept = _prefix_values(slots_PLHK, layers)
    return dataclasses.replace(prompt, values=values, kept=kept)


def peft_files(prompt: PromptArtifact, sizes: Sizes | None = None) -> dict[str, bytes]:
    """The files of a PEFT adapter that does what the prompt does.

    A prompt that came from PEFT gives back the bytes it came from. PEFT loads any of them and saves
    the same config and weights.

    Args:
      sizes: of the backbone, which PEFT wants to know of a soft prompt that is not its own.
    Raises: UserError if PEFT cannot express the prompt, or what is kept of its origin is damaged.
    """
    check_expressible(prompt)
    if prompt.origin or prompt.kept:
        try:
            text, parsed, tensors = _as_it_came(prompt)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, UserError) as error:
            raise UserError(
                f"prompt {prompt.path}: what its `origin` keeps of the PEFT adapter does not fit "
                f"the prompt ({type(error).__name__}: {error}); import the adapter again"
            ) from error
    else:
        parsed = new_config(prompt, sizes)
        text, tensors = _canonical(parsed), _stored(prompt, parsed)
    return {
        CONFIG_NAME: text.encode("utf-8"),
        WEIGHTS_NAME: safetensors_bytes(tensors, "pt"),
        CARD_NAME: card(str(parsed.get("base_model_name_or_path") or "")).encode("utf-8"),
    }


def _as_it_came(prompt: PromptArtifact) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Config, as text and read, and tensors of a prompt from `read_peft`.

    Raises: whatever reading them again does, if someone changed them.
    """
    if prompt.origin["format"] != "peft":
        raise ValueError(f"its format is {prompt.origin['format']!r}, not 'peft'")
    config, dtypes = prompt.origin["config"], prompt.origin["dtypes"]
    text = config if isinstance(config, str) else _canonical(config)
    parsed = json.loads(text)
    tensors = _stored(prompt, parsed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was imported
        _KINDS[parsed["peft_type"]][1](
            _Adapter("origin", parsed, tensors), prompt.training.get("peft_task")
        )
    return (
        text,
        parsed,
        {
            name: np.ascontiguousarray(array, _DTYPES[dtypes[name]])
            for name, array in tensors.items()
        },
    )


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8")
        config = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{path} is no PEFT config: it names no peft_type")
    return text, config


def _tensors(place: Path, names: tuple[str, ...]) -> dict[str, StoredTensor]:
    if (place / WEIGHTS_NAME).exists():
        path, stored = place / WEIGHTS_NAME, read_safetensors(place / WEIGHTS_NAME)
    elif (place / LEGACY_NAME).exists():
        path, stored = place / LEGACY_NAME, read_torch_bin(place / LEGACY_NAME)
    else:
        raise UserError(f"{place} has no {WEIGHTS_NAME}, nor {LEGACY_NAME}")
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{path}: holds no {missing[0]}, only {', '.join(sorted(stored)[:3])}")
    others = sorted(set(stored) - set(names))
    if others:
        raise UserError(
            f"{path}: also holds {', '.join(others[:3])}: weights of the backbone that were tuned "
            "with the prompt cannot be imported"
        )
    return stored


def _dtype_name(tensor: StoredTensor) -> str:
    return tensor.dtype.name if tensor.dtype.name in _DTYPES else "float32"


def _float32(place: Path, name: str, tensor: StoredTensor) -> np.ndarray:
    if tensor.dtype.name not in (*_DTYPES, "float64"):
        raise UserError(f"{place}: {name} is {tensor.dtype.name}, a prompt is float")
    with np.errstate(over="ignore"):
        array = np.array(tensor.read(), np.float32)
    if not array.size or not np.isfinite(array).all():
        raise UserError(f"{place}: {name} is empty or holds numbers that are not finite")
    return array


def _read_rows(adapter: _Adapter, task: int | None) -> _Read:
    """Prompt tuning and P-tuning: the encoder's rows, and the decoder's, which T5 never sees."""
    length, copies = _length(adapter)
    rows_RD = adapter.tensor(_ROWS, length * copies, adapter.config.get("token_dim"))
    rest = {_REST: rows_RD[length:]} if copies > 1 else {}
    return _soft(rows_RD[:length], rest)


def _read_multitask(adapter: _Adapter, task: int | None) -> _Read:
    """Multitask prompt tuning: shared rows times a task's low-rank factors, element by element."""
    length, copies = _length(adapter)
    tasks, ranks = adapter.count("num_tasks", 1), adapter.count("num_ranks", 1)
    rows_RD = adapter.tensor(_ROWS, length * copies, adapter.config.get("token_dim"))
    columns_TRK = adapter.tensor(_COLUMNS, tasks, len(rows_RD), ranks)
    factors_TKD = adapter.tensor(_FACTORS, tasks, ranks, rows_RD.shape[1])
    if (task is None and tasks > 1) or (task or 0) >= tasks:
        asked = "holds prompts of several tasks" if task is None else f"has no task {task}"
        raise UserError(f"{adapter.where} {asked}: choose one of 0 to {tasks - 1} with --peft-task")
    if copies > 1:
        warnings.warn(
            f"{adapter.where}: PEFT's forward also puts {length} rows before the decoder's input, "
            "its generate does not; the prompt does what generate does",
            stacklevel=2,
        )
    product_RD = columns_TRK[task or 0] @ factors_TKD[task or 0]
    return _soft((rows_RD * product_RD)[:length], dict(adapter.tensors))


def _read_prefix(adapter: _Adapter, task: int | None) -> _Read:
    """Prefix tuning: keys and values of the decoder's layers, by PEFT's map of slots."""
    length, copies = _length(adapter)
    if copies != 2:
        raise UserError(
            f"{adapter.where}/{CONFIG_NAME}: num_transformer_submodules is {copies}, with which "
            "PEFT itself cannot run a prefix on a T5"
        )
    layers, heads = adapter.count("num_layers"), adapter.count("num_attention_heads")
    width = adapter.count("token_dim")
    if width % heads:
        raise UserError(
            f"{adapter.where}/{CONFIG_NAME}: token_dim {width} is no multiple of "
            f"num_attention_heads {heads}"
        )
    flat = adapter.tensor(_ROWS, length, 2 * layers * width)
    values, kept = _prefix_values(flat.reshape(length, 2 * layers, heads, -1), layers)
    method = {"name": "p-tuning-v2", "length": length, "places": PLACES, "before_text": True}
    return _Read(method, values, kept)


# peft_type -> its tensors, and what reads them
_KINDS: dict[str, tuple[tuple[str, ...], Callable[[_Adapter, int | None], _Read]]] = {
    "PROMPT_TUNING": ((_ROWS,), _read_rows),
    "P_TUNING": ((_ROWS,), _read_rows),
    "PREFIX_TUNING": ((_ROWS,), _read_prefix),
    "MULTITASK_PROMPT_TUNING": ((_ROWS, _COLUMNS, _FACTORS), _read_multitask),
}


def _length(adapter: _Adapter) -> tuple[int, int]:
    """Slots, and how many times PEFT stores them."""
    copies = adapter.count("num_transformer_submodules", 2)
    return adapter.count("num_virtual_tokens"), copies


def _soft(rows_PD: np.ndarray, kept: Mapping[str, np.ndarray]) -> _Read:
    length, d_model = rows_PD.shape
    return _Read({"name": "soft", "length": length}, {"prompt": rows_PD}, kept, d_model)


def _slot_map(layers: int, stored_layers: int) -> list[tuple[int, int]]:
    """Which of 2 L stored slots are a decoder layer's keys and values.

    PEFT means slots 2 l and 2 l + 1 for layer l, but for an encoder-decoder repeats all of them and
    gives each layer four in a row: keys and values of itself and, never used, of cross-attention.
    """
    slots = 2 * stored_layers
    return [(4 * layer % slots, (4 * layer + 1) % slots) for layer in range(layers)]


def _prefix_values(slots_PLHK: np.ndarray, layers: int) -> tuple[dict, dict]:
    """The prompt's arrays [N, P, H, K], and the slots that no layer uses."""
    slots = slots_PLHK.shape[1]
    pairs = np.array(_slot_map(layers, slots // 2))
    keys, values = (np.moveaxis(slots_PLHK[:, column], 0, 1) for column in pairs.T)
    unused = sorted(set(range(slots)) - set(pairs.ravel().tolist()))
    kept = {_REST: slots_PLHK[:, unused]} if unused else {}
    return {KEYS: keys, VALUES: values}, kept


def _slots(prompt: PromptArtifact, stored_layers: int) -> np.ndarray:
    """Inverse of `_prefix_values`; slots that nothing is known of are 0."""
    layers, length, heads, size = prompt.values[KEYS].shape
    slots = np.zeros((length, 2 * stored_layers, heads, size), np.float32)
    written: dict[int, int] = {}
    for layer, pair in enumerate(_slot_map(layers, stored_layers)):
        for slot, name in zip(pair, (KEYS, VALUES), strict=True):
            array = prompt.values[name][layer]
            if slot in written and not np.array_equal(slots[:, slot], array):
                raise UserError(
                    f"PEFT gives layers {written[slot]} and {layer} of a T5 decoder of "
                    f"{stored_layers} layers the same prefix, this prompt gives each its own"
                )
            slots[:, slot] = array
            written[slot] = layer
    unused = sorted(set(range(2 * stored_layers)) - set(written))
    if _REST in prompt.kept:
        slots[:, unused] = prompt.kept[_REST]
    return slots


def _stored(prompt: PromptArtifact, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """PEFT's tensors of a prompt."""
    if _COLUMNS in prompt.kept:
        return dict(prompt.kept)
    if prompt.method["name"] == "soft":
        parts = [prompt.values["prompt"], *prompt.kept.values()]
        return {_ROWS: np.concatenate(parts)}
    return {_ROWS: _slots(prompt, config["num_layers"]).reshape(prompt.method["length"], -1)}


def _canonical(config: Mapping[str, Any]) -> str:
    """As PEFT writes it."""
    return json.dumps(config, indent=2, sort_keys=True)


def _canonical_or_text(text: str, config: Mapping[str, Any]) -> Any:
    """The config, or its text where writing it again would not give that."""
    plain = text.isascii() and "NaN" not in text and "Infinity" not in text and "\\u" not in text
    return config if plain and _canonical(config) == text else text
