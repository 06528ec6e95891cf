"""`jaxprompt plan` end to end on CPU: the step that training compiles, the table, JSON.

One test more compiles for TPUs where their compiler is installed.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import run_fixtures
from planned import plan, planned
from run_fixtures import World

from jaxprompt import compiled
from jaxprompt.config import load_config
from jaxprompt.planning import chips
from jaxprompt.planning.abstract import abstract_step
from jaxprompt.planning.chips import CHIPS, Topology, open_topologies
from jaxprompt.planning.estimate import estimate
from jaxprompt.planning.shapes import step_shape
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.backbones import list_backbones, planned_config, read_config
from jaxprompt.t5.known import known_config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.train import train
from jaxprompt.trees import count
from jaxprompt.typing import UserError

world = run_fixtures.world  # pytest finds fixtures by the module's names
compiled_programs = run_fixtures.compiled

NOT_PLANNED = {"jaxprompt-mini", "jaxprompt-nano"}


def dots(text: str) -> list[str]:
    """Shapes of the matmuls in a compiled program, sorted."""
    return sorted(re.findall(r"= (\S+?)(?:\{[\d,]*\})? dot\(", text))


def test_of_a_sweep_the_first_bank_is_planned(world: World, capsys: pytest.CaptureFixture[str]):
    """Three prompts side by side: three times the rows, the matmuls and what is trained."""
    words = [world.config, "--topology", "cpu:1"]
    (one,) = planned(capsys, *words)
    (three,) = planned(capsys, *words, "sweep={seed: [0, 1, 2]}")
    (two,) = planned(capsys, *words, "sweep={seed: [0, 1], method.length: [4, 3]}")
    (single,) = planned(capsys, *words, "sweep={seed: [0, 1, 2]}", "train.at_once=1")
    assert three["shape"]["rows"] == 3 * one["shape"]["rows"]
    assert three["shape"]["examples"] == 3 * one["shape"]["examples"]
    assert three["minimum"] == 3 * one["minimum"] and three["flops"] == 3 * one["flops"]
    assert three["state"] > 2 * one["state"] and three["weights"] == one["weights"]
    assert two["shape"]["rows"] == 2 * one["shape"]["rows"]  # other lengths take another pass
    assert single["shape"] == one["shape"]


REGULARIZED = ["regularize.wayward=1", "regularize.wayward_text=good", "regularize.noise=1"]


@pytest.mark.parametrize(
    "overrides", [["mesh.data=1"], ["mesh.data=2", *REGULARIZED], ["tune=model"]]
)
def test_the_plan_compiles_the_step_that_training_compiles(
    overrides: list[str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained = []
    run = compiled.CompiledStep._run

    def noted(self: Any, program: Any, part: Any, state: Any, frozen: Any) -> Any:
        result = run(self, program, part, state, frozen)
        trained.append((part.batch.encoder_ids_BS.shape, list(self._programs.values())[-1]))
        return result

    monkeypatch.setattr(compiled.CompiledStep, "_run", noted)
    config = world.load(tmp_path / "run", *overrides, "train.steps=1", "train.eval_every=1")
    train(config)
    (rows, positions), program = trained[0]
    data = config.mesh.data
    t5 = planned_config(config.backbone.name)
    mesh = make_mesh(data, 1, jax.devices()[:data])
    shape = step_shape(config, t5, data)
    assert (shape.rows, shape.encoder) == (rows, positions)
    ours = abstract_step(config, t5, mesh, shape).traced.lower().compile()
    assert dots(ours.as_text() or "") == dots(program.as_text()) != []
    assert ours.cost_analysis()["flops"] == program.cost_analysis()["flops"]
    told, trained_told = ours.memory_analysis(), program.memory_analysis()
    assert told.argument_size_in_bytes == trained_told.argument_size_in_bytes
    assert told.temp_size_in_bytes == trained_told.temp_size_in_bytes


def test_a_table_says_what_one_device_needs(world: World, capsys: pytest.CaptureFixture[str]):
    code, out, err = plan(capsys, world.config, "--topology", "cpu:1")
    assert code == 0 and "compiling for cpu:1" in err
    assert "mesh data 1 x model 1" in out and "chosen from the data" in out
    weights = count(abstract_params(run_fixtures.CONFIG)) * 4 / 2**30
    assert re.search(rf"^weights +{weights:.3f}", out, re.MULTILINE)
    assert re.search(r"^  ratio +1\.\d+", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("fits: ")


def test_json_has_everything(world: World, capsys: pytest.CaptureFixture[str]):
    one, four = planned(
        capsys, world.config, "mesh.data=-1", "data.batch_size=16", "--topology", "cpu:1", "cpu:4"
    )
    assert (one["topology"], one["devices"], one["data"]) == ("cpu:1", 1, 1)
    assert (four["topology"], four["devices"], four["data"]) == ("cpu:4", 4, 4)
    assert one["weights"] == four["weights"] == 4 * count(abstract_params(run_fixtures.CONFIG))
    assert four["flops"] < one["flops"] and one["minimum"] <= one["flops"]
    assert one["sent"] == {} and four["sent"]["all-reduce"] > 0
    assert one["fits"] and one["verdict"].startswith("fits") and one["seconds"] is None
    assert one["shape"]["rows"] >= 1 and four["shape"]["rows"] % 4 == 0


def test_several_topologies_get_a_line_each(world: World, capsys: pytest.CaptureFixture[str]):
    _, out, _ = plan(capsys, world.config, "--topology", "cpu:1", "cpu:2", "mesh.data=-1")
    names = [line.split()[0] for line in out.splitlines()[2:] if line]
    assert names == ["cpu:1", "cpu:2"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--topology", "v5e"], "is not of the form v5e:2x2"),
        (["--topology", "v9:2x2"], "is of no chip that is known: v3, v4"),
        (["--topology", "cpu:0"], "is not of the form"),
        (["--topology", "cpu:99"], "'cpu:99': 8 are here; JAX_NUM_CPU_DEVICES=99"),
        (["--topology", "gpu:1"], "there is no gpu here"),
        (["--topology", "cpu:4"], "uses 1 of the 4 devices of cpu:4; mesh.data=-1 takes all"),
        (["--topology", "cpu:1", "cpu:2", "--search"], "with --search no more than one"),
        (["--topology", "cpu:1", "--output", "x.yaml"], "--output belongs to --search"),
        (["--topology", "cpu:1", "--search", "--try", "seed"], "is not of the form backbone.dtype"),
        (["mesh.model=2", "mesh.data=-1", "--topology", "cpu:2"], "'heads' of size 3"),
        (["backbone.name=./nowhere", "--topology", "cpu:1"], "is no directory and no hub name"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(
    argv: list[str], message: str, world: World, capsys: pytest.CaptureFixture[str]
):
    code, out, err = plan(capsys, world.config, *argv)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_a_missing_tpu_compiler_is_named(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = plan(capsys, world.config, "--topology", "v5e:2x2")
    assert code == 2
    assert "needs the TPU compiler (not a TPU)" in err and "jaxprompt[plan]" in err


def test_loops_of_unknown_length_are_refused(world: World, capsys: pytest.CaptureFixture[str]):
    code, _, err = plan(
        capsys, world.config, "mesh.data=2", "backbone.attention=windowed", "--topology", "cpu:2"
    )
    assert code == 2 and "plan it with backbone.attention=chunked" in err


def test_rows_are_as_long_as_they_may_be_where_there_is_no_vocabulary(world: World, tmp_path: Path):
    config = world.load(tmp_path, "backbone.name=google/t5-small-lm-adapt", "data.packing=false")
    shape = step_shape(config, planned_config(config.backbone.name), 3)
    assert (shape.rows, shape.encoder, shape.segments, shape.examples) == (9, 20, 1, 8)
    assert shape.decoder == 4 == config.data.max_target_length
    assert "vocabulary is not on this machine" in shape.note and "1 of them empty" in shape.note
    longer = world.load(
        tmp_path, "backbone.name=google/t5-small-lm-adapt", "data.pack_length=65",
        "data.max_target_length=64",
    )  # fmt: skip
    shape = step_shape(longer, planned_config(config.backbone.name), 1)
    assert (shape.rows, shape.encoder, shape.segments) == (3, 65, 3)
    assert shape.decoder == 3 * (len("positive") + 2)


def test_a_directory_with_nothing_but_a_config_is_enough(world: World, tmp_path: Path):
    source = Path(world.load(tmp_path).backbone.name)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((source / "config.json").read_bytes())
    assert planned_config(str(tmp_path / "bare")) == read_config(source)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        planned_config(str(tmp_path))


def test_every_listed_backbone_can_be_planned():
    for name in list_backbones():
        assert name in NOT_PLANNED or known_config(name) is not None, name
    sizes = {
        "google/t5-xxl-lm-adapt": 11135, "google/mt5-small": 300, "google-t5/t5-3b": 2852,
        "t5-11b": 11307, "google/byt5-small": 300,
    }  # fmt: skip
    for name, millions in sizes.items():
        config = known_config(name)
        assert config and round(count(abstract_params(config)) / 1e6) == millions, name
    assert known_config("owner/model") is None


def test_the_tpu_compiler_says_what_a_chip_needs(world: World, capsys: Any, tmp_path: Path):
    pytest.importorskip("libtpu")
    path = tmp_path / "backbone"
    run_fixtures.write_backbone(path, d_model=32, num_heads=4, d_kv=8, num_layers=2)
    (found,) = planned(
        capsys, world.config, f"backbone.name={path}", "backbone.dtype=bfloat16", "mesh.data=2",
        "mesh.model=2", "data.packing=false", "--topology", "v5e:2x2",
    )  # fmt: skip
    assert found["fits"] and found["devices"] == 4 and found["capacity"] == CHIPS["v5e"].memory
    assert found["cycles"] > 0 and found["dearest"] and found["sent"]["all-reduce"] > 0
    assert 1 <= found["flops"] / found["minimum"] < 1.5
    low, high = found["examples_per_second"]
    assert 0 < low <= high and found["bound"] in ("compute", "memory", "exchanges")
    with pytest.raises(UserError, match="does not know topology"):
        open_topologies(["v5e:3x5"])


def test_devices_of_this_machine_are_used_as_they_are():
    (topology,) = open_topologies(["cpu:2"])
    assert topology.devices == jax.devices()[:2] and topology.chip is None
    assert chips.Topology("v4:2x2x4", CHIPS["v4"], []).links == 4
    assert chips.Topology("v4:4x4x4", CHIPS["v4"], []).links == 6
    assert chips.Topology("v5e:1x1", CHIPS["v5e"], []).links == 0
    assert chips.Topology("v5e:2x4", CHIPS["v5e"], []).sides == (2, 4)


def test_an_estimate_raises_what_it_does_not_know(world: World, monkeypatch: pytest.MonkeyPatch):
    """Only a program that does not fit is an answer; anything else goes up."""
    topology = Topology("cpu:1", None, jax.devices()[:1])

    def fails(text: str) -> Any:
        def compile(self: Any, **options: Any) -> Any:
            raise jax.errors.JaxRuntimeError(text)

        return compile

    config = load_config(world.config)
    for full in (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 29.30G of 15.25G hbm. Exceeded hbm capacity by 14.05G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (29.30G) exceeds available HBM (15.25G).",
    ):
        monkeypatch.setattr(jax.stages.Lowered, "compile", fails(full))
        found = estimate(config, topology)
        assert not found.fits and found.total == 29.30 * 2**30 and found.capacity == 15.25 * 2**30
        assert found.activations > 0 and found.seconds is None
    monkeypatch.setattr(jax.stages.Lowered, "compile", fails("INTERNAL: oh"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="oh"):
        estimate(config, topology)
