"""What tools/mini/held_out.py cuts out of public data, on tiny files."""

import json
import lzma
from pathlib import Path

import pytest

from jaxprompt.typing import UserError

TOOLS = str(Path(__file__).parents[1] / "tools" / "mini")


def write_e2e(directory: Path) -> None:
    """Raw files of E2E: six inputs of two sentences each."""
    directory.mkdir(parents=True)
    for file in ("devset.csv", "testset_w_refs.csv"):
        lines = [f'"{file}, {mr}",says {mr} {n}\n' for mr in range(6) for n in range(2)]
        (directory / file).write_text("mr,ref\n" + "".join(lines))


def test_what_is_held_out_is_in_no_other_part(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import held_out

    monkeypatch.setattr(held_out, "SST2_TRAIN", 12)
    monkeypatch.setattr(held_out, "SST2_VALIDATION", 5)
    monkeypatch.setattr(held_out, "E2E_VALIDATION", 2)
    monkeypatch.setattr(held_out, "E2E_TEST", 3)
    write_e2e(tmp_path / "raw" / "e2e")
    (tmp_path / "raw" / "sst2").mkdir()
    rows = [f"sentence {number}\t{number % 2}" for number in range(30)]
    train = "\n".join(["sentence\tlabel", *rows, *rows[:3]])
    (tmp_path / "raw/sst2/train.tsv.xz").write_bytes(lzma.compress(train.encode()))
    (tmp_path / "raw/sst2/dev.tsv").write_text("sentence\tlabel\nits own\t1\n")
    argv = ["--data", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    held_out.main(argv)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}

    sst2, e2e = tmp_path / "out/sst2", tmp_path / "out/e2e"
    trained, chosen = ((sst2 / f).read_text().splitlines() for f in ("train.tsv", "dev.tsv"))
    assert (len(trained), len(chosen)) == (13, 6) and trained[0] == chosen[0] == "sentence\tlabel"
    assert len({*trained[1:], *chosen[1:]}) == 17 and {*trained[1:], *chosen[1:]} <= {*rows}
    assert (sst2 / "test.tsv").read_text() == "sentence\tlabel\nits own\t1\n"
    parts = {
        name: [json.loads(line) for line in (e2e / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 8, "validation": 2, "test": 3
    }  # fmt: skip
    assert not {row["mr"] for row in parts["train"]} & {row["mr"] for row in parts["validation"]}
    assert all(len(row["refs"]) == 2 for row in (*parts["validation"], *parts["test"]))
    assert all(row["mr"].startswith("testset") for row in parts["test"])

    held_out.main(argv)
    assert {path: path.read_bytes() for path in first} == first
    (tmp_path / "raw/e2e/devset.csv").unlink()
    with pytest.raises(UserError, match=r"devset\.csv is not there, nor devset\.csv\.xz"):
        held_out.main(argv)
