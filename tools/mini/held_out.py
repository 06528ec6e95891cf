"""Cuts public data into train, validation and test for comparing prompt methods.

    python tools/mini/held_out.py --data RAW --out compare_data

SST-2's test rows have no labels, and E2E's training file is large. Here a part of SST-2's
training rows is held out for choosing and its dev rows are the test; E2E trains on its dev set, but
for whole inputs that are held out. Which rows go where follows from their text alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

from jaxprompt.files import make_directory, write_file
from jaxprompt.typing import UserError

SST2_TRAIN, SST2_VALIDATION = 20_000, 500  # sentences
E2E_VALIDATION, E2E_TEST = 50, 200  # inputs, each with all its sentences


def main(argv: Sequence[str] | None = None) -> None:
    """Writes OUT/sst2 and OUT/e2e."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="holds sst2/ and e2e/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for name, cut in (("sst2", cut_sst2), ("e2e", cut_e2e)):
        directory = args.out / name
        make_directory(directory)
        for file, text in cut(args.data / name).items():
            write_file(directory / file, text)
            print(directory / file)


def cut_sst2(directory: Path) -> dict[str, str]:
    """File names and contents: rows of train.tsv for train and validation, dev.tsv as test."""
    header, *rows = _text(directory / "train.tsv").splitlines()
    rows = _shuffled(sorted(set(rows)))
    parts = {
        "train.tsv": rows[SST2_VALIDATION : SST2_VALIDATION + SST2_TRAIN],
        "dev.tsv": rows[:SST2_VALIDATION],
    }
    files = {name: "\n".join([header, *part]) + "\n" for name, part in parts.items()}
    return {**files, "test.tsv": _text(directory / "dev.tsv")}


def cut_e2e(directory: Path) -> dict[str, str]:
    """File names and contents, JSON lines: `mr`, `ref`, and in `refs` all that count as right."""
    dev, test = (_inputs(directory / name) for name in ("devset.csv", "testset_w_refs.csv"))
    order = _shuffled(list(dev))
    train = [
        {"mr": mr, "ref": ref, "refs": [ref]} for mr in order[E2E_VALIDATION:] for ref in dev[mr]
    ]
    return {
        "train.jsonl": _lines(train),
        "validation.jsonl": _lines(_with_all(dev, order[:E2E_VALIDATION])),
        "test.jsonl": _lines(_with_all(test, _shuffled(list(test))[:E2E_TEST])),
    }


def _with_all(refs: dict[str, list[str]], chosen: Sequence[str]) -> list[dict[str, object]]:
    return [{"mr": mr, "ref": refs[mr][0], "refs": refs[mr]} for mr in chosen]


def _inputs(path: Path) -> dict[str, list[str]]:
    """Every input with its sentences."""
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO(_text(path))):
        found.setdefault(row["mr"], []).append(row["ref"])
    return found


def _shuffled(texts: list[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def _lines(rows: Sequence[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _text(path: Path) -> str:
    """Of a file, or of the .xz beside it."""
    packed = path.with_name(f"{path.name}.xz")
    if path.exists():
        return path.read_text(encoding="utf-8")
    if not packed.exists():
        raise UserError(f"{path} is not there, nor {packed.name}")
    return lzma.decompress(packed.read_bytes()).decode("utf-8")


if __name__ == "__main__":
    main()
