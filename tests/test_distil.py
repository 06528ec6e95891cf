"""A trained prompt as a teacher: the distance to its logits in the loss, and runs that have one."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from run_fixtures import CONFIG, World, assert_same_end, compiled, source_of, world

from jaxprompt import steps, trees
from jaxprompt.artifact import load_artifact, save_artifact
from jaxprompt.backbone import load_backbone
from jaxprompt.distil import DistilConfig
from jaxprompt.model import PromptedT5
from jaxprompt.planning.abstract import abstract_step
from jaxprompt.planning.flops import matmul_flops
from jaxprompt.planning.shapes import StepShape
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.similarity import average_tokens
from jaxprompt.prompts.soft import FixedPrompt, SoftPrompt
from jaxprompt.sharding import make_mesh
from jaxprompt.steps import StepOptions
from jaxprompt.t5.config import Compute
from jaxprompt.t5.model import T5
from jaxprompt.train import train
from jaxprompt.trainee import make_trainee
from jaxprompt.typing import Batch, UserError

__all__ = ["compiled", "world"]  # fixtures

P, WEIGHT = 3, 0.7
BACKBONE = T5(tiny.CONFIG, tiny.make_params(), Compute(scan_unroll=1))
ROWS = np.random.default_rng(0).normal(size=(4, P, tiny.CONFIG.d_model)).astype(np.float32)
EXAMPLES = tiny.make_examples(4, P)
OPTIONS = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "optim.learning_rate=0.05",
    "backbone.dropout=0.1", "data.row_multiple=2",
]  # fmt: skip


def batch_of(prompts: int) -> Batch:
    """Two rows, each of one prompt."""
    rows = [EXAMPLES[:2], EXAMPLES[2:]]
    owned = [
        [dataclasses.replace(example, prompt=n % prompts) for example in row]
        for n, row in enumerate(rows)
    ]
    return tiny.make_batch(owned, 20, 8, 2)


def gradients(model: PromptedT5, batch: Batch, count: int, distil: float) -> tuple[dict, dict]:
    graphdef, trained, frozen = trees.split(model)
    assert "teacher" not in trained
    state = steps.init_state(trained, [optax.sgd(1.0)] * count, range(count))
    run = jax.jit(steps.gradients, static_argnums=(0, 1))
    return run(graphdef, StepOptions(distil=distil), state, frozen, batch)


def logits(rows: np.ndarray, batch: Batch) -> np.ndarray:
    parts = trees.split(PromptedT5(BACKBONE, SoftPrompt(jnp.asarray(rows))))
    return np.asarray(jax.jit(steps.logits, static_argnums=0)(*parts, batch), np.float64)


def test_the_distance_to_the_teachers_logits_is_in_the_loss():
    """Of a bank's prompts each from its own teacher; without a weight the teacher is not asked."""
    first, second, *teachers = map(jnp.asarray, ROWS)
    batch = batch_of(2)
    model = PromptedT5(
        BACKBONE,
        PromptBank([SoftPrompt(first), SoftPrompt(second)]),
        PromptBank([FixedPrompt(rows) for rows in teachers]),
    )
    plain_grads, plain = gradients(model, batch, 2, 0.0)
    grads, taught = gradients(model, batch, 2, WEIGHT)
    for n in range(2):
        apart = (logits(ROWS[n], batch_of(1)) - logits(ROWS[2 + n], batch_of(1)))[n]
        added = WEIGHT * ((apart**2).mean(-1) * batch.loss_weights_BT[n]).sum()
        np.testing.assert_allclose(taught["loss"][n], plain["loss"][n] + added, rtol=1e-5)
        np.testing.assert_array_equal(taught["units"], plain["units"])
    own, other = (trees.flatten(tree) for tree in (grads, plain_grads))
    assert all(not np.allclose(own[path], other[path], atol=1e-3) for path in own)
    untaught = PromptedT5(BACKBONE, SoftPrompt(first))
    assert not any("teacher" in path for path in trees.flatten(trees.split(untaught)[2]))


def test_a_run_with_a_teacher_goes_on_to_the_bit(world: World, tmp_path: Path):
    teacher = source_of(world, "teacher")
    options = [*OPTIONS, f"distil.prompt={teacher}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(world.load(whole, *options))
    train(world.load(broken, *options, "train.steps=2"))
    with pytest.raises(UserError, match=r"was trained with distil\.weight 0\.1, now 0\.2"):
        train(world.load(broken, *options, "distil.weight=0.2"))
    train(world.load(broken, *options))
    assert_same_end(whole, broken)


def test_the_weight_is_scaled_by_the_similarity_of_teacher_and_task(world: World, tmp_path: Path):
    teacher, config = source_of(world, "teacher"), world.load(tmp_path / "run")
    prompt = load_artifact(teacher)
    rows = prompt.values["prompt"] + load_artifact(source_of(world, "other")).values["prompt"]
    target = save_artifact(
        tmp_path / "target", dataclasses.replace(prompt, values={"prompt": rows})
    )
    backbone = load_backbone(str(world.root / "backbone"))
    for options, scale in (
        (DistilConfig(str(teacher)), 1.0),
        (
            DistilConfig(str(teacher), target=str(target)),
            average_tokens(prompt.values["prompt"], rows),
        ),
    ):
        one = make_trainee("", dataclasses.replace(config, distil=options), backbone)
        assert one.options.distil == pytest.approx(0.1 * scale) and 0 < scale <= 1
        np.testing.assert_array_equal(one.teacher, prompt.values["prompt"])
    assert make_trainee("", config, backbone).options.distil == 0


def test_a_plan_has_the_teachers_forward_pass_and_no_backward(world: World, tmp_path: Path):
    """Its files need not be there: shapes are enough, also of the sources of attempt."""
    mesh, shape = make_mesh(1, 1), StepShape(2, 40, 8, 2, 4)
    attempt = ["method.name=attempt", "method.sources=[nowhere]"]
    kinds = {"bare": [], "taught": ["distil.prompt=nowhere"], "attempt": attempt}
    flops = {
        name: matmul_flops(
            abstract_step(world.load(tmp_path, *options), CONFIG, mesh, shape).traced.jaxpr
        )
        for name, options in kinds.items()
    }
    # forward, and gradients of activations: twice the forward pass without its attention
    assert 1.2 < flops["taught"] / flops["bare"] < 1.5
    assert 1 < flops["attempt"] / flops["bare"] < 1.2


def test_a_teacher_that_cannot_teach_is_refused(world: World, tmp_path: Path):
    teacher, against = source_of(world, "teacher"), tmp_path / "against"
    prompt = load_artifact(teacher)
    save_artifact(against, dataclasses.replace(prompt, values={"prompt": -prompt.values["prompt"]}))
    cases = {
        r"has 4 slots, the run's method soft 5": ["method.length=5"],
        r"has similarity -1\.000 to distil\.target": [f"distil.target={against}"],
        r"distil\.weight is 0": ["distil.weight=0"],
        r"leave it out with tune: model": ["tune=model"],
        r"no distil\.prompt to compare": ["distil.prompt=", f"distil.target={against}"],
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message):
            train(world.load(tmp_path / "run", *OPTIONS, f"distil.prompt={teacher}", *options))
