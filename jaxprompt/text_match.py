"""How alike two texts are: what metrics of generated text compare a prediction and an answer by."""

import collections
import re
import string
from collections.abc import Iterable
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose "
    "your".split()
)
_ROUGE_TOKEN = re.compile(r"[a-z0-9]+")


def normalize_squad(text: str) -> str:
    """Lower case, no punctuation, articles or extra spaces (SQuAD 1.1's evaluation script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad_match(reference: str, prediction: str) -> bool:
    """Whether two texts are the same once normalised."""
    return normalize_squad(reference) == normalize_squad(prediction)


def refers(reference: str, prediction: str) -> bool:
    """Whether two noun phrases have one's words within the other's, or with `not NOUN` do not.

    Source: T5's scoring of WSC (Raffel et al. 2020, section 2.4; `wsc_simple` of the package t5).
    """
    noun = reference.removeprefix("not ")
    wanted, said = (
        set(text.lower().replace("'", " ").translate(_NO_PUNCTUATION).split()) - _DETERMINERS
        for text in (noun, prediction)
    )
    same = bool(wanted and said) and (wanted <= said or said <= wanted)
    return same == (noun == reference)


def token_f1(reference: str, prediction: str) -> float:
    """F1 of the words of two normalised texts.

    Source: Rajpurkar et al. 2016, the official SQuAD 1.1 evaluation script.
    """
    return _overlap_f1(normalize_squad(reference).split(), normalize_squad(prediction).split())


def rouge_n(reference: str, prediction: str, n: int) -> float:
    """F-measure of n-grams. Source: Lin 2004; tokens as google-research/rouge, unstemmed."""
    texts = [_ROUGE_TOKEN.findall(text.lower()) for text in (reference, prediction)]
    wanted, said = (zip(*(t[i:] for i in range(n)), strict=False) for t in texts)
    return _overlap_f1(wanted, said)


def rouge_l(reference: str, prediction: str) -> float:
    """F-measure of the longest common subsequence, its length bit-parallel (Hyyro 2004)."""
    wanted, said = (_ROUGE_TOKEN.findall(text.lower()) for text in (reference, prediction))
    places: dict[str, int] = collections.defaultdict(int)
    for place, token in enumerate(wanted):
        places[token] |= 1 << place
    row = full = (1 << len(wanted)) - 1
    for token in said:
        matches = row & places[token]
        row = ((row + matches) | (row - matches)) & full
    common = len(wanted) - row.bit_count()
    return 2 * common / (len(wanted) + len(said)) if common else 0.0


def _overlap_f1(wanted: Iterable[Any], said: Iterable[Any]) -> float:
    """F1 of two bags of tokens; 0 where nothing is common, even when both are empty."""
    wanted_bag, said_bag = collections.Counter(wanted), collections.Counter(said)
    common = (wanted_bag & said_bag).total()
    return 2 * common / (wanted_bag.total() + said_bag.total()) if common else 0.0
