"""`jaxprompt plan` end to end on CPU: the step that training compiles, the table, JSON, the search.

One test more compiles for TPUs where their compiler is installed.
"""

import dataclasses
import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import run_fixtures
import yaml
from run_fixtures import World

from jaxprompt import cli, compiled
from jaxprompt.config import load_config
from jaxprompt.planning import apart, chips, search
from jaxprompt.planning.abstract import abstract_step
from jaxprompt.planning.chips import CHIPS, Topology, open_topologies
from jaxprompt.planning.estimate import Estimate, estimate
from jaxprompt.planning.shapes import StepShape, step_shape
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.backbones import list_backbones, planned_config, read_config
from jaxprompt.t5.known import known_config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.train import train
from jaxprompt.trees import count
from jaxprompt.typing import UserError

world = run_fixtures.world  # pytest finds fixtures by the module's names
compiled_programs = run_fixtures.compiled

NOT_PLANNED = {"jaxprompt-mini"}


def plan(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `jaxprompt plan ARGV`."""
    code = cli.main(["plan", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    """The JSON objects of a plan that comes to an end."""
    code, out, _ = plan(capsys, *argv, "--json")
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


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


def test_a_search_ranks_what_it_tried_and_writes_the_best(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    best = tmp_path / "best.yaml"
    argv = ["--topology", "cpu:2", "--search", "--try", "backbone.remat=full,none", "--limit", "6"]
    ranking = planned(capsys, world.config, "data.packing=false", *argv, "--output", best)
    flops = [one["flops"] for one in ranking]
    assert len(flops) > 2 and flops == sorted(flops)
    assert {one["settings"]["backbone.remat"] for one in ranking} == {"full", "none"}
    assert all(one["settings"]["mesh.model"] == 1 for one in ranking), "3 heads do not divide"
    winner = ranking[0]["settings"]
    written = load_config(best)
    assert written.mesh.weights_over_data == winner["mesh.weights_over_data"]
    assert written.backbone.remat == winner["backbone.remat"] == "none"
    (again,) = planned(capsys, best, "--topology", "cpu:2")
    same = ("flops", "total", "weights", "activations", "sent", "shape")
    assert [again[key] for key in same] == [ranking[0][key] for key in same]
    assert yaml.safe_load(best.read_text(encoding="utf-8"))["data"]["packing"] is False


def test_a_search_says_what_it_left_out_and_what_to_type(
    world: World, capsys: pytest.CaptureFixture[str]
):
    code, out, err = plan(
        capsys, world.config, "--topology", "cpu:2", "--search", "--limit", "1",
        "--try", "backbone.remat=none", "--try", "mesh.weights_over_data=false",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[0].split()[:2] == ["rank", "mesh"]
    assert "left out" in err and "'heads' of size 3" in err and "after 1 compilations" in err
    typed = re.search(r"the best: jaxprompt (train .*)", err)
    assert typed and "mesh.data=-1" in typed[1] and "backbone.remat=none" in typed[1]


def stand_in(found: dict[int, float], capacity: float, calls: list[int]) -> Any:
    """An `estimate` whose activations follow from the microbatches."""

    def estimated(config: Any, topology: Topology, prompts: int) -> Estimate:
        parts = config.train.accumulate
        calls.append(parts)
        activations = found[parts]
        return Estimate(
            topology="cpu:1", devices=1, data=1, model=1, shape=StepShape(8, 8, 8, 1, 8),
            weights=10, state=0, activations=int(activations), total=10 + activations,
            capacity=capacity, fits=10 + activations <= capacity, minimum=1, flops=2,
            remat=config.backbone.remat,
        )  # fmt: skip

    return estimated


def test_microbatches_shrink_by_what_a_step_lacks(world: World, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    needs = {1: 800.0, 2: 400.0, 4: 200.0, 8: 90.0, 16: 50.0, 32: 30.0}
    monkeypatch.setattr(search, "estimate_apart", stand_in(needs, 110.0, calls))

    def config_with(settings: dict[str, Any]) -> Any:
        return load_config(world.config, search.overrides(settings))

    topology = Topology("cpu:1", None, jax.devices()[:1])
    asked = {"backbone.remat": ["none"], "backbone.scan_unroll": [0]}
    found = search.search(config_with, topology, limit=9, asked=asked, say=lambda line: None)
    assert calls == [1, 16], "eight times too much, and a little more"
    assert [one.settings["train.accumulate"] for one in found.ranking] == [16, 1]
    assert ("nothing to divide weights over") in [reason for _, reason in found.skipped]


def test_a_search_that_is_stopped_keeps_what_it_found(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    calls: list[int] = []
    enough = stand_in({1: 50.0}, 110.0, calls)

    def until_ctrl_c(config: Any, topology: Topology, prompts: int) -> Estimate:
        if calls:
            raise KeyboardInterrupt
        return enough(config, topology, prompts)

    monkeypatch.setattr(search, "estimate_apart", until_ctrl_c)
    best = tmp_path / "best.yaml"
    argv = ["--topology", "cpu:1", "--search", "--try", "backbone.remat=none,full"]
    code, out, err = plan(capsys, world.config, *argv, "--output", best)
    assert (code, calls) == (130, [1])
    assert re.search(r"^1 +1 x 1 .* none ", out, re.MULTILINE) and "stopped before all" in err
    assert load_config(best).backbone.remat == "none"


def test_what_a_layer_keeps_is_tried_on_the_best_mesh(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """Of "auto" is told what it came to, which is not compiled again."""

    def estimated(config: Any, topology: Topology, prompts: int) -> Estimate:
        cost = {"frozen": 4, "dots": 3, "none": 9}.get(config.backbone.remat, 5)
        found = stand_in({1: 1.0}, 99.0, [])(config, topology, prompts)
        remat = {"auto": "frozen"}.get(config.backbone.remat, config.backbone.remat)
        worse = 10 * config.mesh.weights_over_data - config.backbone.scan_unroll / 4
        return dataclasses.replace(found, remat=remat, flops=cost + worse)

    def config_with(settings: dict[str, Any]) -> Any:
        return load_config(world.config, search.overrides(settings))

    monkeypatch.setattr(search, "estimate_apart", estimated)
    topology = Topology("cpu:2", None, jax.devices()[:2])
    found = search.search(config_with, topology, limit=99, asked={}, say=lambda line: None)
    keys = "mesh.weights_over_data", "backbone.remat", "backbone.scan_unroll"
    tried = [tuple(one.settings[key] for key in keys) for one in found.ranking]
    assert tried[:3] == [(False, "dots", 2), (False, "dots", 0), (False, "frozen", 0)]
    assert tried[-2:] == [(False, "none", 0), (True, "frozen", 0)] and len(tried) == 8


def test_weights_that_fill_a_chip_are_not_compiled(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "estimate_apart", lambda *_: pytest.fail("compiled"))
    small = dataclasses.replace(CHIPS["v5e"], memory=1000.0)
    topology = Topology("v5e:1x1", small, jax.devices()[:1])

    def config_with(settings: dict[str, Any]) -> Any:
        return load_config(world.config, search.overrides(settings))

    found = search.search(config_with, topology, limit=9, asked={}, say=lambda line: None)
    assert not found.ranking
    assert any("weights alone take" in reason for _, reason in found.skipped)
    kinds = [settings.get("backbone.quantize") for settings, _ in found.skipped]
    assert kinds[0] is None and kinds[-1] == "int8", "where no float weights fit"


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


STAND_IN = (sys.executable, str(Path(__file__).with_name("crashing_compiler.py")))


@pytest.fixture
def crashing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """TPUs are CPUs here, and what their compiler does says `crashing_compiler.py`."""
    monkeypatch.setattr(chips, "_check_tpu", lambda name: None)
    monkeypatch.setattr(chips, "_devices_there", lambda name: jax.devices()[:1])
    monkeypatch.setattr(apart, "COMMAND", STAND_IN)


@pytest.mark.usefixtures("crashing_compiler")
def test_a_compiler_that_crashes_ends_in_a_sentence(
    world: World, capsys: pytest.CaptureFixture[str]
):
    crash = "crashed on the step for v4:1x1x1 (SIGSEGV: Check failed: a == b); other settings"
    killed = "was killed on the step for v6e:1x1 (SIGKILL), as the system does when memory runs out"
    code, out, err = plan(capsys, world.config, "--topology", "v4:1x1x1", "--json")
    assert (code, out) == (2, "") and crash in err and "Traceback" not in err

    first, second, told = planned(
        capsys, world.config, "--topology", "v4:1x1x1", "v6e:1x1", "v5e:1x1"
    )
    assert (first["topology"], first["fits"]) == ("v4:1x1x1", None) and crash in first["error"]
    assert killed in second["error"]
    assert told["fits"] and told["seconds"] and told["shape"]["rows"] >= 1 and "error" not in told

    code, out, err = plan(capsys, world.config, "--topology", "v4:1x1x1", "v5p:1x1x1")
    assert code == 2 and crash in err and "v5p:1x1x1 (SIGABRT: Check failed: a == b)" in err
    lines = [line for line in out.splitlines() if line.startswith(("v4", "v5p"))]
    assert len(lines) == 2 and all(line.endswith("compiler failed") for line in lines)


@pytest.mark.usefixtures("crashing_compiler")
def test_a_search_leaves_out_what_crashes(world: World, capsys: pytest.CaptureFixture[str]):
    argv = ["--topology", "v3:1x1", "--search", "--limit", "1", "--try", "optim.warmup_steps=0,1"]
    code, out, err = plan(capsys, world.config, *argv)
    assert code == 0 and out == "nothing was compiled\n"
    assert re.search(r"1: .*warmup_steps=0.*: the compiler failed", err)
    assert re.search(r"left out: .*warmup_steps=0.*INTERNAL: RET_CHECK failure", err)
    assert re.search(r"left out: .*warmup_steps=1.*after 1 compilations", err)


def test_a_compilation_ends_with_its_plan(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C kills the child; where its parent was killed, the child sees the end of its input."""
    argv = [*STAND_IN, str(world.config), "v5e:2x2", "1"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as orphan:
        assert orphan.stdin is not None
        orphan.stdin.close()
        assert orphan.wait(timeout=120) == 1

    children: list[subprocess.Popen[bytes]] = []

    def started(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*args, **options))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return children[-1]

    popen, before = subprocess.Popen, signal.signal(signal.SIGALRM, signal.default_int_handler)
    monkeypatch.setattr(apart.subprocess, "Popen", started)
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(chips, "_check_tpu", lambda name: None)
    monkeypatch.setattr(chips, "_devices_there", lambda name: jax.devices()[:1])
    try:
        code, out, err = plan(capsys, world.config, "--topology", "v5e:1x1")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (code, out) == (130, "") and "interrupted" in err
    assert [child.returncode for child in children] == [-signal.SIGKILL]


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
