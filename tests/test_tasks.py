import dataclasses
import json
from pathlib import Path

import pytest

from jaxprompt.data.sources import SourceConfig
from jaxprompt.data.tasks import Example, Task, TaskConfig, list_tasks, load_task
from jaxprompt.data.templates import fill, parse_template
from jaxprompt.metrics import METRICS
from jaxprompt.typing import UserError

SENTIMENT = TaskConfig(
    name="mood",
    input="review: {text} ({stars} stars)",
    target="{label}",
    labels={"0": "negative", "1": "positive", "false": "negative"},
)


def task(**changes) -> Task:
    return Task(dataclasses.replace(SENTIMENT, **changes))


def test_an_example_is_templates_filled():
    row = {"text": "good", "stars": 4.0, "label": 1}
    example = task().example(row, "f:3")
    assert example == Example(
        fields={**row, "input": "review: good (4 stars)"},
        input_text="review: good (4 stars)",
        target="positive",
        label=1,
        group="",
        where="f:3",
    )


@pytest.mark.parametrize(
    ("label", "word"),
    [
        (0, "negative"),
        ("1", "positive"),
        (1.0, "positive"),
        (False, "negative"),
        ("positive ", "positive"),
    ],
)
def test_labels_as_files_and_libraries_write_them(label, word: str):
    assert task().example({"text": "x", "stars": 1, "label": label}, "w").target == word


def test_candidates_come_from_labels_and_metrics_from_candidates():
    assert task().candidates == ("negative", "positive")
    assert task().metrics == ("accuracy",)
    assert task(candidates=("positive", "negative")).candidates == ("positive", "negative")
    free = Task(TaskConfig(target="{summary}"))
    assert (free.candidates, free.metrics) == ((), ("exact_match",))
    assert free.example({"text": "x", "summary": "any words"}, "w").label == -1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "x", "stars": 1, "label": 7},
            r"f:9: label '7' .* mood: 0, 1, false, negative, positive",
        ),
        ({"text": "x", "stars": 1}, "f:9 has no field 'label', it has 'text', 'stars', 'input'"),
        ({"txt": "x", "stars": 1, "label": 1}, "no field 'text', .* did you mean 'txt'"),
        ({"text": None, "stars": 1, "label": 1}, "field 'text' is null"),
        ({"text": ["x"], "stars": 1, "label": 1}, "field 'text' is a list"),
        ({"text": "x", "stars": 1, "label": " "}, "target .* is empty"),
    ],
)
def test_rows_that_do_not_fit(row: dict, message: str):
    with pytest.raises(UserError, match=message):
        task().example(row, "f:9")


def test_without_target_no_label_is_needed():
    example = task(group="{id}").example({"text": "x", "stars": 1}, "w", with_target=False)
    assert (example.target, example.label, example.group) == (None, -1, "")


def test_groups_and_replacements():
    config = dataclasses.replace(
        SENTIMENT, input="{q.text} {text}", group="{q.id}", replace={"<br>": " ", "<b>": ""}
    )
    row = {"text": "one<br>t<b>wo", "q": {"text": "why", "id": 5}, "label": 0}
    example = Task(config).example(row, "w")
    assert (example.input_text, example.group) == ("why one two", "5")
    assert example.fields["text"] == "one two"


def test_the_one_field_of_plain_text():
    assert Task(TaskConfig(input="say {sentence}, {sentence}")).text_field == "sentence"
    with pytest.raises(UserError, match="of text, stars; give rows"):
        _ = task().text_field


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ("positive",)}, "gives label '0' the word 'negative', not a candidate"),
        ({"candidates": ("a", "a"), "labels": {}}, "names a candidate twice"),
        ({"positive_label": "yes"}, "positive_label 'yes', which is not a candidate"),
        ({"input": "{text"}, "cannot be read"),
        ({"input": "{}"}, "cannot be read"),
        ({"input": "{text!r}"}, "cannot be read"),
    ],
)
def test_tasks_at_odds_with_themselves(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        task(**changes)


def test_braces_and_odd_field_names():
    pieces = parse_template("{{{#1 String}}} {a.b}")
    assert fill(pieces, {"#1 String": "x", "a.b": "y"}, "w") == "{x} y"
    assert fill(pieces, {"#1 String": "x", "a": {"b": True}}, "w") == "{x} true"


def test_every_preset_is_complete():
    presets = list_tasks()
    assert {"sst2", "rte", "mrpc", "cola", "boolq", "cb", "copa", "wic", "multirc", "qqp"} <= set(
        presets
    )
    for name, description in presets.items():
        preset = load_task(name)
        assert preset.config.name == name and description
        assert set(preset.metrics) <= set(METRICS)
        assert not {"f1", "f1a"} & set(preset.metrics) or preset.config.positive_label
        assert preset.config.source.train


NLI = {"premise": "p", "hypothesis": "h"}
PAIR = {"sentence1": "a", "sentence2": "b"}
CAUSE = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause"}
QUESTION = {"question": "q", "answers": [{"text": "a", "label": 1}]}
PUBLISHED = {  # name: a row as its file has it, input, target
    "sst2": ({"sentence": "s ", "label": "1"}, "sentence: s ", "positive"),
    "cola": (
        {"source": "x", "label": "0", "mark": "*", "sentence": "s"},
        "sentence: s",
        "unacceptable",
    ),
    "qqp": (
        {"question1": "a", "question2": "b", "is_duplicate": "1"},
        "question1: a question2: b",
        "duplicate",
    ),
    "mrpc": (
        {"Quality": "1", "#1 String": "a", "#2 String": "b"},
        "sentence1: a sentence2: b",
        "equivalent",
    ),
    "boolq": (
        {"question": "q", "passage": "p", "label": True},
        "passage: p question: q",
        "True",
    ),
    "rte": ({**NLI, "label": "not_entailment"}, "hypothesis: h premise: p", "not_entailment"),
    "cb": ({**NLI, "label": "neutral"}, "hypothesis: h premise: p", "neutral"),
    "wic": (
        {"word": "w", **PAIR, "label": False},
        "sentence1: a sentence2: b word: w",
        "False",
    ),
    "copa": (
        {**CAUSE, "label": 1},
        "choice1: a choice2: b premise: p question: cause",
        "choice2",
    ),
    "multirc": (
        {"passage": {"text": "p<br>.", "questions": [QUESTION]}},
        "question: q answer: a paragraph: p .",
        "True",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_read_rows_as_they_were_published(tmp_path: Path, name: str):
    row, text, target = PUBLISHED[name]
    config = load_task(name).config
    path = tmp_path / config.source.train
    if path.suffix == ".tsv":
        lines = [list(row.values())] if config.source.columns else [list(row), list(row.values())]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    else:
        path.write_text(json.dumps(row) + "\n")
    preset = Task(
        dataclasses.replace(
            config, source=dataclasses.replace(config.source, data_dir=str(tmp_path))
        )
    )
    source = preset.open("train")
    example = preset.example(source[0], source.where(0))
    assert (example.input_text, example.target) == (text, target)


def test_presets_read_the_rows_of_tfds():
    example = load_task("multirc").example(
        {"paragraph": "p", "question": "q", "answer": "a", "label": 0, "idx": {"question": 3}}, "w"
    )
    assert (example.input_text, example.target) == ("question: q answer: a paragraph: p", "False")
    assert load_task("rte").example({"premise": "p", "hypothesis": "h", "label": 1}, "w").label == 1


@pytest.mark.parametrize("name", ["demo-kind", "demo-topic", "demo-sentiment"])
def test_demo_tasks_have_all_splits_and_share_no_text_between_them(name: str):
    demo = load_task(name)
    texts = {}
    for split in ("train", "validation", "test"):
        source = demo.open(split)
        examples = [demo.example(source[i], source.where(i)) for i in range(len(source))]
        assert {example.target for example in examples} == set(demo.candidates)
        texts[split] = {example.input_text for example in examples}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]


def test_tasks_by_path_and_by_mapping(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntarget: '{mood}'\nsource: {train: a.jsonl}\n")
    mine = load_task(path)
    assert mine.config == TaskConfig(
        name="mine", target="{mood}", source=SourceConfig(train="a.jsonl")
    )
    assert (
        load_task({"name": "mine", "target": "{mood}", "source": {"train": "a.jsonl"}}).config
        == mine.config
    )


def test_unknown_tasks_and_keys(tmp_path: Path):
    with pytest.raises(UserError, match="there is no task 'sst3'; did you mean sst2"):
        load_task("sst3")
    with pytest.raises(UserError, match=r"there is no task 'xyzzy'; there are .*boolq"):
        load_task("xyzzy")
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ncandidate: [a, b]\n")
    with pytest.raises(UserError, match=r"mine\.yaml:2.*candidates"):
        load_task(path)
