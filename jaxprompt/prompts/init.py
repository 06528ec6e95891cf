"""Where the first prompt rows come from: one function per kind, each (key, P, context) -> [P, D].

The context gives what a kind may need (embedding rows, tokenizer, candidates, files), so this room
needs no backbone and no file format.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprompt.prompts.base import MethodConfig, Sizes
from jaxprompt.typing import Array, UserError


@dataclasses.dataclass(frozen=True)
class InitContext:
    """What initialisers may read.

    Attributes:
      sizes: of the backbone.
      vocab_size: ids the tokenizer can produce.
      rows: ids -> float32 [n, D] rows of the backbone's embedding table.
      encode: text -> ids, without `</s>`.
      candidates: label words of the task.
      load: path of an artifact or .npy -> float32 [P', D].
      artifact: path of an artifact of this backbone -> its method's options and its values.
      source: path of a soft prompt of this backbone -> float32 [P', D].
    """

    sizes: Sizes
    vocab_size: int
    rows: Callable[[Sequence[int]], np.ndarray]
    encode: Callable[[str], list[int]]
    candidates: tuple[str, ...] = ()
    load: Callable[[str], np.ndarray] | None = None
    artifact: Callable[[str], tuple[Mapping[str, Any], Mapping[str, np.ndarray]]] | None = None
    source: Callable[[str], np.ndarray] | None = None


def initial_rows(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    """First values of a [P, D] prompt as `config.init` says, float32.

    Raises: UserError for a text or label without tokens, a file of another shape, a task without
      candidates.
    """
    rows = INITIALISERS[config.init](key, config, context).astype(np.float32)
    if rows.shape != (config.length, context.sizes.d_model):
        raise UserError(
            f"the initial prompt is {' x '.join(map(str, rows.shape))}, the run wants "
            f"method.length {config.length} x backbone d_model {context.sizes.d_model}"
        )
    return rows


def sampled_rows(key: Array, count: int, config: MethodConfig, context: InitContext) -> np.ndarray:
    """Rows of the most common ids (SentencePiece orders by frequency), without replacement.

    Returns: float32 [count, D].
    """
    population = min(config.init_vocab_size, context.vocab_size)
    ids = jax.random.choice(key, population, (count,), replace=count > population)
    return context.rows(np.asarray(ids).tolist())


def linear(key: Array, fan_in: int, *shape: int) -> np.ndarray:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as torch begins its linear layers and LSTMs; float32."""
    bound = fan_in**-0.5
    return np.asarray(jax.random.uniform(key, shape, minval=-bound, maxval=bound))


def factors(rows_PD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best A [P, r] and B [r, D] with A B = rows (Eckart-Young), balanced: A^T A = B B^T."""
    left, sizes, right = np.linalg.svd(rows_PD, full_matrices=False)
    roots = np.sqrt(sizes[:rank])
    return (left[:, :rank] * roots).astype(np.float32), (roots[:, None] * right[:rank]).astype(
        np.float32
    )


def _uniform(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    shape = (config.length, context.sizes.d_model)
    return np.asarray(
        jax.random.uniform(key, shape, minval=config.init_low, maxval=config.init_high)
    )


def _vocab(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    return sampled_rows(key, config.length, config, context)


def _labels(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    """Mean over each label's sub-tokens, sampled rows for the rest (Lester et al. 2021, 3.1)."""
    if not context.candidates:
        raise UserError("method.init is 'labels' but the task has no candidates")
    means = []
    for label in context.candidates[: config.length]:
        ids = context.encode(label)
        if not ids:
            raise UserError(
                f"candidate {label!r} tokenises to nothing, so it cannot start a prompt"
            )
        means.append(context.rows(ids).mean(axis=0))
    rest = config.length - len(means)
    return (
        np.concatenate([np.stack(means), sampled_rows(key, rest, config, context)])
        if rest
        else np.stack(means)
    )


def _text(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    ids = context.encode(config.init_text)
    if not ids:
        raise UserError(f"method.init_text {config.init_text!r} tokenises to nothing")
    return context.rows([ids[i % len(ids)] for i in range(config.length)])


def _file(key: Array, config: MethodConfig, context: InitContext) -> np.ndarray:
    if context.load is None:
        raise UserError(
            f"method.init {config.init!r} is not possible here: no reader for {config.init_path}"
        )
    return context.load(config.init_path)


INITIALISERS: dict[str, Callable[[Array, MethodConfig, InitContext], np.ndarray]] = {
    "uniform": _uniform,
    "vocab": _vocab,
    "labels": _labels,
    "text": _text,
    "prompt": _file,
    "npy": _file,
}
