"""Prompt design: examples before the input, as text."""

import json
from collections import Counter

import pytest
from tiny_backbone import make_rows, write_backbone, write_prompt, write_rows

from jaxprompt.cli import main
from jaxprompt.data.few_shot import with_shots
from jaxprompt.data.readers import JsonlSource
from jaxprompt.data.tasks import Task, TaskConfig
from jaxprompt.typing import UserError

CONFIG = TaskConfig(name="t", input="say: {text}", labels={"0": "no", "1": "yes"})


class Rows:
    """A source of (text, label) pairs."""

    def __init__(self, *pairs: tuple[str, str]):
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, str]:
        text, label = self._pairs[index]
        return {"text": text, "label": label}

    def where(self, index: int) -> str:
        return f"row {index}"


MOSTLY_YES = Rows(*((f"word{n}", "0" if n % 8 == 0 else "1") for n in range(40)))


def shown(task: Task) -> list[tuple[str, str]]:
    """(text, answer) of every shot before the input `x`."""
    text = task.example({"text": "x", "label": "0"}, "here").input_text
    *parts, last = text.split("say: ")[1:]
    assert last == "x answer:"
    return [tuple(part.strip().split(" answer: ")) for part in parts]  # type: ignore[misc]


@pytest.mark.parametrize(("shots", "counts"), [(4, (2, 2)), (5, (3, 2)), (2, (1, 1))])
def test_candidates_take_turns(shots: int, counts: tuple[int, int]):
    said = shown(with_shots(Task(CONFIG), MOSTLY_YES, shots, seed=3))
    assert sorted(Counter(answer for _, answer in said).values(), reverse=True) == list(counts)
    truth = {f"word{n}": "no" if n % 8 == 0 else "yes" for n in range(40)}
    assert all(truth[text] == answer for text, answer in said)
    assert len({text for text, _ in said}) == shots


def test_a_rare_candidate_does_not_keep_shots_away():
    said = shown(with_shots(Task(CONFIG), Rows(("a", "1"), ("b", "1"), ("c", "0")), 3, seed=0))
    assert Counter(said) == Counter([("a", "yes"), ("b", "yes"), ("c", "no")])


def test_the_draw_is_the_seeds():
    draws = [shown(with_shots(Task(CONFIG), MOSTLY_YES, 6, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    orders = {
        tuple(a for _, a in shown(with_shots(Task(CONFIG), MOSTLY_YES, 2, s))) for s in range(9)
    }
    assert len(orders) == 2  # the answers' order is no hint


def test_without_shots_the_question_alone_is_asked():
    assert shown(with_shots(Task(CONFIG), MOSTLY_YES, 0, seed=0)) == []


def test_braces_of_a_shot_are_text():
    braced = Rows(("{x} }{", "1"))
    assert shown(with_shots(Task(CONFIG), braced, 1, seed=0)) == [("{x} }{", "yes")]


@pytest.mark.parametrize("shots", [-1, 41])
def test_a_number_of_shots_that_cannot_be(shots: int):
    with pytest.raises(UserError, match=f"shots is {shots}; .* between 0 and the 40 rows"):
        with_shots(Task(CONFIG), MOSTLY_YES, shots, seed=0)


def test_evaluate_shows_the_bare_backbone_examples_of_the_task(tmp_path, capsys):
    backbone = write_backbone(tmp_path)
    write_rows(tmp_path / "train.jsonl", make_rows(20, seed=1))
    write_rows(tmp_path / "validation.jsonl", make_rows(9))
    task = {
        "name": "tiny", "source": {"train": "train.jsonl", "validation": "validation.jsonl"},
        "input": "{text}", "labels": {"0": "negative", "1": "terrible", "2": "about food"},
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
    words = ["evaluate", "none", "--backbone", str(backbone), "--task", str(tmp_path / "task.yaml"),
             "--data-dir", str(tmp_path), "--json"]  # fmt: skip

    def said(*more: str) -> dict:
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    without, two = said(), said("--shots", "2", "--seed", "5")
    assert (two["shots"], two["seed"]) == (2, 5) and "shots" not in without
    named = Task(TaskConfig(**{**task, "source": None}))  # type: ignore[arg-type]
    with_two = with_shots(named, JsonlSource(tmp_path / "train.jsonl"), 2, seed=5)
    by_hand = tmp_path / "by_hand.yaml"
    by_hand.write_text(json.dumps({**task, "input": with_two.config.input}), encoding="utf-8")
    words[words.index("--task") + 1] = str(by_hand)
    expected = said()
    assert expected["predictions"] == two["predictions"] and expected["scores"] == two["scores"]
    assert main([*words, "--shots", "99"]) == 2
    assert main([*words, "--shots", "2", "--data", str(tmp_path / "train.jsonl")]) == 2
    prompt = write_prompt(tmp_path / "prompt", backbone)
    words[words.index("none")] = str(prompt)
    assert main([*words, "--shots", "2"]) == 2
    wrong, data, prompted = capsys.readouterr().err.splitlines()
    assert "between 0 and the 20 rows" in wrong and "leave --data out" in data
    assert "give `none` and --backbone in place of prompts" in prompted
