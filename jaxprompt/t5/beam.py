"""Beam search; called through `t5.generate`.

The beams of an example are rows of the cache side by side; cross-attention's keys and values exist
once per example, whatever the width of the beam.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.decode import Cache, Generated, advance, begin
from jaxprompt.t5.model import embed_tokens
from jaxprompt.t5.search import Rules, controlled, first_history
from jaxprompt.typing import Array, ArrayTree, Batch, PromptValues

_OUT = -1e9  # added to what may not be chosen; the score of an answer that is not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Running:
    """Beams that go on, best first. W = num_beams.

    Attributes:
      history_BWL: int32, decoder tokens.
      score_BW: float32, sum of controlled log-probabilities.
      likelihood_BW: float32, sum of the model's own.
    """

    history_BWL: Array
    score_BW: Array
    likelihood_BW: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ended:
    """Answers found, best first: as `_Running`, and which places are taken, which said the end.

    score_BW has the length penalty in it.
    """

    history_BWL: Array
    score_BW: Array
    likelihood_BW: Array
    there_BW: Array
    complete_BW: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """step: int32 [], tokens chosen; going_B: bool, False where nothing can be added any more."""

    step: Array
    cache: Cache
    running: _Running
    ended: _Ended
    going_B: Array


def beam_search(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    encoded_BSD: Array,
    rules: Rules,
) -> Generated:
    """The likeliest answers that a beam of `rules.num_beams` finds, best first.

    Args: as `decode.begin`; rows without an example end at once.
    Returns: `rules.num_return_sequences` rows for each of the batch's.
    Raises: ValueError if a row has several segments.
    Source: the semantics of transformers 5 `GenerationMixin._beam_search`.
    """
    width, longest = rules.num_beams, rules.max_new_tokens
    encoded, cache, logits_BV = begin(
        params, config, compute, batch, values, encoded_BSD, max_new_tokens=longest
    )
    beginning = batch.decoder_ids_BT.shape[1]
    state = _first_state(config, rules, batch, cache.repeated(width))

    def choose(logits_XV: Array, state: _State) -> _State:
        return _choose(config, rules, beginning, logits_XV, state)

    def step_on(state: _State) -> _State:
        last_BW = jax.lax.dynamic_index_in_dim(
            state.running.history_BWL, beginning + state.step - 1, axis=2, keepdims=False
        )
        embeds = embed_tokens(params, last_BW.reshape(-1, 1), compute)
        cache, logits_XV = advance(params, config, compute, encoded, state.cache, embeds)
        return choose(logits_XV, dataclasses.replace(state, cache=cache))

    def unfinished(state: _State) -> Array:
        return (state.step < longest) & jnp.any(state.going_B)

    state = choose(jnp.repeat(logits_BV, width, axis=0), state)
    ended = jax.lax.while_loop(unfinished, step_on, state).ended
    best = jax.tree.map(lambda x: x[:, : rules.num_return_sequences], ended)
    ids_BT = best.history_BWL[:, :, beginning:].reshape(-1, longest)
    empty_B = jnp.repeat(batch.example_index_BG[:, 0] < 0, rules.num_return_sequences)
    return Generated(
        ids_BT=jnp.where((ids_BT < 0) | empty_B[:, None], config.pad_id, ids_BT),
        log_likelihood_B=jnp.where(empty_B, 0.0, best.likelihood_BW.reshape(-1)),
        ended_B=best.complete_BW.reshape(-1) | empty_B,
        score_B=jnp.where(empty_B, 0.0, best.score_BW.reshape(-1)),
    )


def _first_state(config: T5Config, rules: Rules, batch: Batch, cache: Cache) -> _State:
    width = rules.num_beams
    history_BL = first_history(batch.decoder_ids_BT, batch.decoder_slots_BT, rules.max_new_tokens)
    examples, length = history_BL.shape
    history_BWL = jnp.broadcast_to(history_BL[:, None], (examples, width, length))
    zeros_BW = jnp.zeros((examples, width), jnp.float32)
    # at first all beams are the same: only one of them may be continued
    score_BW = jnp.broadcast_to(jnp.where(jnp.arange(width) == 0, 0.0, _OUT), zeros_BW.shape)
    nothing_BW = jnp.zeros((examples, width), bool)
    return _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        running=_Running(history_BWL, score_BW, zeros_BW),
        ended=_Ended(history_BWL, zeros_BW + _OUT, zeros_BW, nothing_BW, nothing_BW),
        going_B=batch.example_index_BG[:, 0] >= 0,
    )


def _choose(
    config: T5Config, rules: Rules, beginning: int, logits_XV: Array, state: _State
) -> _State:
    """Adds a token to the beams, X = B*W rows of logits, and moves those that end to the answers.

    Twice as many continuations as beams are looked at: of each beam at most one ends, so that
    enough are left to go on.
    """
    running, width = state.running, rules.num_beams
    examples, _, length = running.history_BWL.shape
    filled = beginning + state.step
    own_XV = jax.nn.log_softmax(logits_XV)
    scores_XV = controlled(rules, own_XV, running.history_BWL.reshape(-1, length), filled)
    vocabulary = scores_XV.shape[1]
    total_BWV = running.score_BW[:, :, None] + scores_XV.reshape(examples, width, vocabulary)
    likelihood_BWV = running.likelihood_BW[:, :, None] + own_XV.reshape(total_BWV.shape)
    flat = (examples, width * vocabulary)
    looked_at = min(2 * width, flat[1])
    score_BX, index_BX = jax.lax.top_k(total_BWV.reshape(flat), looked_at)
    beam_BX, token_BX = index_BX // vocabulary, (index_BX % vocabulary).astype(jnp.int32)
    likelihood_BX = jnp.take_along_axis(likelihood_BWV.reshape(flat), index_BX, axis=1)
    history_BXL = jax.lax.dynamic_update_slice(
        _rows(running.history_BWL, beam_BX), token_BX[:, :, None], (0, 0, filled)
    )

    complete_BX = token_BX == config.eos_id
    step = state.step + 1
    ends_BX = complete_BX | (step == rules.max_new_tokens)
    on_BX = score_BX + jnp.where(ends_BX, _OUT, 0.0)
    _, next_BW = jax.lax.top_k(on_BX, width)
    running = _Running(
        _rows(history_BXL, next_BW), _rows(on_BX, next_BW), _rows(likelihood_BX, next_BW)
    )
    rows_BW = jnp.arange(examples)[:, None] * width + _rows(beam_BX, next_BW)

    ends_BX = ends_BX & (jnp.arange(looked_at) < width)[None]
    penalised_BX = score_BX / step.astype(jnp.float32) ** rules.length_penalty
    found = _Ended(
        history_BXL,
        jnp.where(ends_BX, penalised_BX, _OUT),
        likelihood_BX,
        ends_BX,
        complete_BX & ends_BX,
    )
    ended = _best(state.ended, found, state.going_B)
    return _State(
        step=step,
        cache=state.cache.reordered(rows_BW.reshape(-1)),
        running=running,
        ended=ended,
        going_B=state.going_B & _can_improve(rules, running, ended, step),
    )


def _best(ended: _Ended, found: _Ended, going_B: Array) -> _Ended:
    """The best answers of both; as they were where a search is over."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), ended, found)
    _, best_BW = jax.lax.top_k(both.score_BW, ended.score_BW.shape[1])

    def keep(before: Array, merged: Array) -> Array:
        going = going_B.reshape(-1, *[1] * (before.ndim - 1))
        return jnp.where(going, _rows(merged, best_BW), before)

    return jax.tree.map(keep, ended, both)


def _can_improve(rules: Rules, running: _Running, ended: _Ended, step: Array) -> Array:
    """bool [B], whether a running beam may still come among the answers."""
    full_B = jnp.all(ended.there_BW, axis=1)
    if rules.early_stopping is True:
        return ~full_B
    length = step
    if rules.early_stopping == "never":  # how long the best one would come to the most
        length = jnp.where(rules.length_penalty > 0, rules.max_new_tokens, step)
    best_B = running.score_BW[:, 0] / length.astype(jnp.float32) ** rules.length_penalty
    return ~full_B | (best_B > jnp.min(ended.score_BW, axis=1))


def _rows(x_BX: Array, index_BW: Array) -> Array:
    """Takes along axis 1: [B, X, ...] -> [B, W, ...]."""
    return jnp.take_along_axis(
        x_BX, index_BW.reshape(*index_BW.shape, *[1] * (x_BX.ndim - 2)), axis=1
    )
