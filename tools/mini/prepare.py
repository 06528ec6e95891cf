"""Prepares the pretraining data of jaxprompt-mini: vocabulary, texts and supervised tasks.

    python tools/mini/prepare.py --data RAW --out OUT

Needs numpy, scipy, sentencepiece, tokenizers and transformers. Every output is written to a
temporary name and then renamed; a step whose output exists is skipped unless --force is given.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import corpora
import sentencepiece as sp
import tasks
import vocabulary
from corpora import Document
from teacher import Teacher
from wordings import treebank
from world import Row, World

SAMPLE_CHARS = 24_000_000  # characters the vocabulary is trained on
TEXT_VALID_ROWS = 1_000
SUPERVISED_VALID_ROWS = 2_000
MAX_TOKENS = 200  # of a supervised input with its end mark
OUTPUTS = {  # file: the field its counts are grouped by
    "text.jsonl": "source",
    "text_valid.jsonl": "source",
    "supervised.jsonl": "task",
    "supervised_valid.jsonl": "task",
    "tokenizer/spiece.model": "",
    "tokenizer/tokenizer.json": "",
}


def say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def write_json(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------- steps


def make_documents(args: argparse.Namespace) -> None:
    contamination = corpora.Contamination(corpora.evaluation_texts(args.data))
    dropped: Counter[str] = Counter()
    documents = corpora.clean_documents(args.data, contamination, dropped)
    count = corpora.write_jsonl(args.out / "documents.jsonl", documents)
    write_json(args.out / "dropped.json", dict(sorted(dropped.items())))
    say(f"{count} documents, dropped {dict(dropped)}")


def load_documents(args: argparse.Namespace) -> list[Document]:
    return [Document(**row) for row in corpora.read_jsonl(args.out / "documents.jsonl")]


def make_text(args: argparse.Namespace) -> None:
    train, valid = [], []
    for document in load_documents(args):
        rows = valid if document.is_valid else train
        for passage in corpora.passages_of(document.text):
            rows.append({"text": passage, "source": document.source})
    rng = random.Random(args.seed)
    rng.shuffle(train)
    rng.shuffle(valid)
    corpora.write_jsonl(args.out / "text_valid.jsonl", valid[:TEXT_VALID_ROWS])
    corpora.write_jsonl(args.out / "text.jsonl", train)
    say(f"{len(train)} passages: {dict(Counter(row['source'] for row in train))}")


def make_tokenizer(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    rows = corpora.read_jsonl(args.out / "text.jsonl")
    passages = ((row["source"], row["text"]) for row in rows)
    sample = vocabulary.balanced_sample(passages, SAMPLE_CHARS, rng)
    sample = [treebank(text) if rng.random() < 0.2 else text for text in sample]
    model = vocabulary.train(sample, args.vocab_size)
    vocabulary.write_directory(model, args.out / "tokenizer")
    texts = [row["text"] for row in corpora.read_jsonl(args.out / "text_valid.jsonl")][:500]
    report = vocabulary.check_directory(args.out / "tokenizer", texts)
    write_json(args.out / "tokenizer_report.json", report)
    say(f"vocabulary: {report}")


def make_supervised(args: argparse.Namespace) -> None:
    pieces = sp.SentencePieceProcessor(model_file=str(args.out / "tokenizer" / "spiece.model"))
    documents = load_documents(args)
    contamination = corpora.Contamination(corpora.evaluation_texts(args.data))
    splits = {
        flag: [document for document in documents if document.is_valid == flag]
        for flag in (False, True)
    }
    say("training the teacher")
    labelled = [document for document in splits[False] if document.label is not None]
    teacher = Teacher(labelled, random.Random(args.seed))
    write_json(args.out / "teacher_report.json", check_teacher(teacher, args.data))

    wanted = sum(rows for _, rows, _ in tasks.TASKS)
    scales = {True: 1.2 * SUPERVISED_VALID_ROWS / wanted, False: args.rows / wanted}
    for is_valid, name in ((True, "supervised_valid"), (False, "supervised")):
        rng = random.Random(f"{args.seed}/{is_valid}")
        world = World(args.data, splits[is_valid], is_valid, teacher, contamination, rng)
        rows = short_rows(tasks.build(world, scales[is_valid], args.seed), pieces)
        rng.shuffle(rows)
        rows = rows[:SUPERVISED_VALID_ROWS] if is_valid else rows
        corpora.write_jsonl(args.out / f"{name}.jsonl", rows)
        say(f"{name}: {len(rows)} rows: {dict(Counter(row.task for row in rows))}")


def short_rows(rows: Iterable[Row], pieces: Any) -> list[Row]:
    """Rows of at most MAX_TOKENS input tokens, each input and target once."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.input, row.target)
        if key not in kept and row.target and len(pieces.encode(row.input)) < MAX_TOKENS:
            kept[key] = row
            if len(kept) % 100_000 == 0:
                say(f"{len(kept)} rows, at {row.task}")
    return list(kept.values())


def check_teacher(teacher: Teacher, data: Path) -> dict[str, float]:
    """Accuracy on the SST-2 dev set, for the record.

    The teacher never sees these sentences, but the number was in sight while it was designed.
    """
    path = data / "sst2" / "dev.tsv"
    rows = list(csv.DictReader(corpora.open_text(path), delimiter="\t", quoting=csv.QUOTE_NONE))
    chances = teacher.probabilities([row["sentence"] for row in rows])
    labels = [row["label"] == "1" for row in rows]
    right = int(((chances > 0.5) == labels).sum())
    report = {"sst2_dev_accuracy": round(100 * right / len(rows), 2)}
    say(f"teacher: {report}")
    return report


def make_card(args: argparse.Namespace) -> None:
    pieces = sp.SentencePieceProcessor(model_file=str(args.out / "tokenizer" / "spiece.model"))
    files: dict[str, object] = {}
    for name, group in OUTPUTS.items():
        path = args.out / name
        counts: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for row in corpora.read_jsonl(path) if group else ():
            counts[row[group]] += 1
            tokens[row[group]] += len(pieces.encode(row.get("text") or row["input"])) + 1
        files[name] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": sum(counts.values()),
            f"rows_by_{group}": dict(sorted(counts.items())),
            "tokens": sum(tokens.values()),
            f"tokens_by_{group}": dict(sorted(tokens.items())),
        }
        if not group:
            files[name] = {key: files[name][key] for key in ("bytes", "sha256")}
    reports = ("dropped", "tokenizer_report", "teacher_report")
    card = {name: json.loads((args.out / f"{name}.json").read_text("utf-8")) for name in reports}
    card["seed"], card["vocab_size"] = args.seed, args.vocab_size
    write_json(args.out / "data_card.json", card | {"files": files})


# ---------------------------------------------------------------- command

# (what must exist for the step to be skipped, the step)
STEPS = (
    ("documents.jsonl", make_documents),
    ("text.jsonl", make_text),
    ("tokenizer", make_tokenizer),
    ("supervised.jsonl", make_supervised),
    ("data_card.json", make_card),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the raw corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prepared data")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=800_000, help="supervised rows at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="redo steps already done")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    redo = args.force
    for output, step in STEPS:
        redo = redo or not (args.out / output).exists()  # a new output makes later ones stale
        if redo:
            say(f"{step.__name__}: {output}")
            step(args)
        else:
            say(f"{output} exists, skipped")


if __name__ == "__main__":
    main()
