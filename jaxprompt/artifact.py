"""The prompt artifact, the directory a user keeps: `prompt_config.json` and `prompt.safetensors`.

Written by train, export and import, read by everything that uses a prompt. The only file that knows
its format. Also reads the bare arrays that google-research/prompt-tuning released.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprompt import files
from jaxprompt.tensorfile import parse_safetensors, safetensors_bytes
from jaxprompt.typing import UserError

FORMAT_VERSION = 1
CONFIG_NAME = "prompt_config.json"
WEIGHTS_NAME = "prompt.safetensors"
_KEPT = "origin/"  # in front of the names of kept tensors in the weights file
_NPY_MAGIC = b"\x93NUMPY"
_FLOATS = ("float32", "float16", "float64")  # what safetensors reads back without torch


@dataclasses.dataclass(frozen=True)
class BackboneIdentity:
    """Which frozen T5 a prompt belongs to; empty or 0 where it is not known.

    Attributes:
      name: hub name or directory, as the user gave it.
      fingerprint: what `t5.weights.fingerprint` says of its weights.
      d_model: width of its embeddings.
      vocab_size: rows of its embedding.
    """

    name: str = ""
    fingerprint: str = ""
    d_model: int = 0
    vocab_size: int = 0


@dataclasses.dataclass(frozen=True)
class PromptArtifact:
    """All that predict needs beside the backbone.

    Attributes:
      method: the method's options, `{"name": "soft", "length": 20, ...}`.
      layout: where slots stand, `{prompt}{input}`.
      task: the whole task: templates, labels, candidates, metrics; empty if not known.
      backbone: the backbone it was trained with.
      values: the method's parameters by name, on the host; float.
      lengths: `max_input_length` and `max_target_length` of its training, in tokens.
      training: provenance: recipe, steps, seed, metrics, version. Not needed to predict.
      origin: of a prompt from another program's files: what those said beside the values, so that
        export gives them back. Nothing else reads it.
      kept: and the tensors that those held beside the values, by name.
      path: where it was read from; not stored.
    """

    method: Mapping[str, Any]
    layout: str
    task: Mapping[str, Any]
    backbone: BackboneIdentity
    values: Mapping[str, np.ndarray]
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: str = dataclasses.field(default="", compare=False)


def save_artifact(directory: files.PathLike, artifact: PromptArtifact) -> Path:
    """Writes an artifact, atomically, in place of the one that may stand there.

    The same artifact gives the same bytes.

    Args:
      directory: created if missing; an artifact there is replaced as a whole.
      artifact: what to write; every value finite.
    Returns: the directory.
    Raises: UserError if it cannot be written, or if the directory holds anything but an artifact.
    """
    target = Path(directory)
    if target.is_dir():
        others = sorted({entry.name for entry in target.iterdir()} - {CONFIG_NAME, WEIGHTS_NAME})
        if others:
            raise UserError(
                f"will not write a prompt over {target}: it also holds {', '.join(others[:3])}; "
                "name an empty or a new directory"
            )
    stored = {**artifact.values, **{_KEPT + name: kept for name, kept in artifact.kept.items()}}
    values = {name: np.array(value, order="C") for name, value in sorted(stored.items())}
    for name, value in values.items():
        _check_value(f"value {name!r} of the prompt", value)
    weights = safetensors_bytes(values)
    config = {
        "format_version": FORMAT_VERSION,
        "method": dict(artifact.method),
        "layout": artifact.layout,
        "task": dict(artifact.task),
        "backbone": dataclasses.asdict(artifact.backbone),
        "lengths": dict(artifact.lengths),
        "training": dict(artifact.training),
        "values": {
            name: {"dtype": value.dtype.name, "shape": list(value.shape)}
            for name, value in values.items()
        },
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if artifact.origin:
        config["origin"] = dict(artifact.origin)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with files.replacing_directory(target) as temporary, files.writing(target):
        (temporary / WEIGHTS_NAME).write_bytes(weights)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return target


def load_artifact(path: files.PathLike) -> PromptArtifact:
    """Reads an artifact, or a bare soft prompt saved by numpy.

    Args:
      path: the artifact's directory; or a file of numpy's format, whatever it is called, with one
        float array [P, D]: what google-research/prompt-tuning released and saves. A bare array
        becomes a soft prompt in front of the input, float32, of an unknown backbone.
    Raises: UserError that says what is wrong with it and where.
    """
    place = files.current_directory(path)
    if place.is_dir():
        return _load_directory(place, os.fspath(path))
    if place.name in (CONFIG_NAME, WEIGHTS_NAME) and place.is_file():
        return _load_directory(place.parent, os.fspath(place.parent))
    if place.is_file():
        return _load_npy(place)
    raise UserError(
        f"no prompt at {path}: give the directory that holds {CONFIG_NAME}, or a .npy file"
    )


def soft_prompt(array: np.ndarray, what: str, path: str) -> PromptArtifact:
    """A bare array [P, D] as a soft prompt in front of the input, float32, of unknown backbone.

    Args:
      what: the array, in messages.
      path: where it came from.
    Raises: UserError if it is no finite float array of two axes.
    """
    if array.ndim != 2 or array.dtype.name not in (*_FLOATS, "bfloat16"):
        raise UserError(
            f"{what} holds a {array.dtype.name} array of shape {array.shape}; a prompt is a float "
            "array [slots, d_model]"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    _check_value(what, array)
    length, d_model = array.shape
    return PromptArtifact(
        method={"name": "soft", "length": length},
        layout="{prompt}{input}",
        task={},
        backbone=BackboneIdentity(d_model=d_model),
        values={"prompt": array},
        path=path,
    )


def check_backbone(
    artifact: PromptArtifact,
    name: str,
    fingerprint: str,
    d_model: int,
    allow_other: bool = False,
) -> None:
    """Refuses a backbone that the prompt was not trained with.

    A backbone is the same if its fingerprint is; names may differ (hub name, directory). A prompt
    of unknown backbone, as a bare array is, only has to fit.

    Args:
      artifact: the prompt.
      name: the backbone's name, for the message.
      fingerprint: the backbone's fingerprint.
      d_model: the backbone's width.
      allow_other: accept another backbone of the same width.
    Raises: UserError that names both sides.
    """
    trained = artifact.backbone
    prompt = f"prompt {artifact.path}" if artifact.path else "the prompt"
    if trained.d_model and trained.d_model != d_model:
        raise UserError(f"{prompt} has d_model {trained.d_model}, backbone {name} has {d_model}")
    if trained.fingerprint and trained.fingerprint != fingerprint and not allow_other:
        raise UserError(
            f"{prompt} was trained with backbone {trained.name} (fingerprint "
            f"{trained.fingerprint[:12]}), this is {name} (fingerprint {fingerprint[:12]}): use "
            "the backbone it was trained with, or allow another one with --allow-other-backbone"
        )


def _load_directory(directory: Path, shown: str) -> PromptArtifact:
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    if not config_path.exists() and (directory / "adapter_config.json").exists():
        raise UserError(
            f"{shown} is a PEFT adapter, not a prompt artifact: bring it in with `jaxprompt import "
            f"{shown} OUT --backbone B` and name OUT"
        )
    try:
        config = json.loads(_read(config_path, shown).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path} is damaged: not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
        raise UserError(f"{config_path} is damaged: format_version is not a number")
    if config["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{config_path} has format_version {config['format_version']}, this jaxprompt reads up "
            f"to {FORMAT_VERSION}: use a newer jaxprompt"
        )
    for key, kind in _KINDS.items():
        if not isinstance(config.get(key), kind):
            raise UserError(
                f"{config_path}: {key} should be a {kind.__name__} and is {config.get(key)!r}"
            )
    if not isinstance(config.get("origin", {}), dict):
        raise UserError(f"{config_path}: origin should be a dict and is {config['origin']!r}")
    weights = _read(weights_path, shown)
    if hashlib.sha256(weights).hexdigest() != config["weights_sha256"]:
        raise UserError(
            f"{weights_path} is damaged or of another prompt: its {len(weights)} bytes do not have "
            f"the sha256 that {CONFIG_NAME} names"
        )
    stored = parse_safetensors(np.frombuffer(weights, np.uint8), f"{weights_path} is damaged")
    values = {name: np.array(tensor.read()) for name, tensor in stored.items()}
    found = {
        name: {"dtype": value.dtype.name, "shape": list(value.shape)}
        for name, value in values.items()
    }
    if found != config["values"]:
        raise UserError(f"{weights_path} holds {found}, {CONFIG_NAME} names {config['values']}")
    for name, value in values.items():
        _check_value(f"value {name!r} of {weights_path}", value)
    return PromptArtifact(
        method=config["method"],
        layout=config["layout"],
        task=config["task"],
        backbone=_backbone(config["backbone"], config_path),
        values={name: value for name, value in values.items() if not name.startswith(_KEPT)},
        lengths=config["lengths"],
        training=config["training"],
        origin=config.get("origin", {}),
        kept={
            name.removeprefix(_KEPT): value
            for name, value in values.items()
            if name.startswith(_KEPT)
        },
        path=shown,
    )


_KINDS: dict[str, type] = {
    "method": dict,
    "layout": str,
    "task": dict,
    "backbone": dict,
    "lengths": dict,
    "training": dict,
    "values": dict,
    "weights_sha256": str,
}


def _backbone(fields: dict[str, Any], config_path: Path) -> BackboneIdentity:
    known = {field.name: field.type for field in dataclasses.fields(BackboneIdentity)}
    for name, kind in known.items():
        if not isinstance(kind, type) or not isinstance(fields.get(name), kind):
            raise UserError(f"{config_path}: backbone.{name} is {fields.get(name)!r}")
    return BackboneIdentity(**{name: fields[name] for name in known})


def _load_npy(path: Path) -> PromptArtifact:
    with path.open("rb") as stream:
        if stream.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise UserError(
                f"{path} is no prompt: neither a directory with {CONFIG_NAME} nor a numpy array"
            )
        stream.seek(0)
        try:
            array = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return soft_prompt(array, str(path), str(path))


def _read(path: Path, shown: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{shown} is no prompt: it has no {path.name}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _check_value(what: str, value: np.ndarray) -> None:
    if value.dtype.name not in _FLOATS:
        raise UserError(f"{what} is {value.dtype.name}; a prompt is one of {', '.join(_FLOATS)}")
    if not math.prod(value.shape):
        raise UserError(f"{what} is empty, of shape {value.shape}")
    if not np.isfinite(value).all():
        raise UserError(f"{what} holds numbers that are not finite")
