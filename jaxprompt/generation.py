"""Texts from batches: the compiled searches, stop strings, and answers while they grow.

`inference.Answerer` answers with it; nothing here knows tasks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprompt import steps
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.sharding import shard_batch, to_host
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.search import Search
from jaxprompt.t5.stepwise import Draw
from jaxprompt.typing import Array, ArrayTree, Batch, UserError

# Compiled once for each shape and kind of search, whoever asks.
_generate = jax.jit(steps.generate, static_argnums=0)
_start = jax.jit(steps.start_search, static_argnums=0)
_go_on = jax.jit(steps.go_on, static_argnums=0, donate_argnames="halted")
_LOOK_EVERY = 4  # tokens between two looks for a stop string; changes no answer
_HALF_CHARACTER = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
      search: greedy, with a beam, by sampling.
      stop: texts at which an answer ends, itself without them; white space at an answer's ends is
        dropped before they are looked for.
      seed: of sampling; an example draws the same whatever batch it is in.
    Raises: UserError for an empty stop text, one together with a beam, or a seed out of range.
    """

    search: Search = dataclasses.field(default_factory=Search)
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if not all(self.stop):
            raise UserError("stop holds an empty text; an answer would end before it begins")
        if self.stop and self.search.num_beams > 1:
            raise UserError(
                f"stop is given and num_beams is {self.search.num_beams}; a beam search ends at "
                "the end token only"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it has to be 0 or above and below 2**32")

    def check_streams(self) -> None:
        """Raises: UserError with a beam."""
        if self.search.num_beams > 1:
            raise UserError(
                f"num_beams is {self.search.num_beams}; a beam search cannot be streamed, its best "
                "answer is known only at the end"
            )


@dataclasses.dataclass(frozen=True)
class Said:
    """One answer, or what there is of it.

    Attributes:
      text: without a stop string.
      score: log-likelihood of its tokens, in nats; up to the one that completed a stop string.
      ended: at an end token or stop string.
    """

    text: str
    score: float
    ended: bool


@dataclasses.dataclass(frozen=True)
class _Grown:
    """Rows of a search so far, on the host: `over` where no more will come."""

    said: list[Said]
    over: bool


class Generator:
    """Generates texts for batches of one segment a row.

    Args:
      graphdef: of a `PromptedT5`, from `trees.split`.
      tokenizer: decodes.
      mesh: spreads the rows of a batch over devices.
    """

    def __init__(
        self,
        graphdef: Any,
        tokenizer: Tokenizer,
        generation: Generation,
        mesh: Mesh | None = None,
    ):
        self.generation = generation
        self._graphdef, self._mesh = graphdef, mesh
        self._decode = tokenizer.decode
        self._times = generation.search.num_return_sequences

    def begin(
        self, trained: ArrayTree, frozen: ArrayTree, batch: Batch, numbers_B: np.ndarray
    ) -> Generated | list[Said]:
        """Starts a batch on the device; waits for it only if there are stop strings to look for.

        Args:
          batch: on the host, nothing but a beginning on its decoder side.
          numbers_B: each example's own number, on which its samples depend.
        Returns: what `read` takes.
        """
        search, rules = self.generation.search, self.generation.search.rules
        if self.generation.stop:
            *_, last = self._growing(trained, frozen, batch, numbers_B, _LOOK_EVERY)
            return last.said
        given, draw = (self._graphdef, trained, frozen), self._draw(numbers_B)
        batch = self._put(batch)
        if search.num_beams > 1:
            return _generate(*given, batch, draw, rules=rules)
        halted = _start(*given, batch, draw, rules=rules)
        return _go_on(*given, halted, np.int32(search.max_new_tokens), rules=rules)[1]

    def read(self, begun: Generated | list[Said]) -> list[list[Said]]:
        """The answers to every row, best first where they have an order."""
        said = begun if isinstance(begun, list) else self._said(self._fetch(begun))
        return _by_row(said, self._times)

    def stream(
        self,
        trained: ArrayTree,
        frozen: ArrayTree,
        batch: Batch,
        numbers_B: np.ndarray,
        every: int,
    ) -> Iterator[tuple[list[list[Said]], bool]]:
        """As `begin` and `read`, each `every` tokens; True comes with what is final."""
        for grown in self._growing(trained, frozen, batch, numbers_B, every):
            said = [
                one if one.ended or grown.over else dataclasses.replace(one, text=self._sure(one))
                for one in grown.said
            ]
            yield _by_row(said, self._times), grown.over

    def _growing(
        self,
        trained: ArrayTree,
        frozen: ArrayTree,
        batch: Batch,
        numbers_B: np.ndarray,
        every: int,
    ) -> Iterator[_Grown]:
        rules, given = self.generation.search.rules, (self._graphdef, trained, frozen)
        halted = _start(*given, self._put(batch), self._draw(numbers_B), rules=rules)
        stopped: dict[int, Said] = {}
        for until in range(every, rules.max_new_tokens + every, every):
            halted, found = _go_on(*given, halted, np.int32(until), rules=rules)
            found, gained_BT = self._fetch((found, halted.gained_BT))
            said = self._said(found)
            if self.generation.stop:
                for row, one in enumerate(said):
                    if row not in stopped and (end := self._stop_in(one.text)) is not None:
                        ids_T = found.ids_BT[row].tolist()
                        stopped[row] = self._cut(ids_T, gained_BT[row], end)
                said = [stopped.get(row, one) for row, one in enumerate(said)]
                ended_B = np.asarray([one.ended for one in said])
                halted = dataclasses.replace(halted, ended_B=halted.ended_B | jnp.asarray(ended_B))
            over = until >= rules.max_new_tokens or all(one.ended for one in said)
            yield _Grown(said, over)
            if over:
                return

    def _said(self, found: Generated) -> list[Said]:
        texts = map(self._decode, found.ids_BT.tolist())
        scores, ended = found.log_likelihood_B.tolist(), found.ended_B.tolist()
        return [Said(*one) for one in zip(texts, scores, ended, strict=True)]

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop string begins."""
        places = [at for stop in self.generation.stop if (at := text.find(stop)) >= 0]
        return min(places, default=None)

    def _cut(self, ids_T: list[int], gained_T: np.ndarray, end: int) -> Said:
        """An answer up to its first stop string, whose last token is the last that counts."""
        text = self._decode(ids_T)
        for count in range(1, len(ids_T) + 1):
            shorter = self._decode(ids_T[:count])
            at = self._stop_in(shorter)
            if at is not None:
                return Said(shorter[:at].rstrip(), float(gained_T[:count].sum()), True)
        return Said(text[:end].rstrip(), float(gained_T.sum()), True)

    def _sure(self, said: Said) -> str:
        """The text without an end that may yet become a stop string or another character."""
        text = said.text.rstrip(_HALF_CHARACTER)
        longest = max(map(len, self.generation.stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.generation.stop):
                return text[:-size].rstrip()
        return text

    def _draw(self, numbers_B: np.ndarray) -> Draw | None:
        if not self.generation.search.samples:
            return None
        numbers: Array = self._put(numbers_B.astype(np.int32))
        return Draw(jnp.asarray(self.generation.seed, jnp.uint32), numbers)

    def _put(self, tree: ArrayTree) -> ArrayTree:
        return jax.device_put(tree) if self._mesh is None else shard_batch(self._mesh, tree)

    def _fetch(self, tree: ArrayTree) -> ArrayTree:
        return to_host(tree)


def _by_row(said: list[Said], times: int) -> list[list[Said]]:
    return [said[at : at + times] for at in range(0, len(said), times)]
