"""Runs on simulated devices, in every mesh shape: the same losses and prompts as on one."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import tiny
import yaml
from flax import nnx
from method_cases import examples_of, make
from run_fixtures import World, compiled, losses, make_world, records, run_mapping, write_backbone

from jaxprompt import steps, trees
from jaxprompt.artifact import load_artifact
from jaxprompt.backbone import load_backbone
from jaxprompt.model import PromptedT5
from jaxprompt.sharding import make_mesh, replicate, shard_batch, tree_shardings
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.t5 import spreading
from jaxprompt.t5.config import Compute
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.model import T5
from jaxprompt.t5.spreading import between, gathered, is_spread, summed
from jaxprompt.typing import Array, UserError

__all__ = ["compiled"]  # fixture

OPTIONS = [
    "train.steps=4", "train.eval_every=4", "train.save_every=2", "data.row_multiple=4",
    "sweep={seed: [0, 1], method.length: [3, 4]}",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A backbone whose heads, vocabulary and MLP divide by 8."""
    root = tmp_path_factory.mktemp("world")
    made = make_world(root, root)
    write_backbone(root / "backbone", num_heads=8, d_kv=3)
    made.config.write_text(yaml.safe_dump(run_mapping(root)), encoding="utf-8")
    return made


def run(world: World, directory: Path, data: int, model: int, *options: str) -> Path:
    mesh = [f"mesh.data={data}", f"mesh.model={model}"]
    sweep(load_sweep(world.config, [f"output_dir={directory}", *mesh, *OPTIONS, *options]))
    return directory


@pytest.fixture(scope="module")
def on_one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tmp_path_factory.mktemp("runs") / "one", 1, 1)


def assert_same(left: Path, right: Path) -> None:
    members = sorted(path.name for path in (right / "prompts").iterdir())
    assert len(members) == 4
    for name in members:
        ours, theirs = left / "prompts" / name, right / "prompts" / name
        np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5)
        np.testing.assert_allclose(
            load_artifact(ours / "prompt").values["prompt"],
            load_artifact(theirs / "prompt").values["prompt"],
            atol=1e-5,
        )
        norms = [[r["grad_norm"] for r in records(x) if "grad_norm" in r] for x in (ours, theirs)]
        np.testing.assert_allclose(*norms, rtol=1e-4)


SHAPES = [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)]


@pytest.mark.parametrize(("data", "model"), SHAPES)
def test_every_mesh_trains_what_one_device_trains(
    world: World, on_one: Path, tmp_path: Path, data: int, model: int
):
    assert_same(run(world, tmp_path / "run", data, model), on_one)


@pytest.mark.parametrize(("data", "model"), [(4, 1), (2, 4)])
def test_weights_divided_over_data_train_the_same(
    world: World, on_one: Path, tmp_path: Path, data: int, model: int
):
    over = "mesh.weights_over_data=true"
    assert_same(run(world, tmp_path / "run", data, model, over), on_one)
    backbone = load_backbone(
        str(world.root / "backbone"), mesh=make_mesh(data, model), weights_over_data=True
    )
    specs = trees.flatten(param_specs(backbone.config))
    for path, leaf in trees.flatten(backbone.params).items():
        parts = data if "embed" in specs[path].axes else 1
        parts *= model if {"heads", "mlp", "vocab"} & {*specs[path].axes} else 1
        assert leaf.addressable_shards[0].data.size * parts == leaf.size, path


def test_int8_weights_on_a_mesh_train_what_they_train_on_one_device(world: World, tmp_path: Path):
    """Codes and scales divided over `model`, then over `data` too."""
    int8 = ["backbone.quantize=int8", "sweep={seed: [0, 1, 2, 3]}"]
    on_one = run(world, tmp_path / "one", 1, 1, *int8)
    assert_same(run(world, tmp_path / "model", 2, 2, *int8), on_one)
    over = "mesh.weights_over_data=true"
    assert_same(run(world, tmp_path / "both", 2, 2, *int8, over), on_one)


@pytest.mark.parametrize("model", [2, 4])
def test_rows_divided_over_model_train_the_same(
    world: World, on_one: Path, tmp_path: Path, model: int
):
    """And what stands between matmuls really is divided, in training and where rows divide."""
    options = ["mesh.rows_over_model=true", "backbone.attention=rowwise", "backbone.remat=frozen"]
    with mock.patch.object(spreading, "is_spread", wraps=spreading.is_spread) as asked:
        assert_same(run(world, tmp_path / "run", 4 // model, model, *options), on_one)
    spread = [x for (compute, x), _ in asked.call_args_list if is_spread(compute, x)]
    assert {x.ndim for x in spread} == {3}


# `prefix` hands over what `p-tuning-v2` does, `dept` what `adept`; `smop`, `pt-moe`, `mpt` and
# `multitask`, a prompt for each segment, what `attempt`; the rest what `soft`, which the runs above
# train.
VALUES = {"p-tuning-v2": {"places": ["encoder", "decoder", "cross"]}, "per-layer": {}, "adept": {},
          "attempt": {}}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_what_methods_hand_over_meets_divided_heads_and_vocabulary(case: str):
    params, method = tiny.make_params(), make(case, **VALUES[case])
    examples, mesh = examples_of(case, 6), make_mesh(2, 4)
    batch = tiny.make_batch([examples[:3], examples[3:]], 32, 12, 3)
    shardings = trees.flatten(tree_shardings(mesh, param_specs(tiny.CONFIG)))
    told = []
    for compute in (Compute(scan_unroll=1), Compute(scan_unroll=1, mesh=mesh)):
        prompted = PromptedT5(T5(tiny.CONFIG, params, compute), method)
        graphdef, *parts = trees.split(prompted)
        if compute.mesh is not None:
            parts, batch = replicate(mesh, parts), shard_batch(mesh, batch)
            weights = trees.flatten(parts[1]["backbone"]["params"])
            placed = {path: jax.device_put(w, shardings[path]) for path, w in weights.items()}
            parts[1]["backbone"]["params"] = trees.unflatten(placed)
        state = steps.init_state(parts[0], [optax.sgd(1.0)], [0])
        run = jax.jit(steps.gradients, static_argnums=(0, 1))
        told.append(run(graphdef, steps.StepOptions(), state, parts[1], batch))
    for left, right in zip(*map(jax.tree.leaves, told), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5)


def test_what_is_divided_by_rows_lies_so():
    mesh = make_mesh(2, 2)
    compute = Compute(mesh=mesh, rows_over_model=True)
    x = np.ones((8, 3, 4), np.float32)

    def rows_of_each(function: Callable[..., Array], x: np.ndarray) -> int:
        return jax.jit(function)(x).addressable_shards[0].data.shape[0]

    assert rows_of_each(lambda x: between(compute, x) + 1, x) == 2
    assert rows_of_each(lambda x: summed(compute, x) + 1, x) == 2
    assert rows_of_each(lambda x: gathered(compute, x) + 1, x) == 4
    assert rows_of_each(lambda x: between(compute, x) + 1, x[:6]) == 3  # 6 rows over 4: not divided
    assert rows_of_each(jax.grad(lambda x: gathered(compute, x).sum() ** 2), x) == 2


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this flax has one mode only")
def test_tree_mode_trains_the_same_on_a_mesh(world: World, on_one: Path, tmp_path: Path):
    with nnx.set_graph_mode(False):
        assert_same(run(world, tmp_path / "run", 2, 4), on_one)


def test_a_run_goes_on_with_its_rows_on_another_mesh(world: World, tmp_path: Path):
    """Rows made for four devices, then taken up by one and by eight."""
    free = ["data.row_multiple=0", "sweep={seed: [0, 1], method.length: [3, 4]}"]
    whole = run(world, tmp_path / "whole", 4, 1, *free)
    broken = run(world, tmp_path / "broken", 4, 1, *free, "train.steps=2")
    run(world, broken, 1, 1, *free, "train.steps=3")
    run(world, broken, 8, 1, *free)
    assert_same(broken, whole)


def test_heads_that_do_not_divide_are_refused_with_sizes_that_would(world: World, tmp_path: Path):
    write_backbone(world.root / "six", num_heads=6)
    with pytest.raises(
        UserError, match=r"axis 'heads' of size 6 .* model sizes that would: \[1, 2, 3\]"
    ):
        run(world, tmp_path / "run", 1, 4, f"backbone.name={world.root / 'six'}")
