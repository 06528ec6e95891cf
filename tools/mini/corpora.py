"""Reads and cleans the raw corpora of jaxprompt-mini and drops what evaluation must not see.

Called by `prepare.py`. Everything here is plain text handling: no model, no vocabulary.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VALID_ONE_IN = 200  # one document in so many is held out of training
NOVEL_CHUNK_CHARS = 15_000  # a novel is handled as documents of about this size
WHOLE_MATCH_MIN_WORDS = 6  # an evaluation text shorter than this is too common to look for
MATCH_WORDS = 13  # longer evaluation texts match on any run of so many words
PASSAGE_CHARS = (600, 1000)


@dataclass(frozen=True)
class Document:
    """One text with what is known about it; `label` is 1 for a liked film, 0 for a disliked one."""

    source: str
    key: str
    text: str
    label: int | None = None
    rating: int = 0
    title: str = ""
    author: str = ""

    @property
    def is_valid(self) -> bool:
        return held_out(self.key)


def held_out(key: str) -> bool:
    """Whether the thing named by `key` belongs to the validation split (stable across runs)."""
    return zlib.crc32(key.encode()) % VALID_ONE_IN == 0


# ---------------------------------------------------------------- files


def open_text(path: Path) -> Iterator[str]:
    """Lines of a plain or xz file without their line ends; `path` may omit the `.xz`."""
    packed = path if path.suffix == ".xz" else path.with_name(path.name + ".xz")
    if packed.exists():
        with lzma.open(packed, "rt", encoding="utf-8", newline="\n") as lines:
            yield from (line.rstrip("\r\n") for line in lines)
    else:
        with open(path, encoding="utf-8", newline="\n") as lines:
            yield from (line.rstrip("\r\n") for line in lines)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in open_text(path) if line)


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Writes dataclasses or dicts as JSON lines through a temporary file; returns the row count."""
    temporary = path.with_name(path.name + ".part")
    count = 0
    with open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            data = row if isinstance(row, dict) else asdict(row)
            out.write(json.dumps(data, ensure_ascii=False) + "\n")
            count += 1
    os.replace(temporary, path)
    return count


# ---------------------------------------------------------------- text

_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')”]))"
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bvs\.)(?<!\bJr\.)(?<!\b[A-Z]\.)"
    r"\s+(?=[\"“'(]?[A-Z0-9])"
)


def normalise(text: str) -> str:
    """Lower-case words of letters and digits, one space between them."""
    return " ".join(words_of(text))


def words_of(text: str) -> list[str]:
    """Lower-case words; `don't (x)` and `do n't -lrb- x -rrb-` give the same ones."""
    text = re.sub(r"\s?n['’]t\b", " n t", text.lower()).replace("cannot", "can not")
    return re.findall(r"[a-z0-9]+", re.sub(r"-[lr][rs]b-", " ", text))


def sentences_of(text: str) -> list[str]:
    return [part for part in (s.strip() for s in _SENTENCE_END.split(text)) if part]


def passages_of(text: str) -> Iterator[str]:
    """Cuts a text at sentence borders into passages of about PASSAGE_CHARS characters."""
    shortest, longest = PASSAGE_CHARS
    current: list[str] = []
    size = 0
    for sentence in _short_pieces(text, longest):
        if size >= shortest or (current and size + len(sentence) > longest):
            yield " ".join(current)
            current, size = [], 0
        current.append(sentence)
        size += len(sentence) + 1
    if size >= 120:
        yield " ".join(current)


def _short_pieces(text: str, longest: int) -> Iterator[str]:
    for sentence in sentences_of(text):
        while len(sentence) > longest:
            cut = sentence.rfind(" ", 0, longest)
            cut = cut if cut > 0 else longest
            yield sentence[:cut]
            sentence = sentence[cut:].strip()
        if sentence:
            yield sentence


# ---------------------------------------------------------------- evaluation texts


def evaluation_texts(data: Path) -> Iterator[tuple[str, str]]:
    """(task, text) for every text of the tasks that the project evaluates on."""
    for name in ("dev.tsv", "test.tsv"):
        for row in csv.DictReader(open_text(data / "sst2" / name), delimiter="\t", quoting=3):
            yield "sst2", row["sentence"]
    for folder, fields in (("RTE", ("premise", "hypothesis")), ("BoolQ", ("passage", "question"))):
        for path in sorted((data / "superglue" / folder).iterdir()):
            for row in read_jsonl(path):
                yield from ((folder.lower(), row[field]) for field in fields)
    for folder in ("mrpc", "cola"):
        for path in sorted((data / folder).iterdir()):
            if path.name != "README":
                for line in open_text(path):
                    yield from ((folder, cell) for cell in line.split("\t"))
    for path in sorted((data / "qqp_sample").iterdir()):
        for row in read_jsonl(path):
            yield from (("qqp", value) for value in row.values() if isinstance(value, str))
    for path in sorted((data / "e2e").iterdir()):
        for cells in csv.reader(open_text(path)):
            yield from (("e2e", cell) for cell in cells)
    for path in sorted((data / "xquad_en").glob("*.json")):
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                yield "xquad", paragraph["context"]
                yield from (("xquad", qa["question"]) for qa in paragraph["qas"])


class Contamination:
    """Finds evaluation texts inside training texts.

    Words are compared as lower-case letters and digits. A text of 6 to 12 words matches as a
    whole, a longer one by any 13 words in a row, a shorter one never.
    """

    def __init__(self, texts: Iterable[tuple[str, str]]):
        self._runs: dict[tuple[str, ...], dict[tuple[str, ...], str]] = defaultdict(dict)
        head = WHOLE_MATCH_MIN_WORDS
        for task, text in texts:
            words = words_of(text)
            size = min(len(words), MATCH_WORDS)
            if size < head:
                continue
            for start in range(len(words) - size + 1):
                run = tuple(words[start : start + size])
                self._runs[run[:head]].setdefault(run, task)

    def find(self, text: str) -> str | None:
        """Name of a task one of whose texts is inside `text`, or None."""
        words = words_of(text)
        head = WHOLE_MATCH_MIN_WORDS
        runs = self._runs
        for start in range(len(words) - head + 1):
            hits = runs.get(tuple(words[start : start + head]))
            if hits is None:
                continue
            for run, task in hits.items():
                if tuple(words[start : start + len(run)]) == run:
                    return task
        return None


# ---------------------------------------------------------------- corpora


def clean_review(text: str) -> str:
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub(r"([.!?)\"])([A-Z][a-z])", r"\1 \2", text)  # breaks that were lost upstream
    return re.sub(r"\s+", " ", text).strip()


def imdb_documents(data: Path, dropped: Counter[str]) -> Iterator[Document]:
    """Train and unlabelled reviews, without those that are also in the test split or repeated."""
    folder = data / "imdb"
    seen = {
        normalise(clean_review(row["text"]))
        for name in ("test_pos", "test_neg")
        for row in read_jsonl(folder / f"{name}.jsonl")
    }
    in_test = len(seen)
    test = frozenset(seen)
    for name, label in (("train_pos", 1), ("train_neg", 0), ("train_unsup", None)):
        for row in read_jsonl(folder / f"{name}.jsonl"):
            text = clean_review(row["text"])
            plain = normalise(text)
            if plain in seen:
                dropped["imdb: also in the test split" if plain in test else "imdb: repeated"] += 1
                continue
            seen.add(plain)
            yield Document("imdb", f"imdb/{name}/{row['id']}", text, label, int(row["rating"]))
    assert in_test, "the IMDB test split is needed to keep it out of training"


def wikipedia_documents(data: Path) -> Iterator[Document]:
    for row in read_jsonl(data / "wikipedia" / "wiki.jsonl"):
        lines = (line.strip() for line in row["text"].split("\n"))
        text = " ".join(line for line in lines if len(line) >= 40)  # shorter ones are headings
        text = re.sub(r"\s*\(\s*[;,]?\s*\)", "", text)
        text = re.sub(r"\s+", " ", text)
        if len(text) >= 120:
            title = re.sub(r"\s*\([^)]*\)$", "", row["title"])
            yield Document("wikipedia", f"wikipedia/{row['id']}", text, title=title)


def novel_documents(data: Path) -> Iterator[Document]:
    """Novels as documents of about NOVEL_CHUNK_CHARS, cut at paragraphs."""
    with tarfile.open(data / "novels" / "novels.tar.xz") as archive:
        members = sorted((m for m in archive if m.name.endswith(".txt")), key=lambda m: m.name)
        for member in members:
            stream = archive.extractfile(member)
            assert stream is not None
            stem = Path(member.name).stem
            author, title = stem.split("_")[:2]
            paragraphs = novel_paragraphs(stream.read().decode("utf-8-sig", errors="replace"))
            for number, text in enumerate(_chunks(paragraphs, NOVEL_CHUNK_CHARS)):
                yield Document(
                    "novels", f"novels/{stem}/{number}", text, title=title, author=author
                )


def novel_paragraphs(text: str) -> Iterator[str]:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufffd", "")
    start = re.search(r"\*\*\* ?START OF.*?\*\*\*", text)
    end = re.search(r"\*\*\* ?END OF", text)
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r"\s+", " ", paragraph.replace("_", "")).strip()
        if len(paragraph) >= 30 and not paragraph.isupper():
            yield paragraph


def _chunks(paragraphs: Iterable[str], chars: int) -> Iterator[str]:
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        for piece in sentences_of(paragraph) if len(paragraph) > chars else (paragraph,):
            current.append(piece)
            size += len(piece) + 1
            if size >= chars:
                yield " ".join(current)
                current, size = [], 0
    if current:
        yield " ".join(current)


def clean_documents(
    data: Path, contamination: Contamination, dropped: Counter[str]
) -> Iterator[Document]:
    """Every document that may be trained on; `dropped` counts the others by reason."""
    for documents in (
        imdb_documents(data, dropped),
        wikipedia_documents(data),
        novel_documents(data),
    ):
        for document in documents:
            task = contamination.find(document.text)
            if task is None:
                yield document
            else:
                dropped[f"{document.source}: holds text of {task}"] += 1
