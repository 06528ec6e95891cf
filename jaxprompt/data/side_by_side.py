"""Training batches of several prompts side by side: like rows joined, each prompt with its own.

Every prompt keeps the batches that it would have by itself, so that what becomes of it does not
depend on the others.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprompt.data.pipeline import TrainBatches
from jaxprompt.data.stream import State
from jaxprompt.typing import Batch

# Joined rows get fewer when this share of their places is free: every size is compiled once.
_SPARE = 0.25
# What stands in empty places: -1, the pad id, or in the fields not named 0.
_NONE: tuple[str, ...] = ("encoder_slots_BS", "decoder_slots_BT", "example_index_BG")
_TOKENS: tuple[str, ...] = ("encoder_ids_BS", "decoder_ids_BT", "targets_BT")


class Part(NamedTuple):
    """A batch for some of the prompts, and the kind that these are of."""

    kind: Any
    batch: Batch


class SideBySide:
    """Endless; each item is the parts of one step: a batch of every prompt that goes on.

    Batches of prompts of one kind and of like rows are joined into one part. One that has rows of
    another length (roomy ones) is a part by itself, and empty rows hold its place.

    Attributes:
      streams: of each prompt.
      shape_counts: shapes of a step's parts -> steps that had them.
    """

    def __init__(
        self,
        streams: Sequence[TrainBatches],
        kinds: Sequence[Hashable],
        pad_id: int = 0,
        row_multiple: int = 1,
    ):
        """
        Args:
          streams: of each prompt, at their first batch.
          kinds: of each prompt; parts of one kind are computed in the same way.
          pad_id: of all their tokens.
          row_multiple: a part gets empty rows up to a multiple of it: devices, microbatches.
        """
        self.streams = list(streams)
        self.shape_counts: Counter[tuple[tuple[int, ...], ...]] = Counter()
        groups: dict[Any, _Group] = {}
        for prompt, (stream, kind) in enumerate(zip(streams, kinds, strict=True)):
            like = (kind, dataclasses.replace(stream.shapes, roomy=None))
            groups.setdefault(like, _Group(kind, pad_id, row_multiple)).prompts.append(prompt)
        self._groups = list(groups.values())
        for group in self._groups:
            group.places = len(group.prompts)

    def __iter__(self) -> "SideBySide":
        return self

    def __next__(self) -> tuple[Part, ...]:
        parts = tuple(part for group in self._groups for part in group.parts(self.streams))
        self.shape_counts[
            tuple((*part.batch.encoder_ids_BS.shape, part.batch.targets_BT.shape[1])
                  for part in parts)
        ] += 1  # fmt: skip
        return parts

    def drop(self, prompt: int) -> None:
        """Takes a prompt out; the others go on as before."""
        for group in self._groups:
            group.drop(prompt)

    def get_state(self) -> State:
        """JSON-ready positions of all prompts, see `TrainBatches.get_state`."""
        return {"prompts": [stream.get_state() for stream in self.streams]}

    def set_state(self, state: State) -> None:
        """Continues from what `get_state` gave; raises as `TrainBatches.set_state`."""
        for stream, own in zip(self.streams, state["prompts"], strict=True):
            stream.set_state(own)

    def close(self) -> None:
        """Stops the threads that work ahead."""
        for stream in self.streams:
            stream.close()


class _Group:
    """The prompts of one kind whose rows are alike."""

    def __init__(self, kind: Any, pad_id: int, row_multiple: int):
        self.kind, self.pad_id, self.row_multiple = kind, pad_id, row_multiple
        self.prompts: list[int] = []
        self.places = 0

    def parts(self, streams: Sequence[TrainBatches]) -> list[Part]:
        """The next batch of each of its prompts."""
        usual, alone = [], []
        for prompt in self.prompts:
            stream, batch = streams[prompt], _of_prompt(next(streams[prompt]), prompt)
            length = batch.encoder_ids_BS.shape[1]
            is_usual = stream.shapes.roomy is None or length == stream.shapes.input_buckets[-1]
            (usual if is_usual else alone).append(batch)
        wholes = [(usual, self.places)] if usual else []
        wholes += [([batch], 1) for batch in alone]
        return [
            Part(self.kind, _joined(batches, places, self.pad_id, self.row_multiple))
            for batches, places in wholes
        ]

    def drop(self, prompt: int) -> None:
        if prompt in self.prompts:
            self.prompts.remove(prompt)
            if len(self.prompts) <= (1 - _SPARE) * self.places:
                self.places = len(self.prompts)


def _of_prompt(batch: Batch, prompt: int) -> Batch:
    return dataclasses.replace(batch, prompt_index_BG=np.full_like(batch.prompt_index_BG, prompt))


def _joined(batches: Sequence[Batch], places: int, pad_id: int, row_multiple: int) -> Batch:
    """The rows of batches below each other, padded to the longest, in so many batches' places."""
    rows = len(batches[0].targets_BT) * places
    rows += -rows % row_multiple
    arrays = {}
    for field in dataclasses.fields(Batch):
        parts = [np.asarray(getattr(batch, field.name)) for batch in batches]
        fill = pad_id if field.name in _TOKENS else -1 if field.name in _NONE else 0
        whole = np.full((rows, max(part.shape[1] for part in parts)), fill, parts[0].dtype)
        at = 0
        for part in parts:
            whole[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        arrays[field.name] = whole
    return Batch(**arrays)
