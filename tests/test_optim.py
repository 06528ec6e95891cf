"""Recipes against an independent numpy transcription of T5X's Adafactor, and schedules by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprompt.optim import (
    SCHEDULES,
    OptimConfig,
    learning_rate_at,
    make_optimizer,
    resolve,
    state_shardings,
)
from jaxprompt.recipes import RECIPES, describe
from jaxprompt.typing import UserError


def t5x_adafactor(param, grads, rate, *, start_step, weight_decay, parameter_scale, factored):
    """T5X's Adafactor of one tensor (Shazeer & Stern 2018, algorithms 4 and 5) in float64.

    Only the decay is float32 as there: at step 1.1M that rounds the mixing rate by up to 0.2 %.
    """
    param = param.astype(np.float64)
    large = sorted(param.shape)[-2:]
    factored = factored and len(large) == 2 and min(large) >= 128
    v = row = column = 0.0
    for number, grad in enumerate(grads):
        grad = grad.astype(np.float64)
        decay = np.float32(1) - np.float32(start_step + number + 1) ** np.float32(-0.8)
        mixing = float(np.float32(1) - decay)
        square = grad**2 + 1e-30
        if factored:
            assert param.ndim == 2
            row = float(decay) * row + mixing * square.mean(axis=1, keepdims=True)
            column = float(decay) * column + mixing * square.mean(axis=0, keepdims=True)
            v = row * column / row.mean()
        else:
            v = float(decay) * v + mixing * square
        update = grad / np.sqrt(v)
        update = update / max(1.0, math.sqrt(np.mean(update**2)))
        scale = max(math.sqrt(np.mean(param**2)), 1e-3) if parameter_scale else 1.0
        param = (1 - weight_decay) * param - rate * scale * update
    return param


def gradients(shape, steps, seed=0, spread=1.5):
    draw = np.random.default_rng(seed)
    scales = draw.lognormal(sigma=spread, size=steps)
    return [(draw.normal(size=shape) * scale).astype(np.float32) for scale in scales]


def run(config, param, grads, total_steps=30_000, path=("prompt",)):
    optimizer = make_optimizer(config, total_steps)
    update = jax.jit(optimizer.update)
    params = jnp.asarray(param)
    for name in reversed(path):
        params = {name: params}
    state = optimizer.init(params)
    for grad in grads:
        tree = jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(grad)])
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(jax.tree.leaves(params)[0]), state


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("paper", (100, 96)),
        ("paper", (150, 130)),
        ("google-oss", (100, 96)),
        ("google-oss", (150, 130)),
        ("model-tuning", (64, 128)),
        ("model-tuning", (128, 192)),
        ("model-tuning", (40,)),
    ],
)
def test_twenty_steps_equal_t5x(name, shape):
    recipe = RECIPES[name]
    param = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    grads = gradients(shape, 20)
    ours, _ = run(OptimConfig(recipe=name), param, grads)
    theirs = t5x_adafactor(
        param,
        grads,
        recipe.learning_rate,
        start_step={"google-oss": 1_100_000}.get(name, 0),
        weight_decay=1e-5 if name in ("paper", "google-oss") else 0.0,
        parameter_scale=name == "model-tuning",
        factored=name != "paper",
    )
    np.testing.assert_allclose(ours, theirs, atol=4e-6, rtol=2e-6)
    assert np.abs(theirs - param).max() > 10 * 4e-6


def test_the_two_starts_differ():
    param, grads = np.zeros((5, 8), np.float32), gradients((5, 8), 20)
    paper, _ = run(OptimConfig(recipe="paper"), param, grads)
    oss, _ = run(OptimConfig(recipe="google-oss"), param, grads)
    assert np.abs(paper - oss).max() > 0.1


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_google_oss_updates_have_rms_of_the_rate(steps):
    """With gradients of one distribution its clip acts in every step, as the original's did."""
    grads = gradients((10, 16), steps, seed=3, spread=0.0)
    config = OptimConfig(recipe="google-oss", weight_decay=0.0)
    before, _ = run(config, np.zeros((10, 16), np.float32), grads[:-1])
    after, _ = run(config, np.zeros((10, 16), np.float32), grads)
    assert math.sqrt(np.mean((after - before) ** 2)) == pytest.approx(0.3, rel=1e-5)


def test_first_update_of_the_paper_is_the_rate_times_the_sign():
    grad = gradients((10, 16), 1)[0]
    first, _ = run(
        OptimConfig(recipe="paper", weight_decay=0.0), np.zeros((10, 16), np.float32), [grad]
    )
    np.testing.assert_allclose(first, -0.3 * np.sign(grad), rtol=1e-6)


@pytest.mark.parametrize(("name", "rate"), [("paper", 1.0), ("google-oss", 1.0), ("adamw", 0.01)])
def test_weight_decay(name, rate):
    """Adafactor takes the fraction off as it is, AdamW times the learning rate."""
    param = np.full((4, 4), 1000.0, np.float32)
    config = OptimConfig(
        recipe=name, learning_rate=0.01, weight_decay=0.5, schedule="constant", warmup_steps=0
    )
    after, _ = run(config, param, [np.zeros((4, 4), np.float32)])
    np.testing.assert_allclose(after, 1000.0 * (1 - 0.5 * rate), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "length", "is_factored"),
    [
        ("paper", 100, False),
        ("paper", 150, False),
        ("google-oss", 100, False),
        ("google-oss", 150, True),
    ],
)
def test_when_the_second_moment_is_factored(name, length, is_factored):
    optimizer = make_optimizer(OptimConfig(recipe=name), 10)
    state = jax.eval_shape(optimizer.init, {"prompt": jnp.zeros((length, 768))})
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert (max(sizes) < length * 768) == is_factored


def test_adamw_by_hand():
    """Kingma & Ba 2015 with decoupled decay, warm-up of a tenth and linear decay."""
    param = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    grads = gradients((3, 5), 20)
    ours, _ = run(OptimConfig(recipe="adamw"), param, grads, total_steps=20)
    mean, square, theirs = 0.0, 0.0, param.astype(np.float64)
    for number, grad in enumerate(grads):
        rate = 0.3 * min((number + 1) / 2, 1.0) * (1 - max(number - 2, 0) / 18)
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad.astype(np.float64) ** 2
        direction = (mean / (1 - 0.9 ** (number + 1))) / (
            np.sqrt(square / (1 - 0.999 ** (number + 1))) + 1e-8
        )
        theirs = theirs - rate * (direction + 1e-5 * theirs)
    np.testing.assert_allclose(ours, theirs, atol=5e-5)  # optax: 1 - 0.999 ** t in float32


@pytest.mark.parametrize("name", RECIPES)
def test_layers_of_a_stacked_leaf_are_treated_alone(name):
    config = OptimConfig(recipe=name, clip_norm=0.0)
    param = np.random.default_rng(2).normal(size=(3, 4, 6)).astype(np.float32)
    param *= np.asarray([0.01, 1.0, 30.0], np.float32)[:, None, None]
    grads = gradients((3, 4, 6), 4)
    stacked, _ = run(config, param, grads, path=("encoder", "layers", "mlp"))
    for layer in range(3):
        alone, _ = run(config, param[layer], [grad[layer] for grad in grads])
        np.testing.assert_allclose(stacked[layer], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_bank_by_vmap_equals_separate_runs(name):
    optimizer = make_optimizer(OptimConfig(recipe=name, clip_norm=0.5), 50)
    params = {"prompt": jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 6)), jnp.float32)}
    state = jax.vmap(optimizer.init)(params)
    for grad in gradients((3, 4, 6), 3):
        updates, state = jax.vmap(optimizer.update)({"prompt": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    start = np.random.default_rng(2).normal(size=(3, 4, 6)).astype(np.float32)
    for index in range(3):
        alone, _ = run(
            OptimConfig(recipe=name, clip_norm=0.5),
            start[index],
            [grad[index] for grad in gradients((3, 4, 6), 3)],
            total_steps=50,
        )
        np.testing.assert_allclose(params["prompt"][index], alone, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimConfig(recipe="adamw", clip_norm=1.0, epsilon=1.0)
    optimizer = make_optimizer(config, 100)
    params = {"a": jnp.zeros((2,)), "b": {"c": jnp.zeros((2,))}}
    grads = {"a": jnp.asarray([30.0, 0.0]), "b": {"c": jnp.asarray([0.0, 40.0])}}
    small = jax.tree.map(lambda leaf: leaf / 50.0, grads)
    clipped, _ = optimizer.update(grads, optimizer.init(params), params)
    unclipped, _ = optimizer.update(small, optimizer.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), clipped, unclipped)
    assert jax.tree.structure(clipped) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("linear", 5, [0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 6, [1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1, 1, 0.853553, 0.5, 0.146447]),
        ("rsqrt", 4, [1, 1, 1, 1, *((4 / step) ** 0.5 for step in range(5, 11))]),
    ],
)
def test_schedules_on_host_and_in_the_update(schedule, warmup, expected):
    config = OptimConfig(
        recipe="adamw", learning_rate=2.0, schedule=schedule, warmup_steps=warmup, weight_decay=0.0
    )
    host = [learning_rate_at(config, 10, step) for step in range(10)]
    np.testing.assert_allclose(host, 2.0 * np.asarray(expected), rtol=1e-5)
    ones = np.ones((1, 1), np.float32)
    params = [
        run(config, 0 * ones, [ones] * steps, total_steps=10)[0].item() for steps in (0, 1, 4)
    ]
    assert -params[1] == pytest.approx(host[0], rel=1e-5)
    assert -params[2] == pytest.approx(sum(host[:4]), rel=1e-5)
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "rsqrt"}


def test_the_schedule_survives_its_end():
    config = OptimConfig(recipe="adamw", schedule="linear")
    assert learning_rate_at(config, 10, 10) == learning_rate_at(config, 10, 99) == 0.0


def test_a_recipe_shortens_its_own_warmup_but_not_the_users():
    assert learning_rate_at(OptimConfig(recipe="pretrain"), 100, 9) == pytest.approx(2e-2)
    assert learning_rate_at(OptimConfig(recipe="pretrain", warmup_steps=50), 100, 9) < 5e-3
    with pytest.raises(UserError, match="warmup_steps is 100 and the run has 100 steps"):
        make_optimizer(OptimConfig(warmup_steps=100), 100)


def test_configuration_overrides_the_recipe_and_nothing_else():
    assert resolve(OptimConfig(recipe="paper")) == RECIPES["paper"]
    changed = resolve(OptimConfig(recipe="paper", learning_rate=0.1, weight_decay=0.0))
    assert changed == dataclasses.replace(RECIPES["paper"], learning_rate=0.1, weight_decay=0.0)
    recipe_fields = {field.name for field in dataclasses.fields(RECIPES["paper"])}
    assert {field.name for field in dataclasses.fields(OptimConfig)} - {"recipe"} < recipe_fields


def test_the_two_prompt_recipes_differ_where_paper_and_code_do():
    paper, oss = RECIPES["paper"], RECIPES["google-oss"]
    assert (paper.steps, oss.steps) == (30_000, 50_000)
    assert (paper.batch_size, oss.batch_size) == (32, 128)
    assert (paper.dropout, oss.dropout) == (0.0, 0.1)
    assert (paper.start_step, oss.start_step) == (0, 1_100_000)
    assert (paper.init_low, oss.init_low, paper.init_high, oss.init_high) == (-0.5, 0.0, 0.5, 0.5)
    assert (paper.z_loss, oss.z_loss) == (0.0, 1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_says_what_it_is_in_one_line(name):
    line = describe(name)
    assert line.startswith(f"{name}: ") and "\n" not in line
    assert RECIPES[name].source in line
    moved, _ = run(OptimConfig(recipe=name), np.ones((2, 3), np.float32), gradients((2, 3), 2))
    assert np.isfinite(moved).all() and np.abs(moved - 1).max() > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OptimConfig(recipe="papr"), "optim.recipe is 'papr' (did you mean paper?)"),
        (OptimConfig(schedule="cosin"), "optim.schedule is 'cosin' (did you mean cosine?)"),
        (OptimConfig(optimizer="sgd"), "optim.optimizer is 'sgd'"),
        (OptimConfig(learning_rate=-0.1), "optim.learning_rate is -0.1; it should be above 0"),
        (OptimConfig(learning_rate=math.nan), "optim.learning_rate is nan"),
        (OptimConfig(weight_decay=1.0), "optim.weight_decay is 1.0"),
        (OptimConfig(clip_norm=-1.0), "optim.clip_norm is -1.0"),
    ],
)
def test_wrong_values_are_named(config, words):
    with pytest.raises(UserError) as caught:
        make_optimizer(config, 10)
    assert words in str(caught.value)


def test_no_steps_is_an_error():
    with pytest.raises(UserError, match="0 steps"):
        make_optimizer(OptimConfig(), 0)


def test_state_lies_as_its_parameters():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"mlp": {"wo": jax.device_put(jnp.zeros((4, 6)), split)}}
    optimizer = make_optimizer(OptimConfig(recipe="adamw", clip_norm=1.0), 10)
    shardings = state_shardings(optimizer, params)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    specs = [(leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(state)]
    assert specs.count(((4, 6), split.spec)) == 2
    assert all(spec == jax.sharding.PartitionSpec() for shape, spec in specs if shape == ())
