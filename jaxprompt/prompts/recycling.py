"""A prompt of one backbone made one of another by way of both vocabularies' embeddings.

Lester et al. 2022 (arXiv 2208.05577) and google-research/prompt-tuning's `recycling/`: the same
words' embeddings in both backbones say how to get from one to the other. Arithmetic of arrays
alone; `transfer` reads backbones and prompts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprompt.typing import Array, ArrayTree

WORDS, SKIPPED = 4000, 1000
_HIDDEN, _RATE, _BATCH, _EPOCHS = 4, 3e-4, 50, 25  # hidden: times the target's width


def linear_map(
    rows_PD: np.ndarray, source_VD: np.ndarray, target_VE: np.ndarray, seed: int
) -> np.ndarray:
    """`v2v-lin`: the prompt times X, of which source X is nearest to target, float32 [P, E]."""
    map_DE, *_ = np.linalg.lstsq(*_doubles(source_VD, target_VE), rcond=None)
    return (rows_PD.astype(np.float64) @ map_DE).astype(np.float32)


def combination(
    rows_PD: np.ndarray, source_VD: np.ndarray, target_VE: np.ndarray, seed: int
) -> np.ndarray:
    """`lin-comb`: the mixture of source words nearest to each row, of target words; float32 [P, E].

    Of the many mixtures that give a row exactly it is the one of least norm: rows pinv(S) T, with
    the words S and T, which is what `linear_map` gives too.
    """
    source_VD, rows_PD = _doubles(source_VD, rows_PD)
    weights_VP, *_ = np.linalg.lstsq(source_VD.T, rows_PD.T, rcond=None)
    return (weights_VP.T @ target_VE.astype(np.float64)).astype(np.float32)


def network(
    rows_PD: np.ndarray, source_VD: np.ndarray, target_VE: np.ndarray, seed: int
) -> np.ndarray:
    """`v2v-nn`: what a network with one hidden layer, trained on the words, makes of the prompt.

    W_2 relu(W_1 x + b_1) + b_2, four times the target's width inside; Adam at 3e-4, 25 epochs in
    batches of 50, half the squared distance by element as the loss.

    Returns: float32 [P, E].
    """
    first, order = jax.random.split(jax.random.key(seed))
    params = _first_network(first, source_VD.shape[1], target_VE.shape[1])
    optimizer = optax.adam(_RATE)
    state = optimizer.init(params)

    @jax.jit
    def step(params: ArrayTree, state: ArrayTree, source: Array, target: Array) -> tuple:
        def loss(params: ArrayTree) -> Array:
            return optax.l2_loss(_applied(params, source), target).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for epoch in range(_EPOCHS):
        key = jax.random.fold_in(order, epoch)
        shuffled = np.asarray(jax.random.permutation(key, len(source_VD)))
        for start in range(0, len(shuffled), _BATCH):
            ids = shuffled[start : start + _BATCH]
            params, state = step(params, state, source_VD[ids], target_VE[ids])
    return np.asarray(_applied(params, jnp.asarray(rows_PD, jnp.float32)))


RECYCLERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]] = {
    "v2v-nn": network,
    "v2v-lin": linear_map,
    "lin-comb": combination,
}


def _first_network(key: Array, width: int, target_width: int) -> ArrayTree:
    """As flax begins its dense layers: LeCun's normal, biases at 0."""
    inner, outer = jax.random.split(key)
    hidden, normal = _HIDDEN * target_width, jax.nn.initializers.lecun_normal()
    return {
        "in": normal(inner, (width, hidden)),
        "in_bias": jnp.zeros((1, hidden)),
        "out": normal(outer, (hidden, target_width)),
        "out_bias": jnp.zeros((1, target_width)),
    }


def _applied(params: ArrayTree, x: Array) -> Array:
    hidden = jax.nn.relu(jnp.matmul(x, params["in"]) + params["in_bias"])
    return jnp.matmul(hidden, params["out"]) + params["out_bias"]


def _doubles(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(array.astype(np.float64) for array in arrays)
