"""Configs with `extends:` and `phases:`, and the ladder of backbones that is written with them."""

import math
from pathlib import Path

import jax
import pytest

from jaxprompt.config import PretrainConfig, dump, load_config
from jaxprompt.phases import load_phases
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import param_specs
from jaxprompt.typing import UserError

BASE = """
output_dir: runs/x
tokenizer: vocabulary
model: {d_model: 16, num_layers: 3}
backbone: {dtype: bfloat16}
mixture:
  batch_size: 4
  entries: [{objective: prefix_lm, files: [a.jsonl]}, {objective: prefix_lm, files: [b.jsonl]}]
phases:
  span: {train: {steps: 10}}
  lm: {after: span, seed: 1, mixture: {entries: [{objective: prefix_lm, files: [c.jsonl]}]}}
  more: {after: lm}
"""
LADDER = {
    "250k": (238_528, 1_048_576),
    "1m": (952_192, 2_097_152),
    "4m": (3_804_928, 4_194_304),
    "16m": (15_933_696, 6_291_456),
    "60m": (57_361_280, 10_485_760),
}


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def counted(config: T5Config) -> tuple[int, int]:
    """Parameters outside of the embeddings, and those of the embeddings and the output layer."""
    flat, _ = jax.tree.flatten(param_specs(config), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    words = sum(math.prod(spec.shape) for spec in flat if "vocab" in spec.axes)
    return sum(math.prod(spec.shape) for spec in flat) - words, words


def test_phases_share_all_but_what_they_say(tmp_path: Path):
    phases = load_phases(write(tmp_path, BASE), ["output_dir=runs/y", "phases.more.seed=5"])
    assert {name: config.output_dir for name, config in phases.items()} == {
        "span": "runs/y/span", "lm": "runs/y/lm", "more": "runs/y/more",
    }  # fmt: skip
    span, lm, more = phases.values()
    assert span.model is not None and span.model.d_model == 16 and span.tokenizer == "vocabulary"
    assert (span.train.steps, span.seed, lm.seed, more.seed) == (10, 0, 1, 5)
    assert lm.model is more.model is None and not lm.tokenizer
    assert lm.backbone.name == "runs/y/span/backbone" and lm.backbone.dtype == "bfloat16"
    assert more.backbone.name == "runs/y/lm/backbone"
    files = [[entry.files[0] for entry in config.mixture.entries] for config in (span, lm, more)]
    assert files == [["a.jsonl", "b.jsonl"], ["c.jsonl"], ["a.jsonl", "b.jsonl"]]
    assert lm.mixture.batch_size == 4
    for config in phases.values():
        again = load_phases(write(tmp_path, dump(config), "again.yaml"))
        assert again == {"": config}
    assert list(load_phases(tmp_path / "run.yaml", (), ["lm"])) == ["lm"]


@pytest.mark.parametrize(
    ("below", "options", "only", "message"),
    [
        (
            "",
            ["phases.lm.after=more"],
            [],
            "is to come after 'more'; the phases before it are span",
        ),
        ("", ["phases.lm.after=lm"], [], "is to come after 'lm'"),
        ("", ["phases.lm=3"], [], "phases.lm must be a mapping of a run's options"),
        ("", ["phases.lm.output_dir=x"], [], "a phase's directory is output_dir/lm"),
        ("", ["phases=[span]"], [], "must be a mapping of names"),
        ("", ["phases.lm.train.step=3"], [], "unknown key 'train.step'; did you mean"),
        ("", [], ["second"], "'second' is not one of the phases: span, lm, more"),
        ("  a/b: {}\n", [], [], "run.yaml:13: 'a/b' is to be the name of a directory"),
    ],
)
def test_phases_that_cannot_be_are_said(
    tmp_path: Path, below: str, options: list[str], only: list[str], message: str
):
    with pytest.raises(UserError) as caught:
        load_phases(write(tmp_path, BASE + below), options, only)
    assert message in str(caught.value)


def test_phases_are_no_single_run(tmp_path: Path):
    with pytest.raises(UserError, match="this config has phases, so it is several runs"):
        load_config(write(tmp_path, BASE), (), PretrainConfig)
    with pytest.raises(UserError, match="--only 'span': pretrain/nano has no phases"):
        load_phases("pretrain/nano", (), ["span"])


def test_a_config_extends_another(tmp_path: Path):
    write(tmp_path, BASE, "base.yaml")
    above = """
extends: base.yaml
output_dir: runs/z
model: {d_model: 32}
phases:
  span: {train: {steps: 20}}
  more: {mixture: {entries: []}}
"""
    span, lm, more = load_phases(write(tmp_path, above)).values()
    assert span.model is not None and (span.model.d_model, span.model.num_layers) == (32, 3)
    assert (span.train.steps, lm.seed, more.mixture.entries) == (20, 1, ())
    assert lm.backbone.name == "runs/z/span/backbone"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere\n", "run.yaml:1: there is no config file 'nowhere'"),
        (
            "extends: [a, b]\n",
            "run.yaml:1: extends must be a config's name or path, got a list of 2",
        ),
        ("extends: run.yaml\n", "run.yaml:1: run.yaml extends this config itself"),
        ("extends: base.yaml\nmodel: {d_modle: 3}\n", "run.yaml:2: unknown key 'model.d_modle'"),
        ("extends: base.yaml\nseed: 1\n", "base.yaml:2: unknown key 'model.d_modle'"),
        ("extends: base.yaml\nmodel: null\n", "go together"),
    ],
)
def test_what_extends_wrongly_is_said_with_its_place(tmp_path: Path, text: str, message: str):
    base = "output_dir: x\nmodel: {d_modle: 1}\ntokenizer: y\nmixture: {}\n"
    write(tmp_path, base, "base.yaml")
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), (), PretrainConfig)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_has_the_parameters_of_its_name(name: str):
    phases = load_phases(f"pretrain/ladder/{name}")
    assert list(phases) == ["span", "lm", "lm-long", "tasks"]
    model = phases["span"].model
    assert model is not None and model.gated and not model.tie_word_embeddings
    nominal = {"k": 1_000, "m": 1_000_000}[name[-1]] * int(name[:-1])
    body, words = LADDER[name]
    assert counted(model) == (body, words) and 0.85 < body / nominal < 1.15
    before = {"lm": "span", "lm-long": "lm", "tasks": "lm"}
    for phase, config in phases.items():
        assert config.output_dir == f"runs/ladder/{name}/{phase}"
        assert config.train.loss_by == ("examples" if phase == "tasks" else "tokens")
        if phase in before:
            assert config.backbone.name == f"runs/ladder/{name}/{before[phase]}/backbone"


def test_the_rungs_differ_in_shape_and_length_alone():
    first, *others = (load_phases(f"pretrain/ladder/{name}") for name in LADDER)
    for other in others:
        for phase, config in first.items():
            assert other[phase].mixture.entries == config.mixture.entries
            assert other[phase].validation == config.validation


def test_nano_is_under_2_mb_as_bfloat16():
    """Two bytes a parameter; the vocabulary's file is 596 kB, card and headers take 20."""
    model = load_config("pretrain/nano", (), PretrainConfig).model
    assert model is not None and model.tie_word_embeddings and model.scale_decoder_outputs
    assert counted(model) == (139_968, 524_288)
    assert 2 * sum(counted(model)) + 620_000 < 2_000_000
