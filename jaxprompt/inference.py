"""Before the first answer: prompts read and put on their backbone, and what examples are for them.

`evaluate`, `predict` and `api` share it; `answerer` is what then answers.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprompt import schema
from jaxprompt.artifact import CONFIG_NAME, PromptArtifact, check_backbone, load_artifact
from jaxprompt.backbone import Backbone, load_backbone
from jaxprompt.data.encoder import Cuts, DataConfig, TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import Asked
from jaxprompt.data.readers import Fields
from jaxprompt.data.tasks import Task, TaskConfig, load_task
from jaxprompt.data.templates import lookup
from jaxprompt.generation import Generation
from jaxprompt.interop.peft import read_peft
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import METHODS, MethodConfig, NoPrompt, PromptMethod, slots_of
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.t5.search import Search
from jaxprompt.trees import split
from jaxprompt.typing import ArrayTree, UserError

BARE = "none"  # in place of a prompt: the backbone alone


@dataclasses.dataclass(frozen=True)
class Prompted:
    """One prompt or a bank on a backbone, taken apart as the compiled programs want it."""

    graphdef: Any
    trained: ArrayTree
    frozen: ArrayTree


def put_on(
    backbone: Backbone, *prompts: PromptArtifact | None, allow_other: bool = False
) -> Prompted:
    """Puts one prompt, or several as a bank, on a backbone.

    Args:
      prompts: None = the bare backbone.
      allow_other: accept another backbone than the prompt was trained with, where shapes allow.
    Raises: UserError for a backbone that a prompt does not belong to, an unknown method, or
      prompts of different methods.
    """
    methods = [_method(backbone, prompt, allow_other) for prompt in prompts]
    method = methods[0] if len(methods) == 1 else PromptBank(methods)
    return Prompted(*split(PromptedT5(backbone.module(), method)))


def _method(backbone: Backbone, prompt: PromptArtifact | None, allow_other: bool) -> PromptMethod:
    if prompt is None:
        return NoPrompt()
    check_backbone(
        prompt, backbone.name, backbone.fingerprint, backbone.config.d_model, allow_other
    )
    config = method_config(prompt)
    info = METHODS[config.name]
    if info.task_parts:
        raise UserError(
            f"prompt {prompt.path} holds the parts of several tasks: use one task's own prompt, in "
            "the run's directory tasks/NAME/best, or begin a run with method.init=prompt from it"
        )
    info.check(prompt.values, config, backbone.config)
    return info.make(jax.device_put(dict(prompt.values)), config)


def read_prompts(words: Sequence[str]) -> list[tuple[str, PromptArtifact | None]]:
    """Prompts with their names, from words `PATH` (a path is its own name) or `NAME=PATH`.

    Raises: UserError as `load_artifact`.
    """
    prompts = []
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or os.path.exists(word):
            name = path = word
        prompts.append((name, read_prompt(path)))
    return prompts


def ask_named(
    field: str,
    names: Sequence[str],
    tasks: Sequence[Task],
    rows: Iterable[tuple[Fields, str]],
    *,
    with_target: bool = True,
) -> Iterator[Asked]:
    """Examples of rows that name their prompt in a field.

    Args:
      names, tasks: of each prompt of the bank.
      rows: fields, and where they stand.
    Raises: UserError for a row without the field or with the name of no prompt, or for two prompts
      of one name.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names):
        twice = next(name for number, name in enumerate(names) if numbers[name] != number)
        raise UserError(f"two prompts are called {twice!r}; call one of them NAME=PATH")
    for row, where in rows:
        name = str(lookup(row, field, where))
        if name not in numbers:
            raise UserError(
                f"{where}: field {field!r} names prompt {name!r}, which was not given; there are "
                f"{', '.join(numbers)}"
            )
        yield Asked(tasks[numbers[name]].example(row, where, with_target), numbers[name])


def read_prompt(path: str) -> PromptArtifact | None:
    """The prompt at `path`, an artifact or PEFT's; None for "none", the bare backbone.

    Raises: UserError as `load_artifact` and `read_peft`.
    """
    return None if path == BARE else load_prompt(path)


def load_prompt(path: str) -> PromptArtifact:
    """The prompt at `path`: an artifact, an array in numpy's format, or PEFT's files.

    Raises: UserError as `load_artifact` and `read_peft`.
    """
    is_artifact = (Path(path) / CONFIG_NAME).exists()
    return (None if is_artifact else read_peft(path)) or load_artifact(path)


def backbone_of(
    prompt: PromptArtifact | None,
    name: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
) -> Backbone:
    """Loads a prompt's backbone, or the one called `name`.

    Args:
      dtype, quantize: as in `load_backbone`.
    Raises: UserError if neither says which, or as `load_backbone`.
    """
    chosen = name or ("" if prompt is None else prompt.backbone.name)
    if not chosen:
        who = "the bare backbone" if prompt is None else f"prompt {prompt.path}"
        raise UserError(f"{who} does not say which backbone to load; name it with --backbone")
    return load_backbone(chosen, dtype=dtype, quantize=quantize)


def task_of(prompt: PromptArtifact | None, name: str | None = None) -> Task:
    """The task called `name`, or else a prompt's own; free text to free text if it has none."""
    if name:
        return load_task(name)
    if prompt is None or not prompt.task:
        return Task(TaskConfig())
    return Task(schema.from_mapping(TaskConfig, prompt.task, f"the task of prompt {prompt.path}"))


def with_candidates(task: Task, candidates: Sequence[str]) -> Task:
    """The task with other candidates to choose from; with none, one of free generation."""
    options = {"labels": {}, "candidates": tuple(candidates), "positive_label": ""}
    return Task(dataclasses.replace(task.config, **options))


def method_config(prompt: PromptArtifact) -> MethodConfig:
    """The options of a prompt's method.

    Raises: UserError if this version does not know it.
    """
    place = f"the method of prompt {prompt.path}"
    return schema.from_mapping(MethodConfig, prompt.method, place)


def layout_of(prompt: PromptArtifact | None) -> Layout:
    """Where a prompt's slots stand; the input alone without a prompt.

    Raises: UserError if layout and length do not agree.
    """
    if prompt is None:
        return Layout.parse("{input}", 0)
    return Layout.parse(prompt.layout, slots_of(method_config(prompt)))


def encoder_of(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    task: Task,
    *,
    batch_size: int = 64,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
) -> TaskEncoder:
    """What turns a task's examples into rows for this prompt.

    Lengths are those given, else those the prompt was trained with, else the defaults.
    """
    default = DataConfig()
    trained = {} if prompt is None else prompt.lengths
    config = DataConfig(
        eval_batch_size=batch_size,
        max_input_length=max_input_length
        or trained.get("max_input_length", default.max_input_length),
        max_target_length=max_target_length
        or trained.get("max_target_length", default.max_target_length),
    )
    return TaskEncoder(
        task,
        layout_of(prompt),
        backbone.tokenizer,
        config,
        start_id=backbone.config.decoder_start_id,
    )


def generation_of(args: argparse.Namespace) -> Generation:
    """What a command's options say about generating.

    Raises: UserError for options that make no sense or not together.
    """
    fields = (field.name for field in dataclasses.fields(Search))
    search = Search(**{name: getattr(args, name) for name in fields if hasattr(args, name)})
    return Generation(search, tuple(args.stop), args.seed)


def cut_note(cuts: Cuts, longest: int, option: str = "--max-input-length") -> str:
    """A sentence on inputs that were cut off, and what takes more; empty if none was."""
    if not cuts.cut_inputs:
        return ""
    return (
        f"{cuts.cut_inputs:,} of {cuts.examples:,} inputs were cut to {longest} tokens, "
        f"{cuts.cut_input_tokens:,} tokens in all; {option} takes more"
    )
