"""Prediction: every row answered, in order, in constant memory, and nothing half-written."""

import io
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_backbone import make_prompt, make_rows, write_backbone, write_prompt, write_rows

import jaxprompt as jp
from jaxprompt.answerer import Answerer
from jaxprompt.backbone import Backbone
from jaxprompt.cli import main
from jaxprompt.data.pipeline import Asked
from jaxprompt.data.tasks import Example
from jaxprompt.inference import encoder_of, put_on, task_of

ROWS = [{"id": number, **row} for number, row in enumerate(make_rows(70))]
TEXTS = [row["text"] for row in ROWS]
CANDIDATES = ["negative", "terrible", "about food"]
BATCH = ("--batch-size", "2")  # a chunk is 32 rows: three chunks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a prompt that ranks, one that writes, and a file of rows."""
    place = tmp_path_factory.mktemp("place")
    backbone = write_backbone(place)
    write_prompt(place / "ranks", backbone)
    write_prompt(place / "writes", backbone, task={"input": "{text}"})
    write_rows(place / "rows.jsonl", ROWS)
    return place


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return jp.load_backbone(str(place / "backbone-0"))


@pytest.fixture(scope="module")
def scores(place: Path, backbone: Backbone) -> np.ndarray:
    return jp.score(backbone, make_prompt(place / "backbone-0"), TEXTS)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["predict", *map(str, argv)])
    told = capsys.readouterr()
    return code, told.out, told.err


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_file_to_file_in_order(
    place: Path, scores: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "answers.jsonl"
    code, out, err = run(
        capsys, place / "ranks", "--input", place / "rows.jsonl", "--output", output, *BATCH
    )
    assert code == 0 and out == "" and "70 rows answered" in err
    told = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [{k: line[k] for k in ("id", "text", "label")} for line in told] == ROWS
    assert [line["prediction"] for line in told] == [CANDIDATES[i] for i in scores.argmax(1)]
    got = [[line["scores"][candidate] for candidate in CANDIDATES] for line in told]
    np.testing.assert_allclose(got, scores, atol=1e-4)
    np.testing.assert_allclose([line["score"] for line in told], scores.max(1), atol=1e-4)


def test_plain_lines_from_standard_input(
    place: Path,
    scores: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    type_in(monkeypatch, "\n".join([*TEXTS[:5], "", json.dumps({"text": TEXTS[5], "label": "?"})]))
    code, out, err = run(capsys, place / "ranks", "--input", "-", *BATCH)
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and len(told) == 6
    assert told[0] == {"text": TEXTS[0]} | {
        key: told[0][key] for key in ("prediction", "score", "scores")
    }
    assert [line["prediction"] for line in told] == [CANDIDATES[i] for i in scores[:6].argmax(1)]
    assert told[5]["label"] == "?"


def test_generated_answers(
    place: Path, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:5]))
    prompt = jp.load_prompt(str(place / "writes"))
    said = jp.generate(backbone, prompt, TEXTS[:5], max_new_tokens=6)
    code, out, _ = run(capsys, place / "writes", "--input", tmp_path / "texts.txt")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["prediction"] for line in told] == said
    assert all(line["score"] < 0 and "scores" not in line for line in told)
    assert {line.get("complete", True) for line in told} <= {True, False}
    code, out, _ = run(
        capsys, place / "ranks", "--generate", "--input", tmp_path / "texts.txt",
        "--max-target-length", 2,
    )  # fmt: skip
    said = jp.generate(backbone, prompt, TEXTS[:5], max_new_tokens=2)
    assert [json.loads(line)["prediction"] for line in out.splitlines()] == said


def test_json_with_an_output_file_is_a_summary(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = run(
        capsys, place / "ranks", "--input", place / "rows.jsonl", "--json",
        "--output", tmp_path / "o", "--max-input-length", 8,
    )  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["rows"] == 70 and told["output"] == str(tmp_path / "o")
    assert f"{told['cut_inputs']} of 70 inputs were cut to 8 tokens" in err


def endless(read: list[int]) -> Iterator[Asked]:
    for number in itertools.count():
        read.append(number)
        yield Asked(Example.of_text(TEXTS[number % len(TEXTS)]))


def test_rows_are_read_no_faster_than_they_are_answered(place: Path, backbone: Backbone):
    prompt = make_prompt(place / "backbone-0")
    prompted = put_on(backbone, prompt)
    encoder = encoder_of(backbone, prompt, task_of(prompt), batch_size=2)
    read: list[int] = []
    answers = Answerer(prompted.graphdef, [encoder], chunk_batches=3).answers(
        prompted.trained, prompted.frozen, endless(read)
    )
    for chunk in (1, 2, 3):
        assert len(next(answers)) == 6 and len(read) == 6 * chunk


def test_lines_are_flushed_before_the_next_rows_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    """Standard input that hands out a second batch only after the first is answered."""
    events: list[str] = []

    class Input(io.RawIOBase):
        def __iter__(self) -> Iterator[bytes]:
            for number in range(4):
                events.append(f"read {number}")
                yield f"{TEXTS[number]}\n".encode()

    class Output(io.StringIO):
        def flush(self) -> None:
            events.append(f"flush {self.getvalue().count(chr(10))}")

    stdin = types.SimpleNamespace(buffer=Input(), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["predict", str(place / "ranks"), "--input", "-", *BATCH]) == 0
    assert events[:6] == ["read 0", "read 1", "flush 2", "read 2", "read 3", "flush 4"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"text": "a film"}', '{"text": '], ":2 is not a JSON object"),
        (['{"text": "a film"}', '{"texts": "a film"}'], ":2 has no field 'text'"),
        (['{"text": "a film"}', '{"text": " "}'], ":2 has no text"),
        ([], "has no rows"),
    ],
)
def test_a_bad_row_leaves_the_old_output(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    sentence: str,
):
    output = tmp_path / "answers.jsonl"
    output.write_text("what was there")
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    code, out, err = run(
        capsys, place / "ranks", "--input", tmp_path / "bad.jsonl", "--output", output,
        "--batch-size", "1",
    )  # fmt: skip
    assert code == 2 and out == "" and sentence in err
    assert output.read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "bad.jsonl"]


def test_plain_text_for_a_task_of_two_fields(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    task = {"name": "pair", "input": "{text} is {label}", "candidates": CANDIDATES}
    write_prompt(tmp_path / "pair", place / "backbone-0", task=task)
    (tmp_path / "texts.txt").write_text("a film")
    code, _, err = run(capsys, tmp_path / "pair", "--input", tmp_path / "texts.txt")
    assert code == 2 and "makes its input of text, label" in err
    code, out, _ = run(capsys, tmp_path / "pair", "--input", place / "rows.jsonl")
    assert code == 0 and out.count("\n") == len(ROWS)


def test_a_row_may_have_a_field_called_input(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film", "input": {"kept": [1]}}])
    _, out, _ = run(capsys, place / "ranks", "--input", rows)
    assert json.loads(out)["input"] == {"kept": [1]}


def test_one_stream_for_prompts_that_rank_and_prompts_that_write(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Rows name their prompt; each answer is what that prompt alone says, in the rows' order."""
    other = {"input": "in the {text}", "labels": {"0": "good", "1": "bad"}}
    write_prompt(tmp_path / "other", place / "backbone-0", seed=1, task=other, slots=5)
    prompts = {"a": place / "ranks", "b": tmp_path / "other", "c": place / "writes"}
    rows = [{**row, "use": "abc"[number % 3]} for number, row in enumerate(ROWS)]
    told = {}
    for name, path in prompts.items():
        own = write_rows(tmp_path / f"{name}.jsonl", [row for row in rows if row["use"] == name])
        assert run(capsys, path, "--input", own, "--output", tmp_path / "out", *BATCH)[0] == 0
        for line in (tmp_path / "out").read_text().splitlines():
            told[json.loads(line)["id"]] = json.loads(line)
    given = [f"{name}={path}" for name, path in prompts.items()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    code, out, err = run(capsys, *given, "--input", data, "--prompt-field", "use", *BATCH)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in ROWS]
    for line in lines:
        alone = told[line["id"]]
        assert line["prediction"] == alone["prediction"]
        assert line["score"] == pytest.approx(alone["score"], abs=2e-5)
        assert line.get("scores", {}) == pytest.approx(alone.get("scores", {}), abs=2e-5)


def test_several_prompts_need_a_field_that_names_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [f"a={place / 'ranks'}", f"b={place / 'writes'}"]
    lines = tmp_path / "lines.txt"
    lines.write_text("good film\n")
    for argv, sentence in (
        (("--input", place / "rows.jsonl"), "2 prompts are given; --prompt-field says which"),
        (("--input", lines, "--prompt-field", "use"), "is plain text, which has no field 'use'"),
        (
            ("--input", place / "rows.jsonl", "--prompt-field", "label"),
            "which was not given; there are a, b",
        ),
    ):
        code, out, err = run(capsys, *given, *argv)
        assert code == 2 and out == "" and sentence in err, err
