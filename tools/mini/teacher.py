"""Bag-of-n-grams sentiment teacher that labels crops of film reviews.

Called by `tasks.py`. Trained on labelled IMDB training reviews only: on whole reviews and on
crops of them, every crop with its review's label, so that short texts get calibrated chances.
Source of the features: Wang and Manning 2012, "Baselines and Bigrams" (NB-SVM, here with a
logistic loss).
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
from corpora import Document, sentences_of
from wordings import treebank

MIN_REVIEWS = 4  # an n-gram of fewer training reviews is not a feature
L2 = 20.0  # best of 1, 5, 20 on crops of held-out IMDB training reviews
# A word is evidence if it is in so many reviews and its log ratio between the labels is as large.
EVIDENCE_REVIEWS = 100
EVIDENCE_RATIO = 0.6
_OPEN_END = re.compile(
    r"\b(?:a|an|the|is|was|are|were|be|been|of|to|for|in|on|at|by|with|from|that|which|who|as|if|"
    r"than|or|not|i|it|he|she|they|we|you|this|his|her|their|my|your|its|when|while|has|have|had)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Crop:
    """A piece of a review: `sentences` is 0 for a phrase within a sentence."""

    text: str
    sentences: int
    label: int | None


def crops_of(document: Document, rng: random.Random) -> Iterator[Crop]:
    """Consecutive runs of 1 (60 %), 2-3 (25 %) or 4-6 (15 %) sentences, and short phrases."""
    sentences = sentences_of(document.text)
    start = 0
    while start < len(sentences):
        draw = rng.random()
        size = 1 if draw < 0.6 else rng.randint(2, 3) if draw < 0.85 else rng.randint(4, 6)
        group = sentences[start : start + size]
        start += size
        words = sum(len(sentence.split()) for sentence in group)
        if 4 * len(group) <= words <= min(40 * len(group), 90):
            yield Crop(" ".join(group), len(group), document.label)
    for sentence in sentences:
        for phrase in re.split(r"[,;:()]\s*|\s--?\s|\.\.+\s*|\b(?:but|and|because)\b", sentence):
            phrase = phrase.strip(" \"'.-")
            if 3 <= len(phrase.split()) <= 10 and not _OPEN_END.search(phrase):
                yield Crop(phrase, 0, document.label)


def ngrams(text: str) -> set[str]:
    """Words, pairs of words and end marks that occur in a text."""
    words = re.findall(r"n't|[a-z0-9]+(?:-[a-z0-9]+)*|[!?]", treebank(text))
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def log_ratio(matrix: scipy.sparse.csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Naive Bayes log ratio of every feature between favourable and unfavourable rows."""
    liked = np.asarray(matrix[labels == 1].sum(0)).ravel() + 1
    disliked = np.asarray(matrix[labels == 0].sum(0)).ravel() + 1
    return np.log(liked / liked.sum()) - np.log(disliked / disliked.sum())


class Teacher:
    """Logistic regression on n-grams scaled by their naive Bayes log ratios."""

    def __init__(self, reviews: Sequence[Document], rng: random.Random):
        labelled = [review for review in reviews if review.label is not None]
        labels = np.array([review.label for review in labelled])
        grams = [ngrams(review.text) for review in labelled]
        counts = Counter(gram for review in grams for gram in review)
        kept = sorted(gram for gram, count in counts.items() if count >= MIN_REVIEWS)
        self._index = {gram: number for number, gram in enumerate(kept)}
        crops = [crop for review in labelled for crop in crops_of(review, rng)]
        crop_labels = np.array([crop.label for crop in crops])
        crop_grams = [ngrams(crop.text) for crop in crops]
        whole = self._matrix(grams)
        both = scipy.sparse.vstack([whole, self._matrix(crop_grams)]).tocsr()
        self._fit(both, np.concatenate([labels, crop_labels]))

        ratio = log_ratio(whole, labels)
        self._evidence = {
            gram: int(ratio[number] > 0)
            for gram, number in self._index.items()
            if " " not in gram
            and counts[gram] >= EVIDENCE_REVIEWS
            and abs(ratio[number]) >= EVIDENCE_RATIO
        }

    def _matrix(self, grams: Sequence[set[str]]) -> scipy.sparse.csr_matrix:
        rows = [sorted(self._index[g] for g in one if g in self._index) for one in grams]
        ends = np.cumsum([0, *map(len, rows)])
        columns = np.fromiter((c for row in rows for c in row), np.int32, int(ends[-1]))
        values = np.ones(len(columns), np.float32)
        return scipy.sparse.csr_matrix((values, columns, ends), (len(rows), len(self._index)))

    def _fit(self, matrix: scipy.sparse.csr_matrix, labels: np.ndarray) -> None:
        ratio = log_ratio(matrix, labels)
        scaled = (matrix @ scipy.sparse.diags(ratio)).tocsr().astype(np.float32)
        signs = labels * 2.0 - 1.0

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            margin = signs * (scaled @ weights[:-1] + weights[-1])
            pull = -signs * scipy.special.expit(-margin)
            value = np.logaddexp(0, -margin).sum() + L2 / 2 * weights[:-1] @ weights[:-1]
            gradient = np.append(scaled.T @ pull + L2 * weights[:-1], pull.sum())
            return float(value), gradient

        start = np.zeros(matrix.shape[1] + 1)
        best = scipy.optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}
        )
        self._weights, self._bias = best.x[:-1] * ratio, best.x[-1]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probability that each text is favourable, float64 [len(texts)]."""
        weights, index, bias = self._weights, self._index, self._bias
        scores = [
            bias + sum(weights[index[gram]] for gram in ngrams(text) if gram in index)
            for text in texts
        ]
        return scipy.special.expit(np.array(scores))

    def has_evidence(self, text: str, label: int) -> bool:
        """Whether a common word that speaks clearly for `label` is in the text."""
        return any(self._evidence.get(gram) == label for gram in ngrams(text))
