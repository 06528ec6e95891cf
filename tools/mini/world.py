"""What the task builders of jaxprompt-mini draw from, and the helpers they share.

Called by `text_tasks.py`, `labelled_tasks.py` and `tasks.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from corpora import Contamination, Document, held_out, sentences_of
from teacher import Crop, Teacher, crops_of
from topics import topic_by_first_sentence, topic_by_words
from wordings import options, treebank

SNIPPET_WORDS = 70  # longest text of most tasks, about 100 tokens
SURE_WITH_LABEL = 0.72  # least teacher probability where the review's label agrees
SURE_WITHOUT_LABEL = 0.82  # least one where the review has no label


@dataclass(frozen=True)
class Row:
    """One example; `candidates` is empty where the target is free text."""

    input: str
    target: str
    candidates: list[str]
    task: str = ""


@dataclass
class World:
    """What the builders of one split draw from."""

    data: Path
    documents: list[Document]
    is_valid: bool
    teacher: Teacher
    contamination: Contamination
    rng: random.Random
    by_source: dict[str, list[Document]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_source = defaultdict(list)
        for document in self.documents:
            self.by_source[document.source].append(document)

    @cached_property
    def crops(self) -> dict[int, list[Crop]]:
        """As many crops of either label, those the teacher is surest of, in random order."""
        reviews = self.by_source["imdb"]
        crops = [crop for review in reviews for crop in crops_of(review, self.rng)]
        chances = self.teacher.probabilities([crop.text for crop in crops]).tolist()
        sure: dict[int, list[tuple[float, Crop]]] = {0: [], 1: []}
        for crop, chance in zip(crops, chances, strict=True):
            label = int(chance > 0.5)
            sureness = max(chance, 1 - chance)
            least = SURE_WITHOUT_LABEL if crop.label is None else SURE_WITH_LABEL
            if sureness < least or crop.label not in (None, label):
                continue
            if crop.sentences > 1 or self.teacher.has_evidence(crop.text, label):
                sure[label].append((sureness, crop))
        count = min(map(len, sure.values()))
        kept = {}
        for label, found in sure.items():
            found.sort(key=lambda pair: pair[0], reverse=True)
            kept[label] = [crop for _, crop in found[:count]]
            self.rng.shuffle(kept[label])
        return kept

    @cached_property
    def topic_texts(self) -> dict[str, list[str]]:
        """Weakly labelled texts by topic, in random order."""
        found: dict[str, list[str]] = defaultdict(list)
        for document in self.documents:
            for topic, text in _topic_texts(document, self.rng):
                found[topic].append(text)
        for texts in found.values():
            self.rng.shuffle(texts)
        return dict(found)

    def mine(self, key: str) -> bool:
        """Whether the labelled example named by `key` belongs to this split."""
        return held_out(key) == self.is_valid

    def clean(self, *texts: str) -> bool:
        """Whether no evaluation text is in any of `texts`."""
        return all(self.contamination.find(text) is None for text in texts)


def snippet(text: str, rng: random.Random, longest: int = SNIPPET_WORDS, first: int = 0) -> str:
    """Consecutive sentences from `text`, of 8 words to about `longest` in all."""
    sentences = sentences_of(text)
    start = rng.randrange(first, len(sentences)) if len(sentences) > first else 0
    wanted = rng.randint(12, longest)
    taken: list[str] = []
    for sentence in sentences[start:]:
        words = sentence.split()
        if taken and len(taken) + len(words) > wanted:
            break
        taken += words
    return " ".join(taken[:longest])


def styled(text: str, rng: random.Random, share: float) -> str:
    """Lower case with spaced punctuation for the given share of texts."""
    return treebank(text) if rng.random() < share else text


def choose_some(rng: random.Random, pool: Sequence[str], right: str, count: int) -> list[str]:
    """`right` and others of the pool, `count` in all, in random order."""
    chosen = {right}
    while len(chosen) < count:
        chosen.add(rng.choice(pool))
    return rng.sample(sorted(chosen), len(chosen))


def spelled(rng: random.Random, words: Sequence[str], index: int) -> tuple[str, list[str], str]:
    """(target, candidates, list of the candidates as text)."""
    return words[index], list(words), options(rng, words)


def _topic_texts(document: Document, rng: random.Random) -> Iterator[tuple[str, str]]:
    sentences = sentences_of(document.text)
    if document.source == "wikipedia":
        name = topic_by_first_sentence(sentences[0])
        if name:
            yield name, snippet(document.text, rng, 45)
            if len(sentences) > 4:
                yield name, snippet(document.text, rng, 45, first=1)
    for start in range(len(sentences)):
        text = " ".join(sentences[start : start + rng.randint(1, 2)])
        if 5 <= len(text.split()) <= 45:
            name = topic_by_words(text)
            if name:
                yield name, text
