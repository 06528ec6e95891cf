"""Scores of predictions against targets, in percent, with bootstrap intervals; numpy only.

Called by evaluate and by the evaluations of a training run. A metric is a table of rows that may be
weighted, so the score and a thousand resampled scores come from the same formula.
"""

import collections
import dataclasses
import difflib
import functools
import importlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxprompt.text_match import refers, rouge_l, rouge_n, squad_match, token_f1
from jaxprompt.typing import UserError

_CELLS_AT_ONCE = 2**21  # resampled weights held in memory at a time: 16 MiB of float64


@dataclasses.dataclass(frozen=True)
class Extra:
    """What some metrics need beside targets and predictions; everything may stay empty.

    Attributes:
      candidates: the class names, for `f1`, `macro_f1`, `mcc`; empty = the targets that occur.
      positive_label: the class that `f1` and `f1a` look for.
      groups: one group id an example (MultiRC: its question), for `f1a`, `group_exact_match`.
      references: every accepted answer of each example, for the text metrics; empty = its target.
    """

    candidates: Sequence[str] = ()
    positive_label: str = ""
    groups: Sequence[str | int] = ()
    references: Sequence[Sequence[str]] = ()


class Repeated:
    """What was run with several seeds.

    Attributes: scores, of each seed whose numbers stayed finite.
    """

    scores: Sequence[float]

    @property
    def mean(self) -> float | None:
        """Over seeds; None without any."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


NO_EXTRA = Extra()
_Texts = Sequence[str]
_Rows = Callable[[_Texts, _Texts, Extra], np.ndarray]
_Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One score in percent.

    Attributes:
      name: its key in `METRICS`.
      rows: (targets, predictions, extra) -> float64 [U, K], what each of U resampling units (an
        example, or a group of them) adds.
      score: (rows [M, K], weights [R, M]) -> float64 [R], a fraction, where a weight counts how
        often a row is there. A score whose formula divides by zero is 0.
    """

    name: str
    rows: _Rows
    score: _Score

    def __call__(
        self, targets: Sequence[str], predictions: Sequence[str], extra: Extra = NO_EXTRA
    ) -> float:
        """The score in percent (correlations: -100 to 100) of one target and prediction an example.

        Raises: ValueError if the lengths differ; UserError without examples, or where `extra` lacks
          what this metric needs.
        """
        rows_UK = self.checked_rows(targets, predictions, extra)
        return float(100 * self.score(rows_UK, np.ones((1, len(rows_UK))))[0])

    def checked_rows(self, targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
        """`rows` after a look at the lengths; raises as `__call__` does."""
        given = {"predictions": predictions, "groups": extra.groups, "references": extra.references}
        for what, values in given.items():
            if len(values) != len(targets) and (len(values) or what == "predictions"):
                raise ValueError(f"{self.name}: {len(values)} {what} for {len(targets)} targets")
        if not len(targets):
            raise UserError(f"metric {self.name} needs at least one example to score, got none")
        return np.asarray(self.rows(targets, predictions, extra), np.float64)


def find_metric(name: str) -> Metric:
    """The metric of that name; UserError names the nearest one and all there are."""
    if name in METRICS:
        return METRICS[name]
    nearest = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise UserError(f"unknown metric {name!r}{hint}; there are: {', '.join(METRICS)}")


def bootstrap_interval(
    metric: Metric,
    targets: Sequence[str],
    predictions: Sequence[str],
    extra: Extra = NO_EXTRA,
    *,
    seed: int = 0,
    level: float = 0.95,
    rounds: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a score, in percent: (low, high).

    Examples are drawn with replacement; whole groups, for a metric over groups. Equal rows are
    drawn as one multinomial count, which is the same distribution and makes large sets quick.

    Args:
      level: share of the `rounds` resampled scores that lie inside, between 0 and 1.
    Raises: ValueError for a level or rounds out of range; else as the metric.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if not 0 < level < 1 or rounds < 1:
        raise ValueError(f"level {level} must be inside (0, 1) and rounds {rounds} at least 1")
    rows_UK = metric.checked_rows(targets, predictions, extra)
    rows_MK, counts_M = np.unique(rows_UK, axis=0, return_counts=True)
    units = int(counts_M.sum())
    rng = np.random.default_rng(seed)
    scores = []
    for part in np.array_split(np.arange(rounds), 1 + rounds * len(rows_MK) // _CELLS_AT_ONCE):
        weights_RM = rng.multinomial(units, counts_M / units, size=len(part))
        scores.append(metric.score(rows_MK, weights_RM.astype(np.float64)))
    tail = (1 - level) / 2
    low, high = 100 * np.quantile(np.concatenate(scores), [tail, 1 - tail])
    return float(low), float(high)


def illegal_count(
    predictions: Sequence[str], candidates: Sequence[str] | Sequence[Sequence[str]]
) -> int:
    """How many predictions are none of the candidates.

    Args:
      candidates: one list for all, or one list an example (COPA, ReCoRD); with no candidates at all
        nothing is illegal.
    """
    if not len(candidates):
        return 0
    shared = isinstance(candidates[0], str)
    each = [candidates] * len(predictions) if shared else candidates
    return sum(p not in allowed for p, allowed in zip(predictions, each, strict=True))


def label_distribution(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, the most frequent first, ties by name."""
    counts = collections.Counter(values)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def majority_baseline(targets: Sequence[str]) -> tuple[str, float]:
    """The most frequent target and the accuracy, in percent, of always answering it.

    For another metric, score `[label] * len(targets)` with it. Raises: UserError without targets.
    """
    if not len(targets):
        raise UserError("a majority baseline needs at least one target, got none")
    label, count = next(iter(label_distribution(targets).items()))
    return label, 100 * count / len(targets)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _mean(rows_M1: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    return (weights_RM @ rows_M1)[:, 0] / weights_RM.sum(axis=1)


def _mean_f1(rows_MK: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    """Unweighted mean of the classes' F1 = 2 hits / (predicted + actual)."""
    hits, predicted, actual = np.split(weights_RM @ rows_MK, 3, axis=1)
    return _divide(2 * hits, predicted + actual).mean(axis=1)


def _matthews(rows_MK: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    """Matthews correlation of any number of classes, everything illegal being one class more.

    Source: Gorodkin 2004, eq. 8; t5.evaluation and the GLUE script give the same number.
    """
    hits, predicted, actual = np.split(weights_RM @ rows_MK, 3, axis=1)
    total_R = weights_RM.sum(axis=1)
    illegal_R = total_R - predicted.sum(axis=1)
    covariance = hits.sum(axis=1) * total_R - (predicted * actual).sum(axis=1)
    spread_predicted = total_R**2 - (predicted**2).sum(axis=1) - illegal_R**2
    spread_actual = total_R**2 - (actual**2).sum(axis=1)
    return _divide(covariance, np.sqrt(spread_predicted * spread_actual))


def _correlation(x_RM: np.ndarray, y_RM: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    total_R1 = weights_RM.sum(axis=1, keepdims=True)
    x_RM = x_RM - (weights_RM * x_RM).sum(axis=1, keepdims=True) / total_R1
    y_RM = y_RM - (weights_RM * y_RM).sum(axis=1, keepdims=True) / total_R1
    spread_R = (weights_RM * x_RM**2).sum(axis=1) * (weights_RM * y_RM**2).sum(axis=1)
    covariance_R = (weights_RM * x_RM * y_RM).sum(axis=1)
    return _divide(covariance_R, np.sqrt(np.where(spread_R > 1e-20, spread_R, 0.0)))


def _pearson(rows_M2: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    return _correlation(rows_M2[None, :, 0], rows_M2[None, :, 1], weights_RM)


def _spearman(rows_M2: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    x_RM, y_RM = (_midranks(values_M, weights_RM) for values_M in rows_M2.T)
    return _correlation(x_RM, y_RM, weights_RM)


def _midranks(values_M: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    """Rank of each row in the sample where row m stands weights[r, m] times; ties share theirs."""
    distinct_V, which_M = np.unique(values_M, return_inverse=True)
    order_M = np.argsort(which_M, kind="stable")
    starts_V = np.searchsorted(which_M[order_M], np.arange(len(distinct_V)))
    mass_RV = np.add.reduceat(weights_RM[:, order_M], starts_V, axis=1)
    return (np.cumsum(mass_RV, axis=1) - mass_RV + (mass_RV + 1) / 2)[:, which_M]


def _corpus_bleu(rows_MK: np.ndarray, weights_RM: np.ndarray) -> np.ndarray:
    compute = _sacrebleu().BLEU.compute_bleu
    order = (rows_MK.shape[1] - 2) // 2
    sums_RK = (weights_RM @ rows_MK).astype(np.int64).tolist()
    scores = [compute(sums[:order], sums[order:-2], *sums[-2:]).score for sums in sums_RK]
    return np.asarray(scores) / 100


def _accuracy_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    return np.asarray([[t == p] for t, p in zip(targets, predictions, strict=True)])


def _labels(targets: _Texts, extra: Extra) -> list[str]:
    labels = list(extra.candidates) or sorted(set(targets))
    strange = sorted(set(targets).difference(labels))
    if strange:
        raise UserError(f"target {strange[0]!r} is none of the candidates {labels}")
    return labels


def _class_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """[B, 3 C]: hit, predicted, actual of each class; an illegal prediction is none of them.

    Source: t5.evaluation mean_multiclass_f1, where a class that never occurs counts as F1 0.
    """
    number = {label: place for place, label in enumerate(_labels(targets, extra))}
    numbers_2B = np.asarray([[number.get(text, -1) for text in s] for s in (predictions, targets)])
    predicted_BC, actual_BC = numbers_2B[:, :, None] == np.arange(len(number))
    return np.concatenate([predicted_BC & actual_BC, predicted_BC, actual_BC], axis=1)


def _positive_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """[B, 3]: hit, predicted, actual of the positive label; an illegal prediction is turned wrong.

    Source: t5.evaluation f1_score_with_invalid.
    """
    labels, positive = _labels(targets, extra), extra.positive_label
    if positive not in labels:
        raise UserError(f"F1 needs positive_label to be one of {labels}, got {positive!r}")
    actual_B = np.asarray([target == positive for target in targets])
    predicted_B = np.asarray([prediction == positive for prediction in predictions])
    illegal_B = np.asarray([prediction not in labels for prediction in predictions])
    predicted_B = np.where(illegal_B, ~actual_B, predicted_B)
    return np.stack([actual_B & predicted_B, predicted_B, actual_B], axis=1)


def _group_of_each(extra: Extra) -> tuple[np.ndarray, int]:
    if not len(extra.groups):
        raise UserError("f1a and group_exact_match need every example's group (MultiRC: question)")
    names, group_B = np.unique([str(group) for group in extra.groups], return_inverse=True)
    return group_B, len(names)


def _f1a_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """F1 over all answers (Khashabi et al. 2018), one row a question, to be drawn together."""
    group_B, groups = _group_of_each(extra)
    sums_GK = np.zeros((groups, 3))
    np.add.at(sums_GK, group_B, _positive_rows(targets, predictions, extra))
    return sums_GK


def _group_match_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """1 for a group whose every example is right: exact match of MultiRC (Wang et al. 2019)."""
    group_B, groups = _group_of_each(extra)
    match_G1 = np.ones((groups, 1))
    np.minimum.at(match_G1, group_B, _accuracy_rows(targets, predictions, extra))
    return match_G1


def _number_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """[B, 2] in unit range; a prediction that is no number is -1 (t5.data string_to_float)."""
    wrong = [target for target in targets if np.isnan(_number(target, np.nan))]
    if wrong:
        raise UserError(f"a correlation needs targets that are numbers, got {wrong[0]!r}")
    pairs = zip(targets, predictions, strict=True)
    rows_B2 = np.asarray([(_number(t, np.nan), _number(p, -1.0)) for t, p in pairs])
    range_2 = np.ptp(rows_B2, axis=0)  # unit range, so that one threshold says "constant"
    return (rows_B2 - rows_B2.min(axis=0)) / np.where(range_2 > 0, range_2, 1.0)


def _number(text: str, default: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return default
    return number if np.isfinite(number) else default


def _references(targets: _Texts, extra: Extra) -> list[list[str]]:
    several = extra.references or [()] * len(targets)
    return [list(s) or [target] for s, target in zip(several, targets, strict=True)]


def _best(similarity: Callable[[str, str], float]) -> _Rows:
    """Rows for texts: the best of similarity(reference, prediction) over the references."""

    def rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
        pairs = zip(_references(targets, extra), predictions, strict=True)
        return np.asarray([[max(similarity(r, p) for r in several)] for several, p in pairs])

    return rows


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        hint = "pip install 'jaxprompt[bleu]'"
        raise UserError(f"metric bleu needs the package sacrebleu: {hint}") from error


def _bleu_rows(targets: _Texts, predictions: _Texts, extra: Extra) -> np.ndarray:
    """Counts of corpus BLEU (Post 2018): sacreBLEU's defaults, tokenizer 13a, mixed case."""
    bleu = _sacrebleu().BLEU(effective_order=True)  # changes sentence scores, which go unused
    pairs = zip(_references(targets, extra), predictions, strict=True)
    scores = [bleu.sentence_score(prediction, several) for several, prediction in pairs]
    return np.asarray([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy_rows, _mean),
        Metric("exact_match", _best(str.__eq__), _mean),
        Metric("squad_exact_match", _best(squad_match), _mean),
        Metric("token_f1", _best(token_f1), _mean),
        Metric("referent", _best(refers), _mean),
        Metric("f1", _positive_rows, _mean_f1),
        Metric("f1a", _f1a_rows, _mean_f1),
        Metric("group_exact_match", _group_match_rows, _mean),
        Metric("macro_f1", _class_rows, _mean_f1),
        Metric("mcc", _class_rows, _matthews),
        Metric("pearson", _number_rows, _pearson),
        Metric("spearman", _number_rows, _spearman),
        Metric("rouge1", _best(functools.partial(rouge_n, n=1)), _mean),
        Metric("rouge2", _best(functools.partial(rouge_n, n=2)), _mean),
        Metric("rougeL", _best(rouge_l), _mean),
        Metric("bleu", _bleu_rows, _corpus_bleu),
    )
}
