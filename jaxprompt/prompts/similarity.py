"""How near prompts are to each other, and what is made of the nearest: SPoT's retrieval.

Vu et al. 2022 (arXiv 2110.07904, section 4): a prompt is the embedding of its task. Arithmetic of
rows alone; `transfer` reads the prompts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def per_token(left_PD: np.ndarray, right_PD: np.ndarray) -> float:
    """Mean of the cosines of every slot of one with every slot of the other; lengths may differ."""
    # the mean of all dot products is the dot product of the means
    return float(_directions(left_PD).mean(0) @ _directions(right_PD).mean(0))


def average_tokens(left_PD: np.ndarray, right_PD: np.ndarray) -> float:
    """Cosine of the two prompts' mean slots."""
    left_1D, right_1D = (rows.mean(0, keepdims=True) for rows in (left_PD, right_PD))
    return float((_directions(left_1D) @ _directions(right_1D).T)[0, 0])


SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "per-token": per_token,
    "average-tokens": average_tokens,
}


def weighted_mean(prompts: Sequence[np.ndarray], similarities: Sequence[float]) -> np.ndarray:
    """The prompts' mean by similarity, s_r / sum s, float32 [P, D].

    Raises: ValueError for a similarity that is not above 0.
    """
    if min(similarities) <= 0:
        raise ValueError("a weighted mean takes similarities above 0")
    weights = np.asarray(similarities) / np.sum(similarities)
    return np.einsum("n,npd->pd", weights, np.stack(prompts)).astype(np.float32)


class Joint(NamedTuple):
    """Two groups becoming one: their members in order, and 1 minus their mean similarity."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    height: float


def joints(similarity_QQ: np.ndarray) -> list[Joint]:
    """Groups the likest first, by mean similarity of their members (average linkage).

    Returns: Q - 1 joints, from the closest on; the last one holds all in the order of a tree.
    """
    groups = [(number,) for number in range(len(similarity_QQ))]
    found = []
    while len(groups) > 1:
        pairs = [(a, b) for b in range(len(groups)) for a in range(b)]
        means = [similarity_QQ[np.ix_(groups[a], groups[b])].mean() for a, b in pairs]
        best = int(np.argmax(means))
        a, b = pairs[best]
        found.append(Joint(groups[a], groups[b], 1 - float(means[best])))
        groups = [*(g for n, g in enumerate(groups) if n not in (a, b)), groups[a] + groups[b]]
    return found


def _directions(rows_PD: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays one."""
    rows_PD = rows_PD.astype(np.float64)
    return rows_PD / np.maximum(np.linalg.norm(rows_PD, axis=1, keepdims=True), 1e-12)
