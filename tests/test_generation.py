"""Texts from searches: options of the API, stop strings, streaming, and the commands' options."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_backbone import CONFIG, make_prompt, write_backbone

import jaxprompt as jp
from jaxprompt import api, cli, generation, inference
from jaxprompt.answerer import Answerer
from jaxprompt.artifact import PromptArtifact, save_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.data.pipeline import Asked
from jaxprompt.generation import Generation, _generate, _go_on, _start
from jaxprompt.inference import generation_of
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.search import Search
from jaxprompt.typing import UserError

TEXTS = ["a good film", "the food was bad and the service terrible", "travel"]
DRAWN = {"temperature": 1.3, "max_new_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def backbone(directory: Path) -> Backbone:
    return jp.load_backbone(str(directory))


@pytest.fixture(scope="module")
def prompt(directory: Path) -> PromptArtifact:
    return make_prompt(directory)


def test_beams_give_as_many_texts_as_asked_for(backbone: Backbone, prompt: PromptArtifact):
    texts = jp.generate(backbone, prompt, TEXTS, 5, 3, num_return_sequences=2)
    assert [len(row) for row in texts] == [2, 2, 2]
    assert all(first != second for first, second in texts)
    best = jp.generate(backbone, prompt, TEXTS, 5, 3)
    assert best == [row[0] for row in texts]


def test_what_is_drawn_depends_on_seed_and_place_alone(backbone: Backbone, prompt: PromptArtifact):
    several = jp.generate(backbone, prompt, TEXTS, num_return_sequences=2, **DRAWN)
    assert len({text for row in several for text in row}) == 6
    assert jp.generate(backbone, prompt, TEXTS[:1], **DRAWN) == [several[0][0]]
    many = jp.generate(backbone, prompt, TEXTS + TEXTS * 2, **DRAWN)
    assert many[:3] == [row[0] for row in several]
    assert many[3:6] != many[:3], "another place draws something else"
    assert jp.generate(backbone, prompt, TEXTS, **(DRAWN | {"seed": 4})) != many[:3]


def test_an_answer_ends_at_a_stop_string(backbone: Backbone, prompt: PromptArtifact):
    whole = jp.generate(backbone, prompt, TEXTS, **DRAWN)
    stop = whole[1][3:6]
    cut = jp.generate(backbone, prompt, TEXTS, stop=[stop, "never said"], **DRAWN)
    assert cut == [text.split(stop)[0].rstrip() for text in whole]
    assert cut[1] == whole[1][:3].rstrip()
    assert jp.generate(backbone, prompt, TEXTS, stop=stop, **DRAWN) == cut


def test_streamed_texts_grow_to_the_same_answers(backbone: Backbone, prompt: PromptArtifact):
    whole = jp.generate(backbone, prompt, TEXTS, **DRAWN)
    jp.generate(backbone, prompt, TEXTS, **DRAWN)
    compiled = _go_on._cache_size()
    stop = whole[1][3:6]
    for every in (1, 3):
        for options, expected in (
            ({}, whole),
            ({"stop": [stop]}, [text.split(stop)[0].rstrip() for text in whole]),
        ):
            grown = list(jp.stream(backbone, prompt, TEXTS, every=every, **options, **DRAWN))
            texts = [[part.text for part in grown if part.index == n] for n in range(3)]
            assert [said[-1] for said in texts] == expected
            finals = [part.index for part in grown if part.final]
            assert sorted(finals) == [0, 1, 2]
            for said in texts:
                assert all(b.startswith(a) for a, b in itertools.pairwise(said))
            assert every > 1 or options or any(len(said) > 2 for said in texts)
    assert _go_on._cache_size() == compiled, "streaming runs the program of plain generation"


def test_other_strengths_are_no_other_program(backbone: Backbone, prompt: PromptArtifact):
    programs = (_start, _go_on, _generate)
    drawn = DRAWN | {"top_p": 0.9, "repetition_penalty": 1.2}
    beams = {"num_beams": 3, "length_penalty": 0.5}
    first = jp.generate(backbone, prompt, TEXTS, **drawn)
    jp.generate(backbone, prompt, TEXTS, 5, **beams)
    compiled = [program._cache_size() for program in programs]
    drawn |= {"temperature": 2.5, "top_p": 0.8, "repetition_penalty": 1.7}
    assert jp.generate(backbone, prompt, TEXTS, **drawn) != first
    jp.generate(backbone, prompt, TEXTS, 5, **beams | {"length_penalty": -3.0})
    assert [program._cache_size() for program in programs] == compiled


def test_what_is_halted_is_given_away(backbone: Backbone, prompt: PromptArtifact, monkeypatch):
    """The caches of a stream exist once: the next tokens are written where the last ones are."""
    halted = []

    def start(*args: Any, **options: Any) -> Any:
        halted.append(_start(*args, **options))
        return halted[-1]

    monkeypatch.setattr(generation, "_start", start)
    list(jp.stream(backbone, prompt, TEXTS, every=3, **DRAWN))
    assert halted and all(leaf.is_deleted() for leaf in jax.tree.leaves(halted))


@pytest.mark.parametrize(
    "how",
    [
        Generation(Search(8, num_beams=3, num_return_sequences=2)),
        Generation(Search(8, temperature=1.3, num_return_sequences=2), ("a",), 3),
    ],
    ids=["beams", "drawn"],
)
def test_a_mesh_gives_the_answers_of_one_device(
    backbone: Backbone, prompt: PromptArtifact, how: Generation
):
    task = inference.with_candidates(inference.task_of(prompt), ())
    prompted = inference.put_on(backbone, prompt)
    encoder = inference.encoder_of(backbone, prompt, task, batch_size=8, max_target_length=8)

    def texts(mesh: jax.sharding.Mesh | None) -> list[list[str]]:
        answerer = Answerer(prompted.graphdef, [encoder], generation=how, mesh=mesh)
        asked = [Asked(task.example({"text": text}, "", with_target=False)) for text in TEXTS]
        answered = answerer.answers(prompted.trained, prompted.frozen, asked)
        return [[a.text, *(b.text for b in a.more)] for chunk in answered for _, a in chunk]

    assert texts(make_mesh()) == texts(None)


def test_what_cannot_go_together(backbone: Backbone, prompt: PromptArtifact):
    with pytest.raises(UserError, match="stop is given and num_beams is 2"):
        jp.generate(backbone, prompt, TEXTS, num_beams=2, stop=["x"])
    with pytest.raises(UserError, match="a beam search cannot be streamed"):
        jp.stream(backbone, prompt, TEXTS, num_beams=2)
    with pytest.raises(UserError, match="stop holds an empty text"):
        jp.generate(backbone, prompt, TEXTS, stop=[""])
    with pytest.raises(UserError, match="there is no option 'top_q'; there are max_new_tokens"):
        jp.generate(backbone, prompt, TEXTS, top_q=1)
    with pytest.raises(UserError, match="seed is -1"):
        jp.generate(backbone, prompt, TEXTS, seed=-1)
    with pytest.raises(UserError, match="every is 0"):
        jp.stream(backbone, prompt, TEXTS, every=0)
    Generation(Search(num_beams=2), seed=2**32 - 1)


def test_predict_with_options(
    directory: Path, backbone: Backbone, prompt: PromptArtifact, tmp_path: Path
):
    save_artifact(tmp_path / "prompt", prompt)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))

    def predict(*options: str) -> list[dict]:
        command = [
            "predict", str(tmp_path / "prompt"), "--backbone", str(directory), "--generate",
            "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl"),
            "--max-target-length", "8", *options,
        ]  # fmt: skip
        assert cli.main(command) == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    whole = jp.generate(backbone, prompt, TEXTS, **DRAWN)
    stop = whole[1][3:6]
    rows = predict("--temperature", "1.3", "--seed", "3", "--stop", stop)
    assert [row["prediction"] for row in rows] == [t.split(stop)[0].rstrip() for t in whole]
    rows = predict("--num-beams", "3", "--num-return-sequences", "2", "--length-penalty", "0.5")
    expected = jp.generate(
        backbone, prompt, TEXTS, 8, 3, num_return_sequences=2, length_penalty=0.5
    )
    said = [[row["prediction"], *(more["prediction"] for more in row["more"])] for row in rows]
    assert said == expected


def test_options_of_a_command_make_its_generation():
    words = (
        "predict p --input - --num-beams 4 --early-stopping never --length-penalty 2 --seed 5 "
        "--repetition-penalty 1.5 --no-repeat-ngram-size 3 --num-return-sequences 2"
    )
    args = cli._parse(cli._parser(), words.split())
    search = Search(
        num_beams=4, early_stopping="never", length_penalty=2.0, repetition_penalty=1.5,
        no_repeat_ngram_size=3, num_return_sequences=2,
    )  # fmt: skip
    assert generation_of(args) == Generation(search, (), 5)
    words = "evaluate p --temperature 0.7 --top-k 40 --top-p 0.9 --stop . --stop !"
    args = cli._parse(cli._parser(), words.split())
    assert generation_of(args) == Generation(
        Search(temperature=0.7, top_k=40, top_p=0.9), (".", "!"), 0
    )


def test_a_stopped_answer_scores_its_own_tokens(backbone: Backbone, prompt: PromptArtifact):
    """However often the host looks, and whatever was chosen before it looked."""
    task = inference.with_candidates(inference.task_of(prompt), ())
    search = Search(max_new_tokens=8, temperature=1.3)
    whole = jp.generate(backbone, prompt, TEXTS, **DRAWN)
    stops = (whole[1][3:6],)

    def scores(how: Generation) -> list[float]:
        answers = api._answers(backbone, prompt, task, TEXTS, how)
        return [answer.score for answer in answers]

    full, cut = scores(Generation(search, (), 3)), scores(Generation(search, stops, 3))
    assert cut[1] > full[1] + 0.1
    untouched = [at for at, text in enumerate(whole) if stops[0] not in text]
    np.testing.assert_allclose(
        [cut[at] for at in untouched], [full[at] for at in untouched], atol=1e-5
    )
    assert CONFIG.eos_id == 1
