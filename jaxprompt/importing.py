"""`jaxprompt import`: another program's prompt becomes a prompt artifact of its backbone."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from jaxprompt.artifact import (
    CONFIG_NAME,
    BackboneIdentity,
    PromptArtifact,
    check_backbone,
    save_artifact,
)
from jaxprompt.data.layout import Layout
from jaxprompt.data.tasks import load_task
from jaxprompt.inference import method_config
from jaxprompt.interop.lester import read_lester
from jaxprompt.interop.peft import for_decoder, read_peft
from jaxprompt.prompts import METHODS, slots_of
from jaxprompt.schema import to_mapping
from jaxprompt.t5.backbones import fingerprint, read_config, resolve_backbone
from jaxprompt.typing import UserError

# each gives the prompt at a place, of one of its tasks, or None if nothing of its kind is there
READERS: tuple[Callable[[str, int | None], PromptArtifact | None], ...] = (
    read_peft,
    lambda source, peft_task: read_lester(source),
)


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt import SOURCE OUT --backbone B [--task T] ...`."""
    prompt = import_prompt(
        args.source, args.backbone, args.task, args.layout, peft_task=args.peft_task
    )
    save_artifact(args.output, prompt)
    told = {
        "output": args.output,
        "method": prompt.method["name"],
        "length": prompt.method.get("length", 0),
        "backbone": prompt.backbone.name,
    }
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(f"{told['output']}: {told['method']}, {told['length']} slots, of {told['backbone']}")


def import_prompt(
    source: str,
    backbone: str,
    task: str | None = None,
    layout: str = "{prompt}{input}",
    *,
    peft_task: int | None = None,
) -> PromptArtifact:
    """Reads another program's prompt and ties it to its backbone, of which only files are read.

    Args:
      source: where it is; see `READERS`.
      backbone: directory or hub name.
      task: a name or YAML file of a task to store with it.
      layout: where its slots stand.
      peft_task: which task of a multitask prompt of PEFT.
    Raises: UserError if there is no prompt, it is damaged, or it does not fit the backbone.
    """
    if (Path(source) / CONFIG_NAME).is_file():
        raise UserError(f"{source} is a prompt artifact already; use it as it is")
    found = (read(source, peft_task) for read in READERS)
    prompt = next((prompt for prompt in found if prompt is not None), None)
    if prompt is None:
        raise UserError(
            f"no prompt at {source}: give a PEFT directory, a numpy file, a run of "
            "google-research/prompt-tuning, or a T5X checkpoint with a prompt in it"
        )
    options = method_config(prompt)
    Layout.parse(layout, slots_of(options))
    directory = resolve_backbone(backbone)
    config = read_config(directory)
    identity = BackboneIdentity(
        backbone, fingerprint(directory, config), config.d_model, config.vocab_size
    )
    prompt = for_decoder(prompt, config.num_decoder_layers)
    check_backbone(prompt, backbone, identity.fingerprint, config.d_model)
    METHODS[options.name].check(prompt.values, options, config)
    return dataclasses.replace(
        prompt,
        layout=layout,
        task=to_mapping(load_task(task).config) if task else prompt.task,
        backbone=identity,
        training={**prompt.training, "source": source},
    )
