"""ReCoRD and WSC: rows as T5 makes them, from both forms of the data, and how they are scored."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxprompt.config import load_config
from jaxprompt.data.superglue import record_rows, wsc_rows
from jaxprompt.data.tasks import Task, load_task
from jaxprompt.metrics import Extra, find_metric
from jaxprompt.typing import UserError

TEXT = "Ann Li met Bo in Rome.\n@highlight\nBo paid\n@highlight\nAnn left"
ENTITIES = [{"start": 0, "end": 5}, {"start": 11, "end": 12}, {"start": 17, "end": 20}]
ANSWERS = [{"text": "Bo", "start": 11, "end": 12}, {"text": "Ann Li"}, {"text": "Bo"}]
ORIGINAL: dict[str, Any] = {
    "passage": {"text": TEXT, "entities": ENTITIES},
    "qas": [
        {"query": "@placeholder was there", "answers": ANSWERS},
        {"query": "in @placeholder", "answers": [{"text": "Rome"}]},
    ],
}
TFDS: dict[str, Any] = {
    "passage": TEXT, "entities": ["Ann Li", "Bo", "Rome", "Bo"], "query": "@placeholder was there",
    "answers": ["Bo", "Ann Li", "Bo"],
}  # fmt: skip
WSC: dict[str, Any] = {
    "text": 'Bo saw the old dog; "Good for him," he said.', "label": True,
    "target": {"span1_text": "the old dog", "span1_index": 2, "span2_text": "him",
               "span2_index": 7},
}  # fmt: skip


def opened(name: str, split: str, rows: list[dict], directory: Path) -> tuple[Task, list]:
    """The preset's task over rows of a file, and its examples."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_task(name).config
    files = {"kind": "jsonl", "train": "rows.jsonl", "validation": "rows.jsonl"}
    source = dataclasses.replace(config.source, data_dir=str(directory), **files)
    task = Task(dataclasses.replace(config, source=source))
    found = task.open(split)
    return task, [task.example(found[n], found.where(n)) for n in range(len(found))]


def test_record_trains_on_every_answer_and_is_right_with_any(tmp_path: Path):
    _, examples = opened("record", "train", [ORIGINAL], tmp_path)
    passage = "passage: Ann Li met Bo in Rome. Bo paid. Ann left"
    assert [example.input_text for example in examples[1:]] == [
        f"query: @placeholder was there entities: Ann Li, Bo, Rome {passage}",
        f"query: in @placeholder entities: Ann Li, Bo, Rome {passage}",
    ]
    assert [example.target for example in examples] == ["Bo", "Ann Li", "Rome"]
    task, measured = opened("record", "validation", [ORIGINAL], tmp_path)
    assert [one.references for one in measured] == [("Bo", "Ann Li"), ("Rome",)]
    assert [one.target for one in measured] == ["Bo", "Rome"] and task.candidates == ()
    extra = Extra(references=[one.references for one in measured])
    score = find_metric("squad_exact_match")
    assert score(["Bo", "Rome"], ["ann li.", "Milan"], extra) == 50.0


@pytest.mark.parametrize("training", [True, False])
def test_both_forms_of_record_are_one(training: bool):
    first = {**ORIGINAL, "qas": ORIGINAL["qas"][:1]}
    assert record_rows(first, "w", training) == record_rows(TFDS, "w", training)


def test_wsc_marks_the_pronoun_and_trains_on_what_it_means(tmp_path: Path):
    wrong = {**WSC, "target": {**WSC["target"], "span1_text": "Bo"}, "label": False}
    task, trained = opened("wsc", "train", [wrong, WSC], tmp_path)
    assert [one.target for one in trained] == ["the old dog"]
    assert trained[0].input_text == 'Bo saw the old dog; "Good for *him*," he said.'
    assert trained[0].where.endswith("rows.jsonl:2")
    _, measured = opened("wsc", "validation", [wrong, WSC], tmp_path)
    targets = [one.target or "" for one in measured]
    assert targets == ["not Bo", "the old dog"]
    (name,) = task.metrics
    for said, score in [(["dog", "dog"], 100.0), (["Bo", "dog"], 50.0), (["Bo", "Bo"], 0.0),
                        (["", ""], 50.0), (["the", "That big old dog's"], 100.0)]:  # fmt: skip
        assert find_metric(name)(targets, said) == score


@pytest.mark.parametrize(("index", "place"), [(0, 0), (3, 2), (6, 7)])
def test_an_index_that_is_off_by_one_finds_the_nearest(index: int, place: int):
    row = {"text": "It fell, it broke, so they sold It", "span1_text": "the vase",
           "span2_text": "it", "span2_index": index, "label": 1}  # fmt: skip
    (made,) = wsc_rows(row, "w", True)
    assert [n for n, word in enumerate(made["text"].split()) if word.startswith("*")] == [place]


@pytest.mark.parametrize(
    ("make", "row", "words"),
    [
        (wsc_rows, {**WSC, "target": {**WSC["target"], "span2_text": "her"}}, "no word of the"),
        (wsc_rows, {"text": "a b", "span1_text": "a"}, "'span2_text' should be a str"),
        (record_rows, {**TFDS, "query": None}, "'query' should be a str, not None"),
        (record_rows, {"qas": [], "passage": "text"}, "'passage' should be a mapping"),
    ],
)
def test_rows_of_another_form_are_named(make, row: dict, words: str):
    with pytest.raises(UserError, match=r"^f:3: ") as error:
        make(row, "f:3", True)
    assert words in str(error.value)


def test_a_row_without_a_label_can_be_answered():
    row = {key: value for key, value in WSC.items() if key != "label"}
    (made,) = wsc_rows(row, "w", False)
    assert "referent" not in made and "*him*" in made["text"]


def test_prompts_of_both_begin_from_the_paper_s_words():
    for name in ("record", "wsc"):
        config = load_config("xxl", [f"task={name}", f"task.source.data_dir={name}"])
        assert config.method.init == "labels" and len(config.task.init_words) >= 3
