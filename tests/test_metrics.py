"""Scores against numbers worked out by hand and against slow formulas written out here."""

import itertools
import math
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprompt.metrics import (
    METRICS,
    Extra,
    bootstrap_interval,
    find_metric,
    illegal_count,
    label_distribution,
    majority_baseline,
)
from jaxprompt.text_match import normalize_squad
from jaxprompt.typing import UserError

YES_NO = Extra(candidates=("no", "yes"), positive_label="yes")
ABC = Extra(candidates=("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "targets", "predictions", "extra", "percent"),
    [
        ("accuracy", "abba", "abbb", Extra(), 75.0),
        ("accuracy", ["yes"], ["Yes"], Extra(), 0.0),
        ("exact_match", ["x", "y"], ["x1", "y"], Extra(references=(["x", "x1"], [])), 100.0),
        ("squad_exact_match", ["The big  cat."], ["a Big cat"], Extra(), 100.0),
        # Tokens "in old town" and "old town hall": 2 common of 3 and 3.
        ("token_f1", ["in the old town"], ["Old town hall!"], Extra(), 200 / 3),
        ("token_f1", ["x", "q"], ["x y", "y"], Extra(references=(["x", "x y"], ["q"])), 50.0),
        ("token_f1", ["the"], ["a"], Extra(), 0.0),  # nothing left of either
        # Hits 1, predicted 2, actual 2.
        ("f1", ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"], YES_NO, 50.0),
        # "maybe" turns into "no" for a yes and into "yes" for a no.
        ("f1", ["no", "yes", "yes", "no"], ["no", "yes", "maybe", "maybe"], YES_NO, 50.0),
        ("f1", ["no", "no"], ["no", "no"], YES_NO, 0.0),
        # F1 of a: 2/3, of b: 0, of c: 2/3.
        ("macro_f1", "abbc", "aacc", ABC, 400 / 9),
        # a: hit 1, predicted 1, actual 2; b: 1, 1, 1; c never occurs; x is nothing.
        ("macro_f1", "aab", "axb", ABC, 100 * (2 / 3 + 1 + 0) / 3),
        ("macro_f1", "aab", "axb", Extra(), 100 * (2 / 3 + 1) / 2),
        # Counts: both positive 2, both negative 1, missed 1, false alarm 1.
        ("mcc", "yyynn", "yynyn", Extra(("y", "n")), 100 * (2 * 1 - 1 * 1) / math.sqrt(36)),
        ("mcc", "aacb", "abcb", ABC, 70.0),
        ("mcc", "aabb", "aaaa", ABC, 0.0),
        ("pearson", ["1", "2", "3"], ["2", "4", "6"], Extra(), 100.0),
        ("pearson", ["1", "2", "3"], ["3", "2", "1"], Extra(), -100.0),
        ("pearson", ["1", "2", "3"], ["0.1", "0.1", "0.1"], Extra(), 0.0),
        ("pearson", ["-1", "0", "1"], ["good", "0", "1"], Extra(), 100.0),
        ("pearson", ["-1", "0", "1"], ["nan", "0", "1"], Extra(), 100.0),
        ("spearman", ["0", "2", "1"], ["0", "1", "2"], Extra(), 50.0),
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
        ("spearman", ["0", "1", "1", "9"], ["0", "1", "2", "3"], Extra(), 100 * 4.5 / 22.5**0.5),
        # "the cat sat" of "the cat": unigrams 2 of 3 and 2, bigrams 1 of 2 and 1.
        ("rouge1", ["The cat sat."], ["the cat"], Extra(), 80.0),
        ("rouge2", ["The cat sat."], ["the cat"], Extra(), 200 / 3),
        ("rouge2", ["The cat sat."], ["the"], Extra(), 0.0),
        # Longest common subsequence "a c d" of 4 and 5 tokens.
        ("rougeL", ["a b c d"], ["a c x-d y"], Extra(), 600 / 9),
        ("rougeL", ["..."], [""], Extra(), 0.0),
    ],
)
def test_score_by_hand(name, targets, predictions, extra, percent):
    score = METRICS[name](list(targets), list(predictions), extra)
    assert isinstance(score, float)
    assert score == pytest.approx(percent, abs=1e-9)


def test_multirc_scores_by_hand():
    targets = ["yes", "no", "yes", "no", "yes"]
    predictions = ["yes", "no", "no", "no", "yes"]
    extra = Extra(("no", "yes"), "yes", groups=["q1", "q1", "q2", "q2", "q3"])
    assert METRICS["f1a"](targets, predictions, extra) == pytest.approx(100 * 2 * 2 / (2 + 3))
    assert METRICS["f1a"](targets, predictions, extra) == METRICS["f1"](targets, predictions, extra)
    assert METRICS["group_exact_match"](targets, predictions, extra) == pytest.approx(200 / 3)


def pearson_oracle(x, y):
    return np.corrcoef(x, y)[0, 1]


def spearman_oracle(x, y):
    def ranks(values):
        return [
            sum(other < v for other in values) + (1 + sum(other == v for other in values)) / 2
            for v in values
        ]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


@pytest.mark.parametrize(
    ("name", "oracle"), [("pearson", pearson_oracle), ("spearman", spearman_oracle)]
)
def test_correlation_of_random_numbers(name, oracle):
    rng = np.random.default_rng(3)
    for _ in range(5):
        x = rng.integers(0, 11, 40) / 2
        y = np.round(x + rng.normal(size=40), 1) + 1000
        score = METRICS[name]([str(v) for v in x], [str(v) for v in y])
        assert score == pytest.approx(100 * oracle(x, y), abs=1e-8)


def test_matthews_is_the_correlation_of_two_classes():
    rng = np.random.default_rng(4)
    for _ in range(5):
        x, y = rng.integers(0, 2, (2, 30))
        score = METRICS["mcc"]([str(v) for v in x], [str(v) for v in y], Extra(("0", "1")))
        assert score == pytest.approx(100 * pearson_oracle(x, y), abs=1e-9)


words = st.lists(st.sampled_from("abc"), max_size=7)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_longest_common_subsequence_against_brute_force(wanted, said):
    def subsequences(tokens):
        sizes = range(len(tokens) + 1)
        return {pick for size in sizes for pick in itertools.combinations(tokens, size)}

    longest = max(map(len, subsequences(wanted) & subsequences(said)))
    expected = 200 * longest / (len(wanted) + len(said)) if longest else 0.0
    score = METRICS["rougeL"]([" ".join(wanted)], [" ".join(said)])
    assert score == pytest.approx(expected)


def test_squad_normalisation():
    assert normalize_squad("  The U.S.A., an  old\tTheatre-a ") == "usa old theatrea"


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("f1", Extra(("no", "yes")), "one of ['no', 'yes'], got ''"),
        ("f1", Extra(("no", "yes"), "Yes"), "got 'Yes'"),
        ("f1", Extra(("no",), "no"), "target 'yes' is none of the candidates ['no']"),
        ("mcc", Extra(("no",)), "target 'yes' is none of the candidates ['no']"),
        ("f1a", YES_NO, "f1a and group_exact_match need every example's group"),
        ("group_exact_match", YES_NO, "need every example's group"),
        ("pearson", Extra(), "targets that are numbers, got 'yes'"),
    ],
)
def test_missing_extra_is_a_user_error(name, extra, said):
    with pytest.raises(UserError) as error:
        METRICS[name](["yes", "no"], ["yes", "no"], extra)
    assert said in str(error.value)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="accuracy: 1 predictions for 2 targets"):
        METRICS["accuracy"](["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions for 2 targets"):
        METRICS["accuracy"](["a", "b"], [])
    with pytest.raises(ValueError, match="1 groups for 2 targets"):
        METRICS["accuracy"](["a", "b"], ["a", "b"], Extra(groups=["g"]))
    with pytest.raises(UserError, match="accuracy needs at least one example"):
        METRICS["accuracy"]([], [])


def test_find_metric_names_the_nearest():
    assert find_metric("mcc") is METRICS["mcc"]
    with pytest.raises(UserError, match=r"'acuracy' \(did you mean accuracy\?\); there are: acc"):
        find_metric("acuracy")
    assert all(METRICS[name].name == name for name in METRICS)


def test_bleu_without_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'jaxprompt\[bleu\]'"):
        METRICS["bleu"](["a"], ["a"])


class FakeBleu:
    """Counts equal words as its one order of n-grams and scores their precision."""

    def __init__(self, effective_order):
        assert effective_order

    def sentence_score(self, hypothesis, references):
        said, wanted = hypothesis.split(), references[0].split()
        counts = [sum(a == b for a, b in zip(said, wanted, strict=False))]
        return types.SimpleNamespace(
            counts=counts, totals=[len(said)], sys_len=len(said), ref_len=len(wanted)
        )

    @staticmethod
    def compute_bleu(correct, total, sys_len, ref_len):
        assert all(isinstance(n, int) for n in (*correct, *total, sys_len, ref_len))
        return types.SimpleNamespace(score=100 * correct[0] / max(total[0], ref_len))


def test_bleu_is_computed_from_the_counts_of_the_whole_corpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", types.SimpleNamespace(BLEU=FakeBleu))
    targets, predictions = ["a b c d", "x y"], ["a b q", "x y"]
    assert METRICS["bleu"](targets, predictions) == pytest.approx(100 * 4 / 6)
    low, high = bootstrap_interval(METRICS["bleu"], targets, predictions)
    assert (low, high) == (pytest.approx(50.0), pytest.approx(100.0))


def test_bleu_with_sacrebleu_itself():
    sacrebleu = pytest.importorskip("sacrebleu")
    targets = ["the cat sat on the mat today", "a dog barked at the old man"]
    predictions = ["the cat sat on a mat today", "a dog barked at the man"]
    expected = sacrebleu.corpus_bleu(predictions, [targets]).score
    assert METRICS["bleu"](targets, predictions) == pytest.approx(expected)


def slow_interval(metric, targets, predictions, extra, rounds):
    """Draws examples one resample at a time and scores the lists."""
    rng = np.random.default_rng(11)
    scores = []
    for _ in range(rounds):
        picks = rng.integers(0, len(targets), len(targets))
        scores.append(metric([targets[i] for i in picks], [predictions[i] for i in picks], extra))
    return np.quantile(scores, [0.025, 0.975])


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "mcc", "pearson", "spearman"])
def test_interval_agrees_with_resampling_the_lists(name):
    rng = np.random.default_rng(5)
    extra = Extra() if name in ("pearson", "spearman") else Extra(("0", "1", "2"), "1")
    targets = [str(v) for v in rng.integers(0, 3, 60)]
    wrong = [str(v) for v in rng.integers(-1, 3, 60)]
    kept = rng.random(60) < 0.6
    predictions = [t if keep else w for t, w, keep in zip(targets, wrong, kept, strict=True)]
    metric = METRICS[name]
    interval = bootstrap_interval(metric, targets, predictions, extra, rounds=4000)
    assert interval == pytest.approx(
        slow_interval(metric, targets, predictions, extra, 800), abs=2.5
    )
    assert interval[0] < metric(targets, predictions, extra) < interval[1]


def test_interval_of_accuracy_is_the_binomial_one():
    targets = ["a"] * 1000
    predictions = ["a"] * 800 + ["b"] * 200
    low, high = bootstrap_interval(METRICS["accuracy"], targets, predictions, rounds=5000)
    half = 1.96 * 100 * math.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == (pytest.approx(80 - half, abs=0.3), pytest.approx(80 + half, abs=0.3))


def test_interval_draws_whole_groups():
    # One wrong group of fifty examples: drawn 0, 1, 2... times, never in part.
    targets = ["yes"] * 100
    predictions = ["no"] * 50 + ["yes"] * 50
    extra = Extra(("no", "yes"), "yes", groups=[0] * 50 + [1] * 50)
    low, high = bootstrap_interval(METRICS["f1a"], targets, predictions, extra)
    assert (low, high) == (0.0, 100.0)


def test_interval_is_seeded_and_nested_and_chunked(monkeypatch):
    rng = np.random.default_rng(6)
    targets = [str(v) for v in rng.normal(size=50)]
    predictions = [str(float(v) + rng.normal()) for v in targets]

    def interval(**options):
        return bootstrap_interval(METRICS["spearman"], targets, predictions, **options)

    assert interval(seed=1) == interval(seed=1) != interval(seed=2)
    wide, narrow = interval(level=0.99), interval(level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    whole = interval()
    monkeypatch.setattr("jaxprompt.metrics._CELLS_AT_ONCE", 5000)
    assert interval() == pytest.approx(whole)


def test_interval_of_a_certain_score_has_no_width():
    assert bootstrap_interval(METRICS["accuracy"], ["a", "b"], ["a", "b"]) == (100.0, 100.0)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"rounds": 0}])
def test_interval_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match="must be inside"):
        bootstrap_interval(METRICS["accuracy"], ["a"], ["a"], **options)


def test_illegal_count():
    assert illegal_count(["yes", "Yes", "", "no"], ["yes", "no"]) == 2
    assert illegal_count(["a", "b"], [["a", "x"], ["x", "y"]]) == 1
    assert illegal_count(["anything"], []) == 0
    assert illegal_count([], ["yes"]) == 0
    with pytest.raises(ValueError, match="zip"):
        illegal_count(["a", "b"], [["a"]])


def test_label_distribution_and_majority():
    values = ["b", "a", "c", "c", "b"]
    assert list(label_distribution(values).items()) == [("b", 2), ("c", 2), ("a", 1)]
    assert majority_baseline(values) == ("b", 40.0)
    assert label_distribution([]) == {}
    with pytest.raises(UserError, match="at least one target"):
        majority_baseline([])
