"""How an answer is searched for: `Search` for people, `Rules` for programs, logits by the rules.

`t5.stepwise` (greedy, sampling) and `t5.beam` search; both are called through `generate.generate`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.typing import Array, UserError

NO_TOKEN = -1  # where a history holds none (yet)


@dataclasses.dataclass(frozen=True)
class Search:
    """The options of a search; the defaults are greedy.

    Attributes:
      max_new_tokens: longest answer, the end token included.
      num_beams: width of the beam; 1 = no beam search.
      length_penalty: beams are ranked by log-probability / length ** length_penalty.
      early_stopping: when a beam search ends: True = as soon as it has num_beams ended answers;
        False = when the best running one, were it to end now, would not come among them; "never" =
        when it could not at any length.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits /
        temperature).
      top_k: draw from the k likeliest tokens only; 0 = from all. Ties with the last are in.
      top_p: draw from the fewest likeliest tokens whose probabilities sum to top_p or more.
      repetition_penalty: logits of tokens already there are divided (where negative, multiplied)
        by it; Keskar et al. 2019.
      no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 = any may.
      num_return_sequences: answers for each example.
    Raises: UserError that names the field.
    Source: the options of transformers' `generate`, which means the same by them.
    """

    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            _whole(name, getattr(self, name), 1)
        for name in ("top_k", "no_repeat_ngram_size"):
            _whole(name, getattr(self, name), 0)
        for name in ("length_penalty", "temperature", "top_p", "repetition_penalty"):
            _number(name, getattr(self, name))
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise UserError(
                f"early_stopping is {self.early_stopping!r}; it has to be true, false or 'never'"
            )
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it has to be 0 or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it has to be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it has to be above 0"
            )
        self._check_together()

    def _check_together(self) -> None:
        if not self.samples:
            why = "nothing is drawn at temperature 0; set temperature above 0"
            self._check_off(why, top_k=0, top_p=1.0)
        if self.num_beams == 1:
            why = "there is no beam to rank or end with num_beams 1; set num_beams above 1"
            self._check_off(why, length_penalty=1.0, early_stopping=False)
        if self.samples and self.num_beams > 1:
            raise UserError(
                f"temperature is {self.temperature} and num_beams {self.num_beams}; take one of "
                "sampling and beam search"
            )
        if not self.samples and self.num_return_sequences > self.num_beams:
            raise UserError(
                f"num_return_sequences is {self.num_return_sequences}, num_beams "
                f"{self.num_beams}; without sampling there are no more answers than beams"
            )

    def _check_off(self, why: str, **off: Any) -> None:
        for name, value in off.items():
            if getattr(self, name) != value:
                raise UserError(f"{name} is {getattr(self, name)}, but {why}")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    @property
    def rules(self) -> "Rules":
        """The same for a compiled program."""
        options: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name in ("length_penalty", "temperature"):
            options[name] = np.float32(options[name])
        for name in ("top_p", "repetition_penalty"):
            options[name] = None if options[name] == 1 else np.float32(options[name])
        return Rules(samples=self.samples, **options)


_COMPILED_IN = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """A `Search` as a compiled program takes it, the same program for every strength.

    Attributes: those of `Search`. The strengths are float32 []; None = neither of the two is used.
    """

    max_new_tokens: int = dataclasses.field(metadata=_COMPILED_IN)
    num_beams: int = dataclasses.field(metadata=_COMPILED_IN)
    early_stopping: bool | str = dataclasses.field(metadata=_COMPILED_IN)
    samples: bool = dataclasses.field(metadata=_COMPILED_IN)
    top_k: int = dataclasses.field(metadata=_COMPILED_IN)
    no_repeat_ngram_size: int = dataclasses.field(metadata=_COMPILED_IN)
    num_return_sequences: int = dataclasses.field(metadata=_COMPILED_IN)
    length_penalty: Array
    temperature: Array
    top_p: Array | None
    repetition_penalty: Array | None


def first_history(decoder_ids_BT: Array, decoder_slots_BT: Array, room: int) -> Array:
    """The beginning's tokens and `room` places for new ones, int32 [B, T+room]; slots negative."""
    beginning_BT = jnp.where(decoder_slots_BT >= 0, NO_TOKEN - 1 - decoder_slots_BT, decoder_ids_BT)
    return jnp.pad(beginning_BT.astype(jnp.int32), ((0, 0), (0, room)), constant_values=NO_TOKEN)


def controlled(rules: Rules, scores_BV: Array, history_BL: Array, filled: Array) -> Array:
    """Scores with repetition controlled, float32 [B, V].

    Args:
      scores_BV: logits, or log-probabilities in a beam search.
      history_BL: int32, the decoder's tokens so far, the start token among them.
      filled: int32 [], how many of the L.
    Source: Keskar et al. 2019, section 4.1; transformers' `RepetitionPenaltyLogitsProcessor` and
      `NoRepeatNGramLogitsProcessor`.
    """
    penalty = rules.repetition_penalty
    if penalty is not None:
        seen_BV = _marked(history_BL, history_BL >= 0, scores_BV.shape[1])
        penalised_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
        scores_BV = jnp.where(seen_BV, penalised_BV, scores_BV)
    size = rules.no_repeat_ngram_size
    if 0 < size <= history_BL.shape[1]:
        context = jax.lax.dynamic_slice_in_dim(history_BL, filled - (size - 1), size - 1, axis=1)
        starts = history_BL.shape[1] - size + 1
        came_BX = (jnp.arange(starts) + size <= filled)[None]
        for at in range(size - 1):
            came_BX = came_BX & (history_BL[:, at : at + starts] == context[:, at : at + 1])
        last_BX = history_BL[:, size - 1 :]
        banned_BV = _marked(last_BX, came_BX & (last_BX >= 0), scores_BV.shape[1])
        scores_BV = jnp.where(banned_BV, -jnp.inf, scores_BV)
    return scores_BV


def warped(rules: Rules, logits_BV: Array) -> Array:
    """Logits to draw from: temperature, top_k, top_p, in this order; -inf for what is out.

    Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p).
    """
    logits_BV = logits_BV / rules.temperature
    vocabulary = logits_BV.shape[1]
    if 0 < rules.top_k < vocabulary:
        kth_B1 = jax.lax.top_k(logits_BV, rules.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if rules.top_p is not None:
        falling_BV = -jnp.sort(-logits_BV, axis=-1)
        before_BV = jnp.cumsum(jax.nn.softmax(falling_BV), axis=-1) - jax.nn.softmax(falling_BV)
        count_B1 = jnp.maximum(jnp.sum(before_BV < rules.top_p, axis=-1, keepdims=True), 1)
        least_B1 = jnp.take_along_axis(falling_BV, count_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _marked(ids_BX: Array, which_BX: Array, vocabulary: int) -> Array:
    """bool [B, V], True at the ids of each row where `which_BX` is."""
    rows = jnp.arange(ids_BX.shape[0])[:, None]
    nothing_BV = jnp.zeros((ids_BX.shape[0], vocabulary), bool)
    return nothing_BV.at[rows, jnp.where(which_BX, ids_BX, vocabulary)].set(True, mode="drop")


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} is {value!r}; it has to be a whole number, at least {least}")


def _number(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; it has to be a number")
