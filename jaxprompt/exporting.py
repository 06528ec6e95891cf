"""`jaxprompt export`: a prompt artifact becomes another program's prompt."""

import argparse
import io
import json
from pathlib import Path

import numpy as np

from jaxprompt import files
from jaxprompt.artifact import PromptArtifact, check_backbone
from jaxprompt.data.layout import Layout
from jaxprompt.inference import load_prompt
from jaxprompt.interop.peft import peft_files
from jaxprompt.t5.backbones import planned_config
from jaxprompt.t5.config import T5Config
from jaxprompt.typing import UserError


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt export PROMPT OUT --format peft|numpy [--backbone B]`."""
    prompt = load_prompt(args.prompt)
    if args.format == "peft":
        written = export_peft(prompt, args.output, args.backbone)
    else:
        written = export_numpy(prompt, args.output)
    told = {"output": args.output, "format": args.format, "files": written}
    print(json.dumps(told) if args.json else f"{args.output}: {', '.join(written)}")


def export_peft(prompt: PromptArtifact, directory: str, backbone: str | None = None) -> list[str]:
    """Writes a prompt as a PEFT adapter.

    Args:
      directory: new, empty, or with an adapter in it, which is replaced as a whole.
      backbone: the prompt's, where it is not where the prompt says; only its config is read.
    Returns: names of the files.
    Raises: UserError if PEFT cannot express the prompt, or the directory cannot be written.
    """
    written = peft_files(prompt, _sizes(prompt, backbone))
    target = Path(directory)
    if target.is_dir():
        others = sorted({entry.name for entry in target.iterdir()} - set(written))
        if others:
            raise UserError(
                f"will not write a PEFT adapter over {directory}: it also holds "
                f"{', '.join(others[:3])}; name an empty or a new directory"
            )
    with files.replacing_directory(target) as temporary, files.writing(target):
        for name, content in written.items():
            (temporary / name).write_bytes(content)
    return list(written)


def export_numpy(prompt: PromptArtifact, path: str) -> list[str]:
    """Writes a soft prompt's slots as one array [P, D] in numpy's format.

    Raises: UserError if slots are not all there is to the prompt, or do not stand before the input
      as whoever reads a bare array takes for granted.
    """
    name = prompt.method["name"]
    if name != "soft":
        raise UserError(f"an array of slots cannot say what a prompt of method {name} does")
    length = len(prompt.values["prompt"])
    if Layout.parse(prompt.layout, length).pieces[0] != length:
        raise UserError(
            "a bare array of slots stands before the input; this prompt's layout is "
            f"{prompt.layout!r}"
        )
    stream = io.BytesIO()
    np.save(stream, prompt.values["prompt"])
    files.write_file(path, stream.getvalue())
    return [Path(path).name]


def _sizes(prompt: PromptArtifact, backbone: str | None) -> T5Config | None:
    """The backbone's architecture, where it has to be known."""
    if backbone is None and (prompt.origin or prompt.method["name"] != "soft"):
        return None
    name = backbone or prompt.backbone.name
    if not name:
        return None
    try:
        config = planned_config(name)
    except UserError as error:
        raise UserError(f"{error}; name the prompt's backbone with --backbone") from error
    check_backbone(prompt, name, prompt.backbone.fingerprint, config.d_model)
    return config
