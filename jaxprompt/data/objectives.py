"""Pretraining objectives: token ids of a text -> inputs and targets, as T5 makes them.

`pretraining` applies these to the entries of a mixture.
"""

from collections.abc import Sequence

import numpy as np

Ids = list[int]


def span_counts(
    length: int, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> tuple[int, int]:
    """How many tokens of `length` span corruption takes out, and in how many spans.

    At least one token and one span; at least as many tokens are kept as there are spans.
    """
    noise_count = int(np.clip(np.round(length * noise_density), 1, max(1, length - 1)))
    spans = np.round(noise_count / mean_span_length)
    return noise_count, int(np.clip(spans, 1, max(1, min(noise_count, length - noise_count))))


def random_spans_mask(
    length: int,
    rng: np.random.Generator,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> np.ndarray:
    """Which tokens are noise: spans that alternate with kept ones, a kept one first.

    Returns: bool [length], with round(length * noise_density) true (at least 1, at most length -
      1).
    Source: Raffel et al. 2020, section 3.1.4; `random_spans_noise_mask` of the T5 code.
    """
    noise_count, span_count = span_counts(length, noise_density, mean_span_length)
    noise_spans = _segment_lengths(noise_count, span_count, rng)
    kept_spans = _segment_lengths(length - noise_count, span_count, rng)
    lengths = np.stack([kept_spans, noise_spans], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], span_count), lengths)


def span_corruption(
    ids: Sequence[int],
    rng: np.random.Generator,
    sentinel_ids: Sequence[int],
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tuple[Ids, Ids]:
    """Inputs with every noise span replaced by a sentinel, and targets with what was taken out.

    Args:
      ids: at least 2 tokens, no end token.
      sentinel_ids: `<extra_id_0>`, `<extra_id_1>`, ...; as many as there are spans.
    Returns: inputs and targets, without end tokens; each target span follows its sentinel.
    Source: `noise_span_to_unique_sentinel` and its complement in the T5 code.
    """
    mask = random_spans_mask(len(ids), rng, noise_density, mean_span_length)
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    tokens, sentinels = np.asarray(ids), np.asarray(sentinel_ids)[: starts.sum()]
    inputs = tokens.copy()
    inputs[starts] = sentinels
    targets = np.insert(tokens[mask], np.flatnonzero(starts[mask]), sentinels)
    return inputs[starts | ~mask].tolist(), targets.tolist()


def prefix_lm(
    ids: Sequence[int],
    rng: np.random.Generator,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
) -> tuple[Ids, Ids]:
    """A text cut in two at a random place: the prefix is the input, the rest the target.

    Args:
      ids: at least 2 tokens, no end token.
      max_input_length, max_target_length: bounds of the two parts, none unless given.
    Returns: prefix and rest, without end tokens, cut uniformly among the places the bounds allow.
    Source: Raffel et al. 2020, section 3.2.1, and Lester et al. 2021, section 3.1 (LM adaptation).
    """
    longest = len(ids) - 1 if max_input_length is None else min(len(ids) - 1, max_input_length)
    shortest = 1 if max_target_length is None else max(1, len(ids) - max_target_length)
    cut = int(rng.integers(shortest, longest + 1))
    return list(ids[:cut]), list(ids[cut:])


def _segment_lengths(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """`items` divided at random into `segments` lengths of at least one."""
    cuts = np.sort(rng.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))
