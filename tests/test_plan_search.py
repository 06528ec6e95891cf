"""`jaxprompt plan --search`: what is tried, what is left out, what is ranked and written."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import pytest
import run_fixtures
import yaml
from planned import plan, planned
from run_fixtures import World

from jaxprompt.config import load_config
from jaxprompt.planning import search
from jaxprompt.planning.chips import CHIPS, Topology
from jaxprompt.planning.estimate import Estimate
from jaxprompt.planning.shapes import StepShape

world = run_fixtures.world  # pytest finds fixtures by the module's names


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
