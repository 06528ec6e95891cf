"""`jaxprompt transfer`: SPoT's retrieval over a library, prompts recycled for another backbone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixtures import compiled
from tiny_backbone import CONFIG, SLOTS, make_prompt, make_rows, write_backbone, write_rows
from tiny_tokenizer import write_tokenizer

from jaxprompt import cli, trees
from jaxprompt.artifact import load_artifact, save_artifact
from jaxprompt.prompts import recycling
from jaxprompt.prompts.similarity import Joint, average_tokens, joints, per_token
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.t5.weights import load_params, read_embedding, save_hf

__all__ = ["compiled"]  # fixture

MAP = np.random.default_rng(0).normal(size=(CONFIG.d_model, CONFIG.d_model)).astype(np.float32)
NAMES = ("aside", "near", "other")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def mapped(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another backbone, whose embeddings are a linear map of the first one's."""
    root = tmp_path_factory.mktemp("mapped")
    return changed(backbone, root / "mapped", backbone)


def changed(backbone: Path, place: Path, vocabulary: Path) -> Path:
    def leaf(path: str, value: Any) -> np.ndarray:
        value = np.asarray(value)
        return value @ MAP if path == "token_embedder/embedding" else value

    params = trees.map_with_path(leaf, load_params(backbone, CONFIG))
    save_hf(place, params, CONFIG, tokenizer_dir=vocabulary)
    return place


@pytest.fixture(scope="module")
def library(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts, one of them in a run, and what is no prompt."""
    root = tmp_path_factory.mktemp("library")
    for seed, name in enumerate(NAMES):
        place = root / name / "best" if name == "other" else root / name
        save_artifact(place, make_prompt(backbone, seed=seed))
    (root / "notes").mkdir()
    (root / "notes.txt").write_text("not a prompt")
    return root


@pytest.fixture(scope="module")
def target(library: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt near "near", a little like "other"; of another task."""
    near, other = (values(library / place) for place in ("near", "other/best"))
    prompt = make_prompt(
        backbone, task={"name": "new", "input": "{text}"}, layout="{input}{prompt}"
    )
    rows = {"prompt": near + 0.3 * other}
    place = tmp_path_factory.mktemp("target") / "prompt"
    return save_artifact(place, dataclasses.replace(prompt, values=rows))


def values(path: Path) -> np.ndarray:
    return load_artifact(path).values["prompt"]


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["transfer", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# ---- SPoT ----------------------------------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def test_similarities_are_the_papers():
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(5, 7)), draw.normal(size=(5, 7))
    pairs = [cosine(x, y) for x in a for y in b]
    np.testing.assert_allclose(per_token(a, b), np.mean(pairs), rtol=1e-12)
    np.testing.assert_allclose(average_tokens(a, b), cosine(a.mean(0), b.mean(0)), rtol=1e-12)


def test_groups_join_by_their_mean_similarity():
    like = np.array([[1, 0.2, 0.9], [0.2, 1, 0.4], [0.9, 0.4, 1]])
    first, second = joints(like)
    assert first == Joint((0,), (2,), pytest.approx(0.1))
    assert second == Joint((1,), (0, 2), pytest.approx(0.7))
    assert joints(like[:1, :1]) == []


def test_a_library_is_ranked(library: Path, target: Path, capsys: Any):
    code, out, err = run(capsys, "--library", library, "--to", target, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [line["rank"] for line in lines] == [1, 2, 3]
    assert {line["prompt"] for line in lines} == set(NAMES) and lines[0]["prompt"] == "near"
    paths = {"other": library / "other" / "best"}
    for line in lines:
        rows = values(paths.get(line["prompt"], library / line["prompt"]))
        assert line["per-token"] == round(per_token(values(target), rows), 4)
        assert line["average-tokens"] == round(average_tokens(values(target), rows), 4)
        assert line["task"] == "tiny"
    shown = run(capsys, "--library", library, "--to", target, "--similarity", "average-tokens")[1]
    assert shown.splitlines()[2].startswith("near") and "average-tokens" in shown.splitlines()[0]


def test_a_prompt_of_the_library_is_not_its_own_source(library: Path, capsys: Any):
    _, out, _ = run(capsys, "--library", library, "--to", library / "near", "--json")
    assert {json.loads(line)["prompt"] for line in out.splitlines()} == {"aside", "other"}


def test_a_library_is_compared_and_drawn(library: Path, target: Path, tmp_path: Path, capsys: Any):
    pytest.importorskip("matplotlib")
    png = tmp_path / "plots" / "library.png"
    code, out, err = run(capsys, "--library", library, "--json", "--plot", png)
    pairs = [(line["prompt"], line["and"]) for line in map(json.loads, out.splitlines())]
    assert code == 0 and pairs == [("aside", "near"), ("aside", "other"), ("near", "other")]
    assert png.read_bytes().startswith(b"\x89PNG") and f"picture: {png}" in err


def test_the_likest_are_written_to_begin_from(
    library: Path, target: Path, tmp_path: Path, capsys: Any
):
    """Their mean by similarity, or each of them; of the target's task, layout and backbone."""
    ask = ("--library", library, "--to", target, "--top", 2)
    code, _, err = run(capsys, *ask, "--combine", "average", "--output", tmp_path / "mean")
    assert code == 0 and f"method.init=prompt method.init_path={tmp_path / 'mean'}" in err
    near, other = values(library / "near"), values(library / "other" / "best")
    scores = [per_token(values(target), rows) for rows in (near, other)]
    made, wanted = load_artifact(tmp_path / "mean"), load_artifact(target)
    want = (scores[0] * near + scores[1] * other) / sum(scores)
    np.testing.assert_allclose(made.values["prompt"], want, rtol=1e-5, atol=1e-6)
    assert (made.task, made.layout, made.backbone) == (wanted.task, wanted.layout, wanted.backbone)
    weights = made.training["sources"]
    assert weights[str(library / "near")] == pytest.approx(scores[0] / sum(scores), abs=1e-5)
    code, _, err = run(capsys, *ask, "--output", tmp_path / "each")
    assert code == 0 and f"sweep.method.init_path=[{tmp_path / 'each' / '1'}," in err
    np.testing.assert_array_equal(values(tmp_path / "each" / "1"), near)
    np.testing.assert_array_equal(values(tmp_path / "each" / "2"), other)
    assert run(capsys, *ask[:4], "--output", tmp_path / "best")[0] == 0
    np.testing.assert_array_equal(values(tmp_path / "best"), near)


def refused(library: Path, backbone: Path, root: Path, case: str) -> tuple[list[object], str]:
    """A library or a command that cannot be compared, and what is said of it."""
    prompt = make_prompt(backbone)
    place = root / "library"
    if case == "empty":
        place.mkdir()
        return ["--library", place], "holds no prompt"
    save_artifact(place / "a", prompt)
    strange = {
        "backbone": (
            {"backbone": dataclasses.replace(prompt.backbone, fingerprint="0" * 64)},
            "only prompts of one backbone",
        ),
        "length": ({"values": {"prompt": prompt.values["prompt"][:2]}}, "is 2 x 12, prompt"),
        "method": ({"method": {"name": "dept", "length": SLOTS}}, "is of method dept"),
    }
    if case in strange:
        change, message = strange[case]
        save_artifact(place / "b", dataclasses.replace(prompt, **change))
        return ["--library", place], message
    if case == "not alike":
        save_artifact(
            place / "b", dataclasses.replace(prompt, values={"prompt": -values(place / "a")})
        )
        ask = ["--to", place / "a", "--combine", "average", "--output", root / "out"]
        return ["--library", place, *ask], "has similarity -"
    commands = {
        "nowhere": (["--library", root / "none"], "there is no directory"),
        "single": (["--library", place], "holds a single prompt"),
        "itself": (["--library", place, "--to", place / "a"], "no prompt but"),
        "neither": ([], "wants either --library DIR"),
        "both": (["--library", place, "--recycle", "v2v-lin"], "wants either --library DIR"),
        "a prompt": (["p", "--library", place], "--library takes no PROMPT"),
        "no target": (["--library", place, "--output", root / "out"], "name that prompt"),
        "too many": (
            ["--library", library, "--to", place / "a", "--top", 9, "--output", root / "out"],
            "--top is 9, the library holds 3",
        ),
        "no way": ([place / "a", root / "out", "--recycle", "v2v-lin"], "--recycle wants PROMPT"),
        "no words": (
            [place / "a", root / "out", "--recycle", "v2v-lin", "--to-backbone", backbone],
            "has no word beyond the first 1000",
        ),
    }
    return commands[case]


@pytest.mark.parametrize("case", [
    "empty", "backbone", "length", "method", "not alike", "nowhere", "single", "itself", "neither",
    "both", "a prompt", "no target", "too many", "no way", "no words",
])  # fmt: skip
def test_what_cannot_be_done_is_said(
    case: str, library: Path, backbone: Path, tmp_path: Path, capsys: Any
):
    argv, message = refused(library, backbone, tmp_path, case)
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


# ---- recycling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["v2v-lin", "lin-comb"])
def test_a_linear_map_is_found_exactly(
    method: str, backbone: Path, mapped: Path, tmp_path: Path, capsys: Any
):
    """The other backbone's embeddings are a map of the first one's: so is the prompt."""
    prompt = save_artifact(tmp_path / "prompt", make_prompt(backbone))
    ask = ("--recycle", method, "--to-backbone", mapped, "--skip-words", 5, "--json")
    code, out, err = run(capsys, prompt, tmp_path / "out", *ask)
    told, made = json.loads(out), load_artifact(tmp_path / "out")
    assert (code, err, told["method"], told["words"]) == (0, "", method, 79)
    np.testing.assert_allclose(made.values["prompt"], values(prompt) @ MAP, rtol=1e-3, atol=1e-4)
    assert made.backbone.fingerprint == fingerprint(mapped)
    assert made.training["from_backbone"]["fingerprint"] == fingerprint(backbone)
    if method == "v2v-lin":
        rows = write_rows(tmp_path / "rows.jsonl", make_rows(2))
        answers = tmp_path / "answers.jsonl"
        words = ["predict", tmp_path / "out", "--input", rows, "--output", answers]
        assert cli.main([str(word) for word in words]) == 0
        assert len(answers.read_text(encoding="utf-8").splitlines()) == 2


def test_a_network_learns_the_map(backbone: Path, mapped: Path):
    """As far as 25 epochs get; the same numbers from the same seed."""
    draw = np.random.default_rng(2)
    source = draw.normal(size=(1024, CONFIG.d_model)).astype(np.float32)
    found = recycling.network(source[:40], source[40:], source[40:] @ MAP, 0)
    want = source[:40] @ MAP
    assert found.dtype == np.float32 and ((found - want) ** 2).mean() < 0.5 * want.var()
    again, other = (recycling.network(source[:3], source[40:99], source[40:99], n) for n in (0, 1))
    np.testing.assert_array_equal(
        again, recycling.network(source[:3], source[40:99], source[40:99], 0)
    )
    assert not np.array_equal(again, other)


def test_least_squares_are_the_papers(backbone: Path):
    """Of too many words the nearest map; of mixtures the one of least norm."""
    draw = np.random.default_rng(3)
    rows, source, target = (draw.normal(size=(n, d)) for n, d in ((3, 4), (30, 4), (30, 6)))
    normal = np.linalg.inv(source.T @ source) @ source.T @ target
    made = recycling.linear_map(rows, source, target, 0)
    np.testing.assert_allclose(made, rows @ normal, rtol=1e-5)
    weights = source @ np.linalg.inv(source.T @ source) @ rows.T
    np.testing.assert_allclose(
        recycling.combination(rows, source, target, 0), weights.T @ target, rtol=1e-5
    )


def test_the_originals_words_are_the_default():
    args = cli._parser().parse_args(["transfer"])
    assert (args.words, args.skip_words) == (recycling.WORDS, recycling.SKIPPED) == (4000, 1000)


def test_vocabularies_have_to_agree(backbone: Path, tmp_path: Path, capsys: Any):
    write_tokenizer(tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("▁book", "▁cook"), encoding="utf-8")
    other = changed(backbone, tmp_path / "other", tmp_path / "words")
    prompt = save_artifact(tmp_path / "prompt", make_prompt(backbone))
    ask = ("--recycle", "v2v-lin", "--to-backbone", other, "--skip-words", 0)
    code, _, err = run(capsys, prompt, tmp_path / "out", *ask)
    assert code == 2 and "have other vocabularies: token" in err and "'▁cook'" in err
    assert read_embedding(other, CONFIG).shape == (CONFIG.vocab_size, CONFIG.d_model)
