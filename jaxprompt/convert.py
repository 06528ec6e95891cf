"""`jaxprompt convert`: any backbone that can be read, T5X too, to the Hugging Face layout."""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxprompt.arraystore import is_remote
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.quantize import check_kind
from jaxprompt.t5.backbones import fingerprint, fingerprint_of, read_config, resolve_backbone
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.quantized import config_entry
from jaxprompt.t5.t5x import newest_step
from jaxprompt.t5.t5x_config import derive_config
from jaxprompt.t5.weight_files import WeightFiles, open_weights
from jaxprompt.t5.weight_names import Layout, weight_table
from jaxprompt.t5.weights import convert_hf, embedding_is_output, embedding_table
from jaxprompt.typing import UserError

_SENTENCEPIECE = ".model"


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt convert SOURCE OUT`, and what `arguments.convert_arguments` adds."""
    told = convert_backbone(
        args.source, args.output, args.config, args.tokenizer, args.dtype, args.quantize
    )
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        kind = "" if told["quantize"] == "none" else f"{told['quantize']} and "
        print(
            f"{told['output']}: {told['parameters']:,} parameters, {told['layers'][0]} + "
            f"{told['layers'][1]} layers, d_model {told['d_model']}, {told['num_heads']} heads of "
            f"{told['d_kv']}, {kind}{told['dtype']}, fingerprint {told['fingerprint']}"
        )


def convert_backbone(
    source: str,
    output: str,
    config_file: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Writes a backbone in the Hugging Face layout, tensor by tensor, and says what it wrote.

    Args:
      source: T5X checkpoint (local or `gs://`), directory or hub name.
      output: a directory that is new or empty.
      config_file: a `config.json` in place of the source's own, or of what shapes say.
      tokenizer: a directory, or a SentencePiece file; None = the source's own, if it has one.
      dtype: "float32" or "bfloat16"; None = bfloat16 where the source's embedding table is.
      quantize: "int8" or "int4" store matrices so, as `load_backbone` would make them, and the rest
        in `dtype`; "none" = all in `dtype`; None = as the source is.
    Raises: UserError if the source is damaged or does not fit, or `output` cannot be written.
    """
    check_kind(quantize)
    target = Path(output)
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"will not write over {target}: it is not empty; name a new directory")
    directory, files = _open(source)
    if config_file is not None:
        config = _read_config_file(Path(config_file), files)
    elif (directory / "config.json").is_file():
        config = read_config(directory)
    else:
        config = derive_config(files)
    stored = embedding_table(files).dtype.name
    kind = quantize or files.quantize
    dtype = dtype or (stored if stored == "bfloat16" else "float32")
    with _tokenizer_directory(tokenizer, directory) as vocabulary:
        if vocabulary is not None:
            _check_tokenizer(vocabulary, config)
        quantization = None
        if kind != "none":
            quantization = config_entry(kind, fingerprint_of(files, config))
        convert_hf(target, files, config, vocabulary, dtype, quantization=quantization)
    if vocabulary is None:
        print(
            f"jaxprompt: {output} has no tokenizer, which a backbone needs: put its files there, "
            "or name one with --tokenizer next time",
            file=sys.stderr,
        )
    return {
        "output": output,
        "parameters": sum(math.prod(weight.shape) for weight in weight_table(config)),
        "layers": [config.num_layers, config.num_decoder_layers],
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "d_kv": config.d_kv,
        "dtype": dtype,
        "quantize": kind,
        "fingerprint": fingerprint(target, config),
    }


def _open(source: str) -> tuple[Path, WeightFiles]:
    """The source's directory and its weights."""
    place = Path(source).expanduser()
    if is_remote(source):
        return place, open_weights(source)
    if not place.is_dir() or (place / "config.json").is_file():
        place = resolve_backbone(source)
    step = newest_step(place)
    if step is not None:
        raise UserError(f"{source} holds several steps of a run; name one, as {step}")
    return place, open_weights(place)


def _read_config_file(path: Path, files: WeightFiles) -> T5Config:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no config.json: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: is no config.json: it holds no keys")
    config = T5Config.from_hf(raw, str(path))
    config = dataclasses.replace(config, tie_word_embeddings=embedding_is_output(files))
    if files.layout in (Layout.T5X, Layout.T5X_SCANNED):  # whether it scales, its names say
        scaled = derive_config(files).scale_decoder_outputs
        config = dataclasses.replace(config, scale_decoder_outputs=scaled)
    return config


@contextlib.contextmanager
def _tokenizer_directory(named: str | None, source: Path) -> Iterator[Path | None]:
    """A directory with the files of the tokenizer that was named, or of the source's own."""
    if named is None:
        own = any((source / name).is_file() for name in ("tokenizer.json", "spiece.model"))
        yield source if own or (source / "tokenizer_config.json").is_file() else None
    elif Path(named).is_file() and named.endswith(_SENTENCEPIECE):
        with tempfile.TemporaryDirectory() as directory:
            shutil.copyfile(named, Path(directory) / "spiece.model")
            yield Path(directory)
    else:
        yield Path(named)


def _check_tokenizer(directory: Path, config: T5Config) -> None:
    size = load_tokenizer(directory).size
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, the backbone's embedding table "
            f"{config.vocab_size} rows; they do not belong together"
        )
