"""A whole search as one pure function; called through `model.PromptedT5.generate`."""

import jax.numpy as jnp

from jaxprompt.t5.beam import beam_search
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.search import Rules
from jaxprompt.t5.stepwise import Draw, go_on, result, start
from jaxprompt.typing import Array, ArrayTree, Batch, PromptValues


def generate(
    params: ArrayTree,
    config: T5Config,
    compute: Compute,
    batch: Batch,
    values: PromptValues,
    encoded_BSD: Array,
    rules: Rules,
    draw: Draw | None = None,
) -> Generated:
    """Answers of every example of a batch, found as `rules` says.

    Args:
      batch: one segment a row; its decoder fields hold the beginning (start token, decoder slots),
        equally long in every row. Rows without an example end at once.
      values: prompt values of the batch.
      encoded_BSD: the encoder's output.
      draw: for sampling, as `stepwise.start` takes it.
    Raises: ValueError if a row has several segments.
    """
    given = (params, config, compute, batch, values, encoded_BSD, rules)
    if rules.num_beams > 1:
        return beam_search(*given)
    halted = start(*given, draw)
    longest = jnp.asarray(rules.max_new_tokens, jnp.int32)
    return result(config, go_on(params, config, compute, rules, halted, longest))
