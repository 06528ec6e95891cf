"""Where backbones come from and what a directory holds: names, downloads, config, fingerprint."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxprompt.t5.config import T5Config
from jaxprompt.t5.known import known_backbones, known_config
from jaxprompt.t5.quantized import read_entry
from jaxprompt.t5.weight_files import WeightFiles, choose_files, open_weights
from jaxprompt.t5.weights import TOKENIZER_FILES, embedding_is_output, match
from jaxprompt.typing import UserError


class Packaged(NamedTuple):
    """A backbone inside the package: where it lies, and one line about it."""

    directory: Path
    line: str


MINI = "jaxprompt-mini"
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGED = {
    MINI: Packaged(
        _ASSETS / "mini", "small T5 1.1 of this project, inside the package; needs no network"
    ),
    "jaxprompt-nano": Packaged(
        _ASSETS / "nano", "the same under 2 MB, for tests; embeddings tied; needs no network"
    ),
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_IDENTITY = ("dropout_rate", "model_type")  # of a T5Config: these change no number it computes
_SAMPLES = 64
_HINT = "; `jaxprompt convert` makes one of a T5X checkpoint"


def list_backbones() -> dict[str, str]:
    """Known names -> one line about each. Any other T5 on the hub, and any directory, works too."""
    return {name: packaged.line for name, packaged in PACKAGED.items()} | known_backbones()


def resolve_backbone(name: str, revision: str | None = None) -> Path:
    """The directory of a backbone: a packaged one, a local one, or one downloaded from the hub.

    From the hub come config.json, the tokenizer and one format of weights; what was downloaded
    before is used again, also without a network.

    Args:
      name: one of `PACKAGED`, a directory, or a hub name.
      revision: branch, tag or commit of a hub name; None = main.
    Raises: UserError if there is no such backbone or it cannot be downloaded.
    """
    directory = _local(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} holds no config.json, so it is not a backbone{_HINT}")
        return directory
    _check_not_packaged(name)
    if name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"backbone {name!r} is no directory and no hub name (owner/model){_HINT}")
    return _download(name, revision)


def read_config(directory: Path) -> T5Config:
    """The architecture of a directory: its config.json, and its weights for one question.

    Whether the output layer is the embedding table is read off the weights: since transformers 5,
    `tie_word_embeddings` in a config.json is no longer about that.
    Raises: UserError if config.json is missing or malformed, for damaged weights, or for weights
      that another program quantised.
    """
    path = Path(directory) / "config.json"
    raw = _read_json(path)
    config = T5Config.from_hf(raw, str(path))
    files = open_weights(directory)
    read_entry(raw, files.quantize, path)
    return dataclasses.replace(config, tie_word_embeddings=embedding_is_output(files))


def planned_config(name: str, revision: str | None = None) -> T5Config:
    """The architecture of a backbone whose weights need not be here.

    Of a directory as `read_config`, or without weights what its config.json says; of a listed name
    what `known` has; of any other name on the hub its config.json, downloaded alone.

    Raises: UserError if nothing of this tells it.
    """
    directory = _local(name)
    if directory.is_dir():
        has_weights = choose_files(entry.name for entry in directory.iterdir()) is not None
        return read_config(directory) if has_weights else _stated_config(directory / "config.json")
    _check_not_packaged(name)
    known = known_config(name)
    return known or _stated_config(_downloaded_config(name, revision))


def local_directory(name: str, revision: str | None = None) -> Path | None:
    """Where a backbone's files are on this machine; None if they are not. Asks no network."""
    directory = _local(name)
    if directory.is_dir() or name in PACKAGED or not _HUB_NAME.fullmatch(name):
        return directory if directory.is_dir() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # kinds differ by version; whatever it is, nothing is here
        return None


def fingerprint(directory: Path, config: T5Config | None = None) -> str:
    """Identity of a backbone: 32 hexadecimal digits over its architecture and its weights.

    Of each tensor 64 evenly spaced values count, in our layout and order, so that the same weights
    in any format agree; rounded to bfloat16, so that a bfloat16 copy has its original's fingerprint
    (a float16 copy may not). Values between the samples are not seen: fine-tuning changes the
    fingerprint, changing a few rows of the vocabulary may not. Quantised weights have that of the
    float ones they were made of, which config.json tells.

    Args:
      directory: holds config.json and weights.
      config: if it is already read.
    Raises: UserError if the weights are damaged or do not fit the architecture.
    """
    return fingerprint_of(open_weights(directory), config or read_config(directory))


def fingerprint_of(files: WeightFiles, config: T5Config) -> str:
    """`fingerprint` of opened weights."""
    if files.quantize != "none":
        path = Path(files.path).parent / "config.json"
        return read_entry(_read_json(path), files.quantize, path)
    architecture = {
        key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_IDENTITY
    }
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for path, entries in sorted(match(files, config).items()):
        for weight, stored in entries:
            ours = weight.ours(stored.read(), files.layout)
            picked = np.linspace(0, ours.size - 1, _SAMPLES).round().astype(np.int64)
            values = ours[np.unravel_index(picked, ours.shape)].astype(np.float32)
            digest.update(f"{path} {weight.layer} {weight.shape}".encode())
            digest.update(values.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:32]


def _local(name: str) -> Path:
    """Where a name's files are if it is a packaged backbone or a directory."""
    return PACKAGED[name].directory if name in PACKAGED else Path(name).expanduser()


def _check_not_packaged(name: str) -> None:
    """Called where a name's directory is not there: the hub has none of ours."""
    if name in PACKAGED:
        directory = PACKAGED[name].directory
        raise UserError(f"{directory} is missing from this installation; install jaxprompt again")


def _stated_config(path: Path) -> T5Config:
    return T5Config.from_hf(_read_json(path), str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no config.json, so it is not a backbone") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _downloaded_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    if name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"backbone {name!r} is no directory and no hub name (owner/model){_HINT}")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # by version and by what is wrong with the network
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"backbone {name!r} is not among those that `jaxprompt backbones` lists, and its "
            f"config.json did not come from the hub ({reason}); give a directory that holds it"
        ) from error


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    # the hub's client raises differently by version and by what is wrong with the network
    try:
        listed = HfApi().model_info(name, revision=revision).siblings or ()
        wanted = _wanted_files(file.rfilename for file in listed)
        if wanted is not None:
            return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        reason = "it holds no weights in a format that can be read"
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            cached = None
        if cached is not None and _wanted_files(entry.name for entry in cached.iterdir()):
            return cached
    raise UserError(
        f"backbone {name!r} is no directory and did not come from the hub ({reason}); without a "
        "network give a directory that holds config.json, the tokenizer's files and the weights"
    )


def _wanted_files(names: Iterable[str]) -> list[str] | None:
    """Which files of a repository are needed; None if it lacks config or weights."""
    names = list(names)
    chosen = choose_files(names)
    if chosen is None or "config.json" not in names:
        return None
    format_, file = chosen
    shards = [format_.shards] if file == format_.index else []
    return ["config.json", *TOKENIZER_FILES, file, *shards]
