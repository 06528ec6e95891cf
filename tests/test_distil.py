"""Trained prompts as teachers: distances to what they make in the loss, and runs that have them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from run_fixtures import (
    CONFIG,
    World,
    assert_same_end,
    compiled,
    losses,
    mixture_of,
    records,
    source_of,
    world,
)

from jaxprompt import steps, trees
from jaxprompt.artifact import load_artifact, save_artifact
from jaxprompt.backbone import load_backbone
from jaxprompt.distil import NO_TEACHER, Distances, DistilConfig
from jaxprompt.model import PromptedT5
from jaxprompt.planning.abstract import abstract_step
from jaxprompt.planning.flops import matmul_flops
from jaxprompt.planning.shapes import StepShape
from jaxprompt.prompts import METHODS, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.multitask import MptConfig
from jaxprompt.prompts.similarity import average_tokens
from jaxprompt.prompts.soft import FixedPrompt, SoftPrompt
from jaxprompt.sharding import make_mesh
from jaxprompt.steps import StepOptions
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
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


def gradients(
    model: PromptedT5, batch: Batch, count: int, distil: Distances = NO_TEACHER, by: str = "tokens"
) -> tuple[dict, dict]:
    graphdef, trained, frozen = trees.split(model)
    assert "teacher" not in trained
    state = steps.init_state(trained, [optax.sgd(1.0)] * count, range(count))
    run = jax.jit(steps.gradients, static_argnums=(0, 1))
    return run(graphdef, StepOptions(distil=distil, loss_by=by), state, frozen, batch)


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
        PromptBank([FixedPrompt(rows[None]) for rows in teachers]),
    )
    plain_grads, plain = gradients(model, batch, 2)
    grads, taught = gradients(model, batch, 2, Distances(squared=WEIGHT))
    for n in range(2):
        apart = (logits(ROWS[n], batch_of(1)) - logits(ROWS[2 + n], batch_of(1)))[n]
        added = WEIGHT * ((apart**2).mean(-1) * batch.loss_weights_BT[n]).sum()
        np.testing.assert_allclose(taught["loss"][n], plain["loss"][n] + added, rtol=1e-5)
        np.testing.assert_allclose(taught["task_loss"][n], plain["loss"][n], rtol=1e-6)
        np.testing.assert_allclose(taught["distil_logits"][n], added, rtol=1e-5)
        np.testing.assert_array_equal(taught["units"], plain["units"])
    own, other = (trees.flatten(tree) for tree in (grads, plain_grads))
    assert all(not np.allclose(own[path], other[path], atol=1e-3) for path in own)
    untaught = PromptedT5(BACKBONE, SoftPrompt(first))
    assert not any("teacher" in path for path in trees.flatten(trees.split(untaught)[2]))


def by_hand(methods: list[PromptMethod], batch: Batch) -> list[np.ndarray]:
    """Logits and last hidden states of a bank of prompts, float64."""
    parts = trees.split(PromptedT5(BACKBONE, PromptBank(methods)))
    run = jax.jit(lambda *trees_, batch: trees.merge(parts[0], *trees_).outputs(batch))
    return [np.asarray(leaf, np.float64) for leaf in run(*parts[1:], batch=batch)]


def test_each_task_s_own_teacher_in_packed_rows():
    """MPT's source training: KL at a temperature and hidden states, by numpy on padded rows."""
    by = "examples"
    config = MptConfig(length=P, tasks=("a", "b"))
    draw = np.random.default_rng(1)
    values = {
        "prompt": ROWS[0],
        "left": draw.normal(size=(2, P, 1)),
        "right": draw.normal(size=(2, 1, tiny.CONFIG.d_model)),
    }
    values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    taught = [dataclasses.replace(one, task=n % 2) for n, one in enumerate(EXAMPLES)]
    packed = tiny.make_batch([taught[:3], taught[3:]], 30, 10, 3)
    model = PromptedT5(
        BACKBONE, METHODS["mpt"].make(values, config), FixedPrompt(jnp.asarray(ROWS[2:]))
    )
    weights = Distances(kl=0.7, hidden=0.3, temperature=2.0)
    plain_grads, plain = gradients(model, packed, 1, by=by)
    grads, sums = gradients(model, packed, 1, weights, by=by)

    own = ROWS[0][None] * np.matmul(values["left"], values["right"])
    rows = [[dataclasses.replace(one, prompt=one.task + 2 * of)] for one in taught for of in (0, 1)]
    alone = tiny.make_batch(rows, 20, 8, 1)
    bank = [SoftPrompt(jnp.asarray(rows)) for rows in (*own, *ROWS[2:])]
    logits_BTV, encoded_BSD, decoded_BTD = by_hand(bank, alone)
    kl = hidden = 0.0
    for n in range(len(taught)):
        counts = np.asarray(alone.loss_weights_BT[2 * n])
        shares = np.exp(logits_BTV[2 * n : 2 * n + 2] / 2)
        student_TV, teacher_TV = shares / shares.sum(-1, keepdims=True)
        kl_T = (teacher_TV * np.log(teacher_TV / student_TV)).sum(-1)
        there = np.asarray(alone.encoder_segments_BS[2 * n]) > 0
        encoder = ((encoded_BSD[2 * n] - encoded_BSD[2 * n + 1])[there] ** 2).mean()
        hidden_T = ((decoded_BTD[2 * n] - decoded_BTD[2 * n + 1]) ** 2).mean(-1) + encoder
        each = counts / counts.sum()
        kl, hidden = kl + (each * kl_T).sum(), hidden + (each * hidden_T).sum()
    np.testing.assert_allclose(sums["distil_logits"][0], 0.7 * kl, rtol=1e-5)
    np.testing.assert_allclose(sums["distil_hidden"][0], 0.3 * hidden, rtol=1e-5)
    np.testing.assert_allclose(sums["task_loss"], plain["loss"], rtol=1e-6)
    want = plain["loss"][0] + 0.7 * kl + 0.3 * hidden
    np.testing.assert_allclose(sums["loss"][0], want, rtol=1e-5)
    assert plain["distil_logits"] == plain["distil_hidden"] == 0
    assert trees.flatten(grads).keys() == {f"method/{name}" for name in values}
    for name in values:
        apart = np.asarray(grads["method"][name]) - np.asarray(plain_grads["method"][name])
        assert np.all(np.abs(apart).reshape(len(apart), -1).max(1) > 1e-4), name


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


def test_a_mixture_with_a_teacher_for_each_task_goes_on_to_the_bit(world: World, tmp_path: Path):
    """MPT's source training; parts of the loss are logged, and teachers belong to the run."""
    teachers = {name: str(source_of(world, name)) for name in ("one", "three")}
    options = [*OPTIONS, mixture_of(world, one=1.0, three=1.0), "method.name=mpt",
               f"distil.teachers={json.dumps(teachers)}", "distil.temperature=2"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(world.load(whole, *options))
    train(world.load(broken, *options, "train.steps=2"))
    with pytest.raises(UserError, match=r"was trained with distil\.hidden 1\.0, now 0"):
        train(world.load(broken, *options, "distil.hidden=0"))
    train(world.load(broken, *options))
    assert_same_end(whole, broken)
    for record in records(whole):
        if "loss" in record:
            parts = [record[name] for name in steps.LOSS_PARTS]
            assert min(parts) > 0 and sum(parts) == pytest.approx(record["loss"], rel=1e-5)
    for message, option in {
        r"has a prompt of one, the tasks of the run are one, three": [
            f"distil.teachers={json.dumps({'one': teachers['one']})}"
        ],
        r"distil\.prompt is the only teacher of a run": [f"distil.prompt={teachers['one']}"],
        r"distil\.kl is 0\.0 and distil\.hidden 0\.0": ["distil.kl=0", "distil.hidden=0"],
        r"has 4 slots, the run's method mpt 3": ["method.length=3"],
        r"distil teaches prompts": ["tune=model", "method={name: soft}"],
    }.items():
        with pytest.raises(UserError, match=message):
            train(world.load(tmp_path / "run", *options, *option))


def test_a_sweep_of_prompts_with_and_without_a_teacher(world: World, tmp_path: Path):
    """Each as its own run, whatever teaches the others; the table keeps them apart."""
    teacher = str(source_of(world, "teacher"))
    taught = [{}, {"teachers": {"tiny": teacher}}]
    options = [*OPTIONS, "train.steps=2", f"sweep.distil={json.dumps(taught)}"]
    plan = load_sweep(world.config, [*options, f"output_dir={tmp_path / 'sweep'}"])
    settings = sweep(plan).settings
    assert [len(one.scores) for one in settings] == [1, 1]
    assert settings[0].name == "distil none" and teacher in settings[1].name
    for number, run in enumerate(plan.runs):
        together, own = Path(run.config.output_dir), tmp_path / str(number)
        train(dataclasses.replace(run.config, output_dir=str(own)))
        np.testing.assert_allclose(losses(together), losses(own), rtol=1e-5)
        left, right = (load_artifact(place / "prompt").values for place in (together, own))
        np.testing.assert_allclose(left["prompt"], right["prompt"], atol=1e-5)
        for record in records(together):
            if "loss" in record:
                added = record["distil_logits"], record["distil_hidden"]
                assert [value > 0 for value in added] == [number > 0, number > 0]
    swept = load_sweep(world.config, [f'sweep.distil.prompt=["", "{teacher}"]', *OPTIONS])
    assert swept.runs[0].name == "prompt-none" and swept.runs[1].config.distil.prompt == teacher


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
        assert one.options.distil.squared == pytest.approx(0.1 * scale) and 0 < scale <= 1
        assert one.teacher is not None
        np.testing.assert_array_equal(one.teacher, prompt.values["prompt"][None])
    assert not make_trainee("", config, backbone).options.distil


def test_a_plan_has_the_teachers_forward_pass_and_no_backward(world: World, tmp_path: Path):
    """Its files need not be there: shapes are enough, also of the sources of attempt."""
    mesh, shape = make_mesh(1, 1), StepShape(2, 40, 8, 2, 4)
    attempt = ["method.name=attempt", "method.sources=[nowhere]"]
    several = ["distil.teachers={a: nowhere, b: nowhere}"]
    kinds = {"bare": [], "taught": ["distil.prompt=nowhere"], "several": several,
             "attempt": attempt}  # fmt: skip
    flops = {
        name: matmul_flops(
            abstract_step(world.load(tmp_path, *options), CONFIG, mesh, shape).traced.jaxpr
        )
        for name, options in kinds.items()
    }
    # forward, and gradients of activations: twice the forward pass without its attention
    assert 1.2 < flops["taught"] / flops["bare"] < 1.5
    assert flops["several"] / flops["taught"] < 1.01  # each segment has one of them
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
