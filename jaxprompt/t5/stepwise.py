"""Greedy decoding and sampling as a search that can be halted: start it, let it go on, look at it.

One compiled `go_on` serves generation in one go (until the end) and streaming (a few tokens at a
time, looked at by the host in between).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.decode import Cache, Encoded, Generated, advance, begin
from jaxprompt.t5.model import embed_tokens
from jaxprompt.t5.search import Rules, controlled, first_history, warped
from jaxprompt.typing import Array, ArrayTree, Batch, PromptValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """What chance depends on; neither the batch nor its size.

    Attributes:
      seed: uint32 [].
      numbers_B: int32, each example's own number.
    """

    seed: Array
    numbers_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halted:
    """A search between two tokens; B counts every sequence of every example.

    Attributes:
      step: int32 [], tokens chosen.
      history_BL: int32, decoder tokens: the beginning, those chosen, -1.
      gained_BT: float32, log-likelihood of each new token, 0 after the end.
      ended_B: bool; a caller may set it, and the row goes no further.
      keys_B: typed keys, one for each sequence; None where nothing is drawn.
    """

    encoded: Encoded
    cache: Cache
    step: Array
    history_BL: Array
    gained_BT: Array
    ended_B: Array
    keys_B: Array | None

    @property
    def ids_BT(self) -> Array:
        """New tokens, int32 [B, max_new_tokens], -1 where none was chosen yet."""
        return self.history_BL[:, self.history_BL.shape[1] - self.gained_BT.shape[1] :]


def start(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    encoded_BSD: Array,
    rules: Rules,
    draw: Draw | None = None,
) -> Halted:
    """Chooses the first token.

    Args: as `decode.begin`; rows without an example end at once.
      draw: what chance depends on; None = seed 0 and the batch's own example numbers.
    Raises: ValueError if a row has several segments.
    """
    encoded, cache, logits_BV = begin(
        params, config, compute, batch, values, encoded_BSD, max_new_tokens=rules.max_new_tokens
    )
    times = rules.num_return_sequences
    history_BL = first_history(batch.decoder_ids_BT, batch.decoder_slots_BT, rules.max_new_tokens)
    halted = Halted(
        encoded=encoded,
        cache=cache.repeated(times),
        step=jnp.zeros((), jnp.int32),
        history_BL=jnp.repeat(history_BL, times, axis=0),
        gained_BT=jnp.zeros((len(history_BL) * times, rules.max_new_tokens), jnp.float32),
        ended_B=jnp.repeat(batch.example_index_BG[:, 0] < 0, times),
        keys_B=_keys(draw, batch, times) if rules.samples else None,
    )
    return _choose(config, rules, halted, cache.repeated(times), jnp.repeat(logits_BV, times, 0))


def go_on(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    rules: Rules,
    halted: Halted,
    until: Array,
) -> Halted:
    """Chooses tokens until every row has ended or there are `until`, int32 [], of them."""
    beginning = halted.history_BL.shape[1] - rules.max_new_tokens
    encoded = halted.encoded
    until = jnp.minimum(until, rules.max_new_tokens)

    def unfinished(halted: Halted) -> Array:
        return (halted.step < until) & ~jnp.all(halted.ended_B)

    def step_on(halted: Halted) -> Halted:
        last_B1 = jax.lax.dynamic_slice_in_dim(
            halted.history_BL, beginning + halted.step - 1, 1, axis=1
        )
        embeds_B1D = embed_tokens(params, last_B1, compute)
        cache, logits_BV = advance(params, config, compute, encoded, halted.cache, embeds_B1D)
        return _choose(config, rules, halted, cache, logits_BV)

    return jax.lax.while_loop(unfinished, step_on, halted)


def result(config: T5Config, halted: Halted) -> Generated:
    """What was found so far."""
    log_likelihood_B = jnp.sum(halted.gained_BT, axis=1)
    ids_BT = jnp.where(halted.ids_BT < 0, config.pad_id, halted.ids_BT)
    return Generated(ids_BT, log_likelihood_B, halted.ended_B, log_likelihood_B)


def _choose(
    config: T5Config, rules: Rules, halted: Halted, cache: Cache, logits_BV: Array
) -> Halted:
    """Takes the likeliest token, or draws one; ties go to the lowest id."""
    rooms = halted.history_BL.shape[1] - rules.max_new_tokens
    at = rooms + halted.step
    scores_BV = controlled(rules, logits_BV, halted.history_BL, at)
    if halted.keys_B is not None:
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(halted.keys_B, halted.step)
        token_B = jax.vmap(jax.random.categorical)(keys_B, warped(rules, scores_BV))
    else:
        token_B = jnp.argmax(scores_BV, axis=-1)
    token_B = jnp.where(halted.ended_B, config.pad_id, token_B).astype(jnp.int32)
    own_BV = jax.nn.log_softmax(logits_BV)
    gained_B = jnp.take_along_axis(own_BV, token_B[:, None], axis=1)[:, 0]
    gained_B = jnp.where(halted.ended_B, 0.0, gained_B)
    return dataclasses.replace(
        halted,
        cache=cache,
        step=halted.step + 1,
        history_BL=jax.lax.dynamic_update_slice(halted.history_BL, token_B[:, None], (0, at)),
        gained_BT=jax.lax.dynamic_update_slice(
            halted.gained_BT, gained_B[:, None], (0, halted.step)
        ),
        ended_B=halted.ended_B | (token_B == config.eos_id),
    )


def _keys(draw: Draw | None, batch: Batch, times: int) -> Array:
    """A key for each sequence: the seed's, with example number and sequence number folded in."""
    numbers_B = batch.example_index_BG[:, 0] if draw is None else draw.numbers_B
    fold = jax.vmap(jax.random.fold_in)
    examples_X = jnp.repeat(numbers_B, times).astype(jnp.uint32)
    sequences_X = jnp.tile(jnp.arange(times, dtype=jnp.uint32), len(numbers_B))
    seed = jax.random.key(0 if draw is None else draw.seed)
    seeds_X = jnp.broadcast_to(seed, examples_X.shape)
    return fold(fold(seeds_X, examples_X), sequences_X)
