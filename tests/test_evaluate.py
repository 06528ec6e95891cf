"""Evaluation: rankings against the public `score`, metrics by their definition, the command."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_backbone import TASK, make_prompt, make_rows, write_backbone, write_prompt, write_rows

import jaxprompt as jp
from jaxprompt.artifact import PromptArtifact
from jaxprompt.backbone import Backbone
from jaxprompt.cli import main
from jaxprompt.data.readers import JsonlSource
from jaxprompt.evaluate import EvalResult, Evaluator, likelihood_vote, majority_vote
from jaxprompt.inference import encoder_of, put_on, task_of
from jaxprompt.model import PromptedT5
from jaxprompt.sharding import make_mesh

ROWS = make_rows(21)
CANDIDATES = ["negative", "terrible", "about food"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, two prompts for it, and a file of rows."""
    place = tmp_path_factory.mktemp("place")
    backbone = write_backbone(place)
    for seed in range(2):
        write_prompt(place / f"prompt-{seed}", backbone, seed=seed)
    write_rows(place / "rows.jsonl", ROWS)
    return place


@pytest.fixture(scope="module")
def backbone(place: Path) -> Backbone:
    return jp.load_backbone(str(place / "backbone-0"))


def evaluate(
    place: Path, backbone: Backbone, batch_size: int = 4, packing: bool = True, **options: Any
) -> EvalResult:
    prompt = make_prompt(place / "backbone-0")
    prompted = put_on(backbone, prompt)
    encoder = encoder_of(backbone, prompt, task_of(prompt), batch_size=batch_size)
    encoder.config = dataclasses.replace(encoder.config, packing=packing)
    evaluator = Evaluator(prompted.graphdef, [encoder], **options)
    (result,) = evaluator.run(prompted.trained, prompted.frozen, JsonlSource(place / "rows.jsonl"))
    return result


def test_the_likeliest_candidate_is_predicted_whatever_the_batch(place: Path, backbone: Backbone):
    prompt = make_prompt(place / "backbone-0")
    scores = jp.score(backbone, prompt, [row["text"] for row in ROWS])
    expected = [CANDIDATES[best] for best in scores.argmax(axis=1)]
    assert len(set(expected)) > 1
    for batch_size, packing in ((4, False), (16, False), (4, True), (16, True)):
        result = evaluate(place, backbone, batch_size, packing=packing)
        assert result.predictions == expected
        assert result.targets == [CANDIDATES[int(row["label"])] for row in ROWS]
    assert evaluate(place, backbone, mesh=make_mesh()).predictions == expected


def test_the_encoder_runs_once_for_all_candidates_and_is_traced_once_a_shape(
    place: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    traced = []
    encode = PromptedT5.encode

    def counted(self: PromptedT5, batch: Any, **options: Any) -> Any:
        traced.append(batch.encoder_ids_BS.shape)
        return encode(self, batch, **options)

    monkeypatch.setattr(PromptedT5, "encode", counted)
    for _ in range(2):
        for packing in (False, True):
            evaluate(place, backbone, batch_size=3, packing=packing)  # sizes of no other test
    assert traced and len(traced) == len(set(traced))
    assert sum(rows == 3 for rows, _ in traced) >= len(traced) - 1


def test_metrics_majority_and_intervals(place: Path, backbone: Backbone):
    result = evaluate(place, backbone)
    right = np.equal(result.targets, result.predictions)
    assert result.metrics["accuracy"] == pytest.approx(100 * right.mean())
    assert list(result.metrics) == TASK["metrics"]
    most = Counter(result.targets).most_common(1)[0][1]
    assert result.majority["accuracy"] == pytest.approx(100 * most / len(ROWS))
    low, high = result.intervals["accuracy"]
    assert low <= result.metrics["accuracy"] <= high and high - low > 5
    summary = result.summary()
    assert summary["illegal"] == 0 and summary["examples"] == len(ROWS)
    assert summary["targets"] == Counter(result.targets)
    assert summary["predictions"] == Counter(result.predictions)


def test_generated_answers_outside_the_candidates_are_counted(place: Path, backbone: Backbone):
    prompt = make_prompt(place / "backbone-0")
    result = evaluate(place, backbone, generate=True)
    texts = [row["text"] for row in ROWS]
    said = jp.generate(backbone, prompt, texts, max_new_tokens=6)
    assert result.predictions == [" ".join(text.split()) for text in said]
    assert result.summary()["illegal"] == sum(text not in CANDIDATES for text in said) > 0


def test_white_space_does_not_make_an_answer_illegal(
    place: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(backbone.tokenizer), "decode", lambda self, ids: " about  food ")
    result = evaluate(place, backbone, generate=True)
    assert set(result.predictions) == {"about food"} and result.summary()["illegal"] == 0


def test_a_task_without_candidates_is_scored_by_exact_match(place: Path, backbone: Backbone):
    free = {"name": "free", "input": "{text}", "target": "{said}"}
    prompt = make_prompt(place / "backbone-0", task=free)
    texts = [row["text"] for row in ROWS[:6]]
    said = jp.generate(backbone, prompt, texts, max_new_tokens=6)
    targets = [*said[:4], "nothing like it", "nor this"]
    rows = [{"text": t, "said": f" {s} "} for t, s in zip(texts, targets, strict=True)]
    source = JsonlSource(write_rows(place / "free.jsonl", rows))
    prompted = put_on(backbone, prompt)
    evaluator = Evaluator(prompted.graphdef, [encoder_of(backbone, prompt, task_of(prompt))])
    (result,) = evaluator.run(prompted.trained, prompted.frozen, source)
    assert result.metrics == {"exact_match": pytest.approx(100 * 4 / 6)}
    assert "illegal" not in result.summary()


def test_groups_reach_the_metrics(place: Path, backbone: Backbone):
    task = TASK | {"group": "{label}", "metrics": ["group_exact_match"]}
    prompt = make_prompt(place / "backbone-0", task=task)
    prompted = put_on(backbone, prompt)
    evaluator = Evaluator(prompted.graphdef, [encoder_of(backbone, prompt, task_of(prompt))])
    source = JsonlSource(place / "rows.jsonl")
    (result,) = evaluator.run(prompted.trained, prompted.frozen, source)
    assert result.groups == [row["label"] for row in ROWS]
    assert 0 <= result.metrics["group_exact_match"] <= 100


def test_majority_vote_gives_ties_to_the_earliest_prompt():
    votes = [["a", "a", "c"], ["b", "b", "b"], ["b", "c", "a"]]
    assert majority_vote(votes) == ["b", "a", "c"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_command_json(place: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(
        capsys, "evaluate", place / "prompt-0", "--data", place / "rows.jsonl", "--json"
    )
    assert code == 0 and err == ""
    told = json.loads(out)
    result = evaluate(place, backbone)
    assert told["prompt"] == str(place / "prompt-0")
    assert told["split"] == str(place / "rows.jsonl")
    assert told["scores"]["accuracy"]["value"] == pytest.approx(
        result.metrics["accuracy"], abs=1e-4
    )
    assert told["examples"] == len(ROWS)


def test_command_table_and_cut_inputs(place: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(
        capsys, "evaluate", place / "prompt-0", "--data", place / "rows.jsonl",
        "--max-input-length", 6,
    )  # fmt: skip
    assert code == 0
    assert "accuracy" in out and "most frequent target" in out and "negative" in out
    assert "of 21 inputs were cut to 6 tokens" in err


def test_command_ensemble(place: Path, capsys: pytest.CaptureFixture[str]):
    names = [str(place / f"prompt-{seed}") for seed in (0, 1, 0)]
    code, out, _ = run(capsys, "evaluate", *names, "--data", place / "rows.jsonl", "--json")
    first, second, third, majority, likelihood, together = map(json.loads, out.splitlines())
    assert code == 0 and majority["prompt"] == together["prompt"] == names
    assert first["predictions"] != second["predictions"]
    assert majority["predictions"] == third["predictions"]  # two of three votes
    assert (majority["vote"], likelihood["vote"]) == ("majority", "likelihood")
    each = [told["scores"]["accuracy"]["value"] for told in (first, second, third)]
    accuracy = together["together"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(np.mean(each), abs=1e-4)
    assert accuracy["stdev"] == pytest.approx(np.std(each, ddof=1), abs=1e-4)
    assert accuracy["best"] == max(each)
    assert accuracy["likelihood_vote"] == likelihood["scores"]["accuracy"]["value"]


def test_command_ensemble_for_people(place: Path, capsys: pytest.CaptureFixture[str]):
    names = [str(place / f"prompt-{seed}") for seed in (0, 1)]
    code, out, _ = run(capsys, "evaluate", *names, "--data", place / "rows.jsonl")
    assert code == 0 and "likelihood vote of 2 prompts over" in out
    for row in ("2 prompts, %", "mean", "stdev", "best", "majority vote", "likelihood vote"):
        assert row in out.split("likelihood vote of 2 prompts over")[1]


def test_prompts_of_an_ensemble_say_what_each_says_alone(place: Path, backbone: Backbone):
    """Three prompts of other lengths in one batch, and the bare backbone."""
    prompts = [
        None,
        *(make_prompt(place / "backbone-0", seed=seed, slots=slots)
          for seed, slots in ((0, 3), (1, 5), (2, 1))),
    ]  # fmt: skip
    source, task = JsonlSource(place / "rows.jsonl"), task_of(prompts[1])

    def results(*chosen: PromptArtifact | None, **options: Any) -> list[EvalResult]:
        prompted = put_on(backbone, *chosen)
        encoders = [encoder_of(backbone, prompt, task, batch_size=8) for prompt in chosen]
        evaluator = Evaluator(prompted.graphdef, encoders, **options)
        return evaluator.run(prompted.trained, prompted.frozen, source)

    for together, prompt in zip(results(*prompts), prompts, strict=True):
        (alone,) = results(prompt)
        for got, want in zip(together.scores, alone.scores, strict=True):
            assert got == pytest.approx(want, abs=1e-5)
    said = [result.predictions for result in results(*prompts, generate=True)]
    assert said == [results(prompt, generate=True)[0].predictions for prompt in prompts]


def test_likelihoods_are_averaged_over_prompts():
    """The sure one outvotes two that hardly know; raw likelihoods of long answers do not count."""
    log = np.log
    scores = [
        [{"a": log(0.98) - 50, "b": log(0.02) - 50}],
        [{"a": log(0.4), "b": log(0.6)}],
        [{"a": log(0.45), "b": log(0.55)}],
    ]
    assert likelihood_vote(scores) == ["a"]
    assert likelihood_vote(scores[1:]) == ["b"]


def test_rows_name_their_prompt(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Prompts of two tasks over one file, each scored on its own rows as if alone."""
    other = TASK | {"name": "other", "labels": {"0": "good", "1": "great"}}
    write_prompt(tmp_path / "other", place / "backbone-0", seed=1, task=other, slots=5)
    rows = [row | {"label": str(number % 2), "use": ("one", "two")[number % 2]}
            for number, row in enumerate(ROWS)]  # fmt: skip
    words = {"one": place / "prompt-0", "two": tmp_path / "other"}
    given = [f"{name}={path}" for name, path in words.items()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    field = ("--prompt-field", "use", "--json")
    code, out, err = run(capsys, "evaluate", *given, "--data", data, *field)
    assert code == 0, err
    for told, (name, path) in zip(map(json.loads, out.splitlines()), words.items(), strict=True):
        own = write_rows(tmp_path / f"{name}.jsonl", [row for row in rows if row["use"] == name])
        _, alone, _ = run(capsys, "evaluate", path, "--data", own, "--json")
        told_alone = json.loads(alone)
        assert told["prompt"] == name
        assert {**told, "prompt": 0, "split": 0} == {**told_alone, "prompt": 0, "split": 0}


def test_rows_that_name_no_prompt_are_refused(place: Path, capsys: pytest.CaptureFixture[str]):
    path = place / "prompt-0"
    data = ("--data", place / "rows.jsonl")
    for argv, sentence in (
        ((f"a={path}", *data, "--prompt-field", "text"), "which was not given; there are a"),
        ((f"a={path}", *data, "--prompt-field", "use"), "has no field 'use'"),
        ((f"a={path}", f"a={path}", *data, "--prompt-field", "text"), "two prompts are called 'a'"),
        ((path, "--prompt-field", "text"), "name it with --data"),
    ):
        code, _, err = run(capsys, "evaluate", *argv)
        assert code == 2 and sentence in err and err.count("\n") == 1, err


def test_command_bare_backbone(place: Path, capsys: pytest.CaptureFixture[str]):
    task = json.dumps(TASK | {"source": {"test": "rows.jsonl"}})
    (place / "task.yaml").write_text(task)
    code, out, _ = run(
        capsys, "evaluate", "none", "--backbone", place / "backbone-0", "--json",
        "--task", place / "task.yaml", "--data-dir", place, "--split", "test",
    )  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["prompt"] == "none" and told["split"] == "test"
    backbone = jp.load_backbone(str(place / "backbone-0"))
    scores = jp.score(backbone, None, [row["text"] for row in ROWS], CANDIDATES)
    said = Counter(CANDIDATES[best] for best in scores.argmax(axis=1))
    assert told["predictions"] == said


def test_command_refuses(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = ("--data", place / "rows.jsonl")
    other = write_backbone(tmp_path, seed=1)
    np.save(tmp_path / "bare.npy", make_prompt(place / "backbone-0").values["prompt"])
    np.save(tmp_path / "wide.npy", np.ones((3, 13), np.float32))
    wrong = {
        "was trained with backbone": [place / "prompt-0", "--backbone", other, *data],
        "has no task of its own": [tmp_path / "bare.npy", *data],
        "does not say which backbone": [tmp_path / "bare.npy", *data, "--task", "demo-topic"],
        "has d_model 13, backbone": [
            tmp_path / "wide.npy", *data, "--task", "demo-topic",
            "--backbone", place / "backbone-0",
        ],
        "the bare backbone does not say": ["none", *data, "--task", "demo-topic"],
        "no prompt at": [tmp_path / "nothing", *data],
        "there is no file": [place / "prompt-0", "--data", tmp_path / "nothing.jsonl"],
        "the task has no validation data": [place / "prompt-0"],
        "evaluate scores one answer to each example": [
            place / "prompt-0", *data, "--num-beams", "3", "--num-return-sequences", "2",
        ],
    }  # fmt: skip
    for sentence, argv in wrong.items():
        code, out, err = run(capsys, "evaluate", *argv)
        assert code == 2 and out == "" and sentence in err, (sentence, err)
        assert err.count("\n") == 1
    code, out, _ = run(
        capsys, "evaluate", place / "prompt-0", "--backbone", other, *data,
        "--allow-other-backbone", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["backbone"] == str(other)
