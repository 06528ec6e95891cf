"""`jaxprompt import`: prompts of google-research/prompt-tuning come in and answer as they did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from t5x_writer import t5x_tree, write_orbax, write_t5x
from tiny import make_params
from tiny_backbone import CONFIG, SLOTS, TASK, make_prompt, write_backbone, write_prompt

import jaxprompt as jp
from jaxprompt import cli
from jaxprompt.artifact import load_artifact
from jaxprompt.t5.backbones import fingerprint

LEAF = "encoder.prompt.prompt.prompt"
ARRAY = np.random.default_rng(5).normal(size=(SLOTS, CONFIG.d_model)).astype(np.float32)
IDS = np.asarray([[5, 9, 3, 7, 1]]), np.asarray([[0, 6, 2]])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


def save(path: Path, array: np.ndarray) -> Path:
    """As `Checkpointer.save_numpy` does: numpy's format, no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        np.save(stream, array)
    return path


def numpy_run(root: Path) -> Path:
    for step, scale in ((5, 0), (1000, 1), (200, 0)):
        save(root / "numpy_checkpoints" / f"checkpoint_{step}" / LEAF, scale * ARRAY)
    return root


def t5x_run(root: Path, write: Callable[..., Path] = write_t5x, array: np.ndarray = ARRAY) -> Path:
    target = t5x_tree(make_params(CONFIG)) | {LEAF.replace(".", "/"): array}
    write(root / "checkpoint_7", target)
    return root


SOURCES: dict[str, Callable[[Path], Path]] = {
    "a released file": lambda root: save(root / "sst2.npy", ARRAY),
    "of doubles": lambda root: save(root / "sst2.npy", ARRAY.astype(np.float64)),
    "a file of a run": lambda root: save(root / LEAF, ARRAY),
    "a run": numpy_run,
    "its numpy checkpoints": lambda root: numpy_run(root) / "numpy_checkpoints",
    "one of its steps": lambda root: numpy_run(root) / "numpy_checkpoints" / "checkpoint_1000",
    "a run with both": lambda root: numpy_run(t5x_run(root, array=0 * ARRAY)),
    "a run without numpy": t5x_run,
    "a T5X checkpoint": lambda root: t5x_run(root) / "checkpoint_7",
    "an Orbax checkpoint": lambda root: t5x_run(root, write_orbax) / "checkpoint_7",
}


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["import", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("case", SOURCES)
def test_every_source_gives_the_prompt(case: str, backbone: Path, tmp_path: Path, capsys: Any):
    source, out = SOURCES[case](tmp_path / "source"), tmp_path / "out"
    code, told, err = run(capsys, source, out, "--backbone", backbone)
    assert (code, err) == (0, "") and f"soft, {SLOTS} slots, of {backbone}" in told
    prompt = load_artifact(out)
    np.testing.assert_array_equal(prompt.values["prompt"], ARRAY, strict=True)
    assert prompt.backbone.fingerprint == fingerprint(backbone)
    assert (prompt.layout, prompt.task) == ("{prompt}{input}", {})
    assert prompt.training["source"] == str(source)


def test_it_answers_as_it_did(backbone: Path, tmp_path: Path, capsys: Any):
    ours = make_prompt(backbone)
    source = save(tmp_path / "bare", ours.values["prompt"])
    code, told, _ = run(capsys, source, tmp_path / "out", "--backbone", backbone, "--json")
    assert code == 0 and json.loads(told)["length"] == SLOTS and told.count("\n") == 1
    loaded = jp.load_backbone(str(backbone))
    logits = [np.asarray(jp.logits(loaded, prompt, *IDS))
              for prompt in (ours, jp.load_prompt(str(tmp_path / "out")), None)]  # fmt: skip
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)
    assert np.abs(logits[2] - logits[0]).max() > 1e-3


def test_bfloat16_becomes_float32(backbone: Path, tmp_path: Path, capsys: Any):
    source = t5x_run(tmp_path / "run", array=ARRAY.astype(ml_dtypes.bfloat16))
    assert run(capsys, source, tmp_path / "out", "--backbone", backbone)[0] == 0
    value = load_artifact(tmp_path / "out").values["prompt"]
    np.testing.assert_array_equal(value, ARRAY.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert value.dtype == np.float32


def test_a_task_and_a_layout_go_with_it(backbone: Path, tmp_path: Path, capsys: Any):
    task = tmp_path / "tiny.yaml"
    task.write_text(json.dumps(TASK))
    options = ("--backbone", backbone, "--task", task, "--layout", "{prompt:1}{input}{prompt}")
    assert run(capsys, save(tmp_path / "a.npy", ARRAY), tmp_path / "out", *options)[0] == 0
    prompt = load_artifact(tmp_path / "out")
    assert prompt.layout == "{prompt:1}{input}{prompt}"
    assert prompt.task["labels"] == TASK["labels"]
    (tmp_path / "in.jsonl").write_text('{"text": "good food"}\n')
    said = ["predict", str(tmp_path / "out"), "--input", str(tmp_path / "in.jsonl")]
    assert cli.main(said) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["prediction"] in TASK["labels"].values()


def damaged(root: Path) -> Path:
    file = save(root / "sst2.npy", ARRAY)
    file.write_bytes(file.read_bytes()[:-8])
    return file


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def peft(root: Path) -> Path:
    (empty(root) / "adapter_config.json").write_text("{}")
    return root


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "gone", "no prompt at"),
    "an empty directory": (empty, "no prompt at"),
    "a text": (lambda root: empty(root).joinpath("a").write_text("a") and root / "a", "no prompt"),
    "a damaged file": (damaged, "is damaged"),
    "objects": (
        lambda root: save(root / "a.npy", np.asarray([[{}]], object)), "is damaged: Object arrays"
    ),
    "three axes": (lambda root: save(root / "a.npy", ARRAY[None]), "of shape (1, 3, 12)"),
    "integers": (lambda root: save(root / "a.npy", ARRAY.astype(int)), "a int64 array"),
    "not finite": (lambda root: save(root / "a.npy", ARRAY / 0), "not finite"),
    "another width": (
        lambda root: save(root / "a.npy", ARRAY[:, :-1]), "has d_model 11, backbone"
    ),
    "a prompt of many tasks": (
        lambda root: save(root / "checkpoint_3" / "encoder.prompt.prompt.task_prompts", ARRAY),
        "holds encoder.prompt.prompt.task_prompts, which is no soft prompt",
    ),
    "a directory of one": (
        lambda root: save(root / "checkpoint_3" / "encoder.prompt.prompt.shared", ARRAY).parent,
        "checkpoint_3 holds encoder.prompt.prompt.shared, which is no soft prompt",
    ),
    "a backbone": (
        lambda root: write_t5x(root, t5x_tree(make_params(CONFIG))), "holds no prompt at all"
    ),
    "an artifact": (
        lambda root: write_prompt(root / "p", write_backbone(root)), "is a prompt artifact already"
    ),
    "PEFT without a type": (peft, "it names no peft_type"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(case: str, backbone: Path, tmp_path: Path, capsys: Any):
    make, said = WRONG[case]
    code, out, err = run(
        capsys, make(tmp_path / "source"), tmp_path / "out", "--backbone", backbone
    )
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "{input}"], "has no slot for the prompt"),
        (["--layout", "{prompt:9}{input}"], "counts 9 slots, the prompt has length 3"),
        (["--task", "sst3"], "there is no task 'sst3'; did you mean sst2?"),
        (["--backbone", "gone/"], "'gone/' is no directory"),
    ],
)
def test_wrong_options(options: list[str], said: str, backbone: Path, tmp_path: Path, capsys: Any):
    source = save(tmp_path / "a.npy", ARRAY)
    code, _, err = run(capsys, source, tmp_path / "out", "--backbone", backbone, *options)
    assert code == 2 and said in err and not (tmp_path / "out").exists()
