"""Which rows a run's batches have: from its data where that is here, else the longest allowed."""

import dataclasses
import math
from contextlib import closing

from jaxprompt.backbone import Backbone
from jaxprompt.config import RunConfig
from jaxprompt.data.stream import Shapes
from jaxprompt.data.tasks import Task
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.t5.backbones import local_directory
from jaxprompt.t5.config import T5Config
from jaxprompt.trainee import make_trainee, train_batches
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Of a training batch.

    Attributes:
      rows, encoder, decoder, segments: B rows of S and T positions, G examples in each at most.
      examples: in a batch, on average.
      note: where this comes from.
    """

    rows: int
    encoder: int
    decoder: int
    segments: int
    examples: int
    note: str = ""


def step_shape(config: RunConfig, t5: T5Config, data_devices: int, prompts: int = 1) -> StepShape:
    """The batch of a step, with as many empty rows as training adds.

    Args:
      data_devices: along the mesh's `data`.
      prompts: trained at once, each with rows of its own.
    Raises: UserError for rows that do not divide into `train.accumulate` parts.
    """
    if not config.data.packing:
        config.train.check_batch_size("data.batch_size", config.data.batch_size)
    shapes, note = _shapes(config, t5, data_devices)
    multiple = data_devices * config.train.accumulate
    rows = math.ceil(shapes.batch_size / multiple) * multiple
    if rows > shapes.batch_size:
        note += f", {rows - shapes.batch_size} of them empty so that they divide"
    if prompts > 1:
        note += f"; rows for {prompts} prompts"
    return StepShape(
        prompts * rows, shapes.input_buckets[-1], shapes.target_buckets[-1], shapes.max_segments,
        prompts * config.data.batch_size, note,
    )  # fmt: skip


def _shapes(config: RunConfig, t5: T5Config, data_devices: int) -> tuple[Shapes, str]:
    """What training would choose, and how it was found."""
    directory = local_directory(config.backbone.name, config.backbone.revision)
    try:
        if directory is None:
            raise UserError("the backbone's vocabulary is not on this machine")
        backbone = Backbone(
            config.backbone.name, directory, "", t5, config.backbone.compute(), {},
            load_tokenizer(directory),
        )  # fmt: skip
        one = make_trainee("", config, backbone)
    except UserError as error:
        return _longest(config), f"as long as they may be ({error})"
    with closing(train_batches(one, data_devices)) as batches:
        shapes = batches.shapes
    note = "chosen from the data" if config.data.packing else "the longest of the data's"
    if shapes.roomy is not None:
        note += f"; rarer batches of rows of {shapes.roomy.input_buckets[-1]} are not planned"
    return shapes, note


def _longest(config: RunConfig) -> Shapes:
    """Every input as long as it may be, one a row unless rows are said to be longer."""
    data, candidates = config.data, Task(config.task).candidates
    target = data.max_target_length
    if candidates:  # a token is a character at least; two more begin and end a word
        target = min(target, max(map(len, candidates)) + 2)
    length = data.max_input_length
    segments = max(1, data.pack_length // length) if data.packing else 1
    if segments > 1:
        length = data.pack_length
    rows = math.ceil(data.batch_size / segments)
    return Shapes(rows, (length,), (segments * target,), segments)
