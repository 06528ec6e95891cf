"""Rows of the two SuperGLUE tasks that templates alone cannot make: ReCoRD and WSC.

Called by `sources` for a source with `reshape`. Rows come as TFDS or the original files have them.
Source: T5's preprocessing (Raffel et al. 2020, section 2.4 and appendix B; `record` and
`wsc_simple` of the package t5), without the task's name in front, as Lester et al. 2021.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxprompt.typing import UserError

_SENTENCE_END = re.compile(r"([.?!\"'])\n@highlight\n")


def record_rows(row: Mapping[str, Any], where: str, training: bool) -> list[dict[str, Any]]:
    """ReCoRD: passage, query, entities, answer and answers of every question.

    The passage's highlights become sentences. To train on, a question is a row for each of its
    different answers; to measure, one row, right with any of them.

    Raises: UserError for a row that is no ReCoRD example.
    """
    if "qas" in row:
        passage = _of(row, "passage", Mapping, where)
        text = _of(passage, "text", str, where)
        spans = _of(passage, "entities", Sequence, where)
        entities = [text[span["start"] : span["end"] + 1] for span in spans]  # both ends inside
        questions = [
            (one["query"], [answer["text"] for answer in one.get("answers", ())])
            for one in _of(row, "qas", Sequence, where)
        ]
    else:
        text = _of(row, "passage", str, where)
        entities = list(_of(row, "entities", Sequence, where))
        questions = [(_of(row, "query", str, where), list(_of(row, "answers", Sequence, where)))]
    text = _SENTENCE_END.sub(r"\1 ", text).replace("\n@highlight\n", ". ")
    rows = []
    for query, all_answers in questions:
        answers = list(dict.fromkeys(all_answers))
        shared = {
            "passage": text, "query": query, "entities": ", ".join(dict.fromkeys(entities)),
            "answers": answers,
        }  # fmt: skip
        for answer in answers if training else answers[:1] or [""]:
            rows.append({**shared, "answer": answer})
    return rows


def wsc_rows(row: Mapping[str, Any], where: str, training: bool) -> list[dict[str, Any]]:
    """WSC: the text with the pronoun between asterisks, and the noun that it may stand for.

    To train on, only rows where it does. To measure, `referent` is `not NOUN` where it does not;
    the metric `referent` knows that.

    Raises: UserError for a row that is no WSC example.
    """
    about = {**row, **row["target"]} if isinstance(row.get("target"), Mapping) else row
    noun, label = _of(about, "span1_text", str, where), about.get("label")
    words, pronoun = _of(about, "text", str, where).split(), _of(about, "span2_text", str, where)
    at = _place(words, pronoun, _of(about, "span2_index", int, where), where)
    marked = re.sub(re.escape(pronoun), r"*\g<0>*", words[at], count=1, flags=re.IGNORECASE)
    fields = {**row, "text": " ".join([*words[:at], marked, *words[at + 1 :]]), "noun": noun}
    if label in (0, 1):  # True is 1; the test split has none
        fields["referent"] = noun if label else f"not {noun}"
    return [fields] if label == 1 or not training else []


RESHAPERS: dict[str, Callable[[Mapping[str, Any], str, bool], list[dict[str, Any]]]] = {
    "record": record_rows,
    "wsc": wsc_rows,
}


def _of(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise UserError(
            f"{where}: field {name!r} should be a {kind.__name__.lower()}, not {value!r}"
        )
    return value


def _place(words: Sequence[str], pronoun: str, index: int, where: str) -> int:
    """Where the pronoun stands: at `index`, or nearest to it; a row of the set is off by one.

    Punctuation may stick to it.
    """
    alone = re.compile(rf"\W*{re.escape(pronoun)}\W*", re.IGNORECASE)
    places = [place for place, word in enumerate(words) if alone.fullmatch(word)]
    if not places:
        raise UserError(f"{where}: span2_text {pronoun!r} is no word of the text")
    return min(places, key=lambda place: abs(place - index))
