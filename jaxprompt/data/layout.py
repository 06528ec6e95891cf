"""Where slots stand among a row's text: `{prompt}{input}`, `{prompt:20}{question}{prompt:5}`, ...

A layout is read once and lays out one row or many; a row's ids and slots are all the model sees of
it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprompt.data.templates import Hole, Piece, fill, hole_names, parse_template
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.typing import UserError

PROMPT_FIELD = "prompt"


@dataclasses.dataclass(frozen=True)
class LaidRow:
    """One row laid out.

    Attributes:
      ids: int32 token ids, the end token last, the pad id where a slot stands.
      slots: int32, as long as ids; slot indices 0, 1, ... from left to right, -1 for a token.
      truncated_tokens: how many tokens of text were cut off to fit.
    """

    ids: np.ndarray
    slots: np.ndarray
    truncated_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Runs of text and of slots, in order.

    Attributes:
      template: as it was written.
      pieces: text templates (tuples) and slot counts (ints).
    """

    template: str
    pieces: tuple[tuple[Piece, ...] | int, ...]

    @classmethod
    def parse(cls, template: str, prompt_length: int) -> "Layout":
        """Reads a layout.

        `{prompt:5}` is five slots, one `{prompt}` without a count is what is left of
        `prompt_length`, any other field is a field of the row, or `{input}`, the task's input text.
        With `prompt_length` 0, the bare backbone, slots vanish.

        Raises: UserError without a slot, or when the counts do not sum to `prompt_length`.
        """
        parsed = parse_template(template)
        counts = [piece for piece in parsed if isinstance(piece, Hole) and _is_slots(piece)]
        given = counted_slots(template)
        open_count = sum(not hole.spec for hole in counts)
        if prompt_length and not counts:
            raise UserError(
                f"the layout {template!r} has no slot for the prompt; put {{prompt}} into it"
            )
        if open_count > 1:
            raise UserError(
                f"the layout {template!r} has {open_count} {{prompt}} without a count; write"
                " {prompt:COUNT} for all but one"
            )
        left = prompt_length - given
        if prompt_length and (left < open_count or (left and not open_count)):
            raise UserError(
                f"the layout {template!r} counts {given} slots, the prompt has length"
                f" {prompt_length}; make them agree"
            )
        pieces: list[tuple[Piece, ...] | int] = []
        for piece in parsed:
            if isinstance(piece, Hole) and _is_slots(piece):
                count = _count(piece, template) if piece.spec else left
                pieces.append(count if prompt_length else 0)  # 0 still parts the texts beside it
            elif pieces and isinstance(pieces[-1], tuple):
                pieces[-1] = (*pieces[-1], piece)
            else:
                pieces.append((piece,))
        return cls(template, tuple(pieces))

    @property
    def slot_count(self) -> int:
        """P, the number of slots."""
        return sum(piece for piece in self.pieces if isinstance(piece, int))

    def fields(self) -> list[str]:
        """Names of the fields its texts use."""
        return hole_names(
            tuple(part for piece in self.pieces if isinstance(piece, tuple) for part in piece)
        )

    def lay(
        self, fields: Mapping[str, Any], tokenizer: Tokenizer, max_length: int, where: str = "row"
    ) -> LaidRow:
        """`lay_many` for one row."""
        return self.lay_many([fields], tokenizer, max_length, [where])[0]

    def lay_many(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        max_length: int,
        where: Sequence[str],
    ) -> list[LaidRow]:
        """Lays rows out: ids and slots in order, the end token last.

        Args:
          rows: fields of each row, with `input`.
          max_length: tokens, slots and end token of a row. Only text is cut, at its end; where
            there are several texts the longest loses a token at a time.
          where: where each row stands, for errors.
        Raises: UserError if slots and end token leave no room for text, or a row's text has no
          tokens.
        """
        room = self._room(max_length)
        texts = [piece for piece in self.pieces if isinstance(piece, tuple)]
        encoded = iter(
            tokenizer.encode_many(
                [
                    fill(text, row, place)
                    for row, place in zip(rows, where, strict=True)
                    for text in texts
                ]
            )
        )
        laid = []
        for place in where:
            parts = [next(encoded) for _ in texts]
            if not any(parts):
                raise UserError(f"{place} has no text: its input tokenises to nothing")
            laid.append(self._row(parts, room, tokenizer))
        return laid

    def _room(self, max_length: int) -> int:
        room = max_length - self.slot_count - 1
        if room < 1:
            raise UserError(
                f"{self.slot_count} slots and the end token leave no room for text in"
                f" max_input_length {max_length}; make it longer or the prompt shorter"
            )
        return room

    def _row(self, parts: list[list[int]], room: int, tokenizer: Tokenizer) -> LaidRow:
        kept = iter(_cut_longest([len(part) for part in parts], room))
        texts = iter(parts)
        ids: list[int] = []
        slots: list[int] = []
        next_slot = 0
        for piece in self.pieces:
            if isinstance(piece, int):
                ids += [tokenizer.pad_id] * piece
                slots += range(next_slot, next_slot + piece)
                next_slot += piece
            else:
                tokens = next(texts)[: next(kept)]
                ids += tokens
                slots += [-1] * len(tokens)
        cut = max(0, sum(map(len, parts)) - room)
        ids.append(tokenizer.eos_id)
        slots.append(-1)
        return LaidRow(np.array(ids, np.int32), np.array(slots, np.int32), cut)


def counted_slots(template: str) -> int:
    """The slots that a layout counts itself, as {prompt:3} does."""
    pieces = parse_template(template)
    holes = [piece for piece in pieces if isinstance(piece, Hole) and _is_slots(piece)]
    return sum(_count(hole, template) for hole in holes if hole.spec)


def _cut_longest(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths that sum to at most `room`, the longest (the later of equals) shortened first."""
    if sum(lengths) <= room:
        return list(lengths)
    level = 0  # the largest common bound under which they fit
    while sum(min(length, level + 1) for length in lengths) <= room:
        level += 1
    kept = [min(length, level) for length in lengths]
    spare = room - sum(kept)
    for i, length in enumerate(lengths):
        if spare and length > level:
            kept[i] += 1
            spare -= 1
    return kept


def _is_slots(hole: Hole) -> bool:
    return hole.name == PROMPT_FIELD


def _count(hole: Hole, template: str) -> int:
    if not hole.spec.isdecimal() or int(hole.spec) < 1:
        raise UserError(
            f"the layout {template!r} has {{prompt:{hole.spec}}}; after the colon stands a count of"
            " at least 1"
        )
    return int(hole.spec)
