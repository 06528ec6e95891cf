"""The training step: what it changes, what it must not compute, and what it equals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jaxprompt import sharding, steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.planning.flops import equations
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.steps import StepOptions, TrainState
from jaxprompt.t5.config import Compute
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.model import T5
from jaxprompt.typing import Batch, Candidates

CONFIG = tiny.CONFIG
SLOTS, ROWS = 3, 8
EXAMPLES = tiny.make_examples(11, SLOTS)
LOOP = Compute(scan_unroll=1)  # compiles fastest
SGD = optax.sgd(1.0)


def make_batch(rows: int = ROWS) -> Batch:
    """Rows of one and two segments and one of padding; targets of 1 to 3 tokens."""
    packed = [
        EXAMPLES[0:2],
        EXAMPLES[2:3],
        EXAMPLES[3:5],
        EXAMPLES[5:6],
        EXAMPLES[6:7],
        EXAMPLES[7:9],
    ]
    return tiny.make_batch([*packed, EXAMPLES[9:], []][:rows], encoder=17, decoder=7, segments=2)


def make_parts(trained: Any = trees.PromptParam) -> tuple[Any, dict, dict]:
    prompt = np.random.default_rng(3).normal(size=(SLOTS, CONFIG.d_model))
    model = PromptedT5(
        T5(CONFIG, tiny.make_params(), LOOP), SoftPrompt(jnp.asarray(prompt, jnp.float32))
    )
    return trees.split(model, trained)


GRAPHDEF, TRAINED, FROZEN = make_parts()


@functools.cache
def compiled(options: StepOptions) -> Any:
    """The step with SGD of rate 1: the update is minus the gradient."""
    return jax.jit(functools.partial(steps.train_step, GRAPHDEF, [SGD], options))


def gradient(options: StepOptions, batch: Batch) -> tuple[np.ndarray, dict[str, Any]]:
    state, metrics = compiled(options)(steps.init_state(TRAINED, [SGD], [0]), FROZEN, batch)
    return TRAINED["method"]["prompt"] - state.trained["method"]["prompt"], metrics


ADAMW = optax.adamw(0.3, weight_decay=0.1)
adamw_step = jax.jit(
    functools.partial(steps.train_step, GRAPHDEF, [ADAMW], StepOptions()), donate_argnums=0
)


def adamw_state() -> TrainState:
    return steps.init_state(jax.tree.map(jnp.copy, TRAINED), [ADAMW], [0])


@functools.cache
def log_probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every word at every position of `make_batch`, and the log-normalisers."""
    logits = jax.jit(functools.partial(steps.logits, GRAPHDEF))(TRAINED, FROZEN, make_batch())
    return np.asarray(jax.nn.log_softmax(logits)), np.asarray(jax.nn.logsumexp(logits, axis=-1))


def of_examples(values_BT: np.ndarray) -> list[np.ndarray]:
    """The values at the target tokens of each example of `make_batch`."""
    batch = make_batch()
    return [
        values_BT[b][batch.decoder_segments_BT[b] == g + 1]
        for b, g in zip(*np.nonzero(batch.example_index_BG >= 0), strict=True)
    ]


def losses_of_examples(z_loss: float = 0.0) -> list[np.ndarray]:
    log_p, log_z = log_probabilities()
    picked = np.take_along_axis(log_p, make_batch().targets_BT[..., None], -1)[..., 0]
    return of_examples(z_loss * log_z**2 - picked)


def test_only_the_trained_tree_changes_and_only_the_state_is_donated():
    before = jax.tree.map(np.array, FROZEN)
    state = adamw_state()
    for _ in range(3):
        previous = state
        state, _ = adamw_step(state, FROZEN, make_batch())
        assert previous.trained["method"]["prompt"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, FROZEN, before)
    assert (state.trained["method"]["prompt"] != TRAINED["method"]["prompt"]).all()
    assert state.step == 3


def test_a_train_state_holds_no_backbone():
    """Prompt and two moments of it; the rest are scalars."""
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(adamw_state()))
    assert sizes == [1, 1, 1, 1, *[SLOTS * CONFIG.d_model] * 3]


def weight_shaped_outputs(
    graphdef: Any, trained: dict, frozen: dict
) -> list[tuple[str, tuple[int, ...]]]:
    """Matmuls and scatters of the step whose result has the sizes of a kernel, in any order."""
    specs = trees.flatten(param_specs(CONFIG))
    shapes = {
        tuple(sorted(spec.shape[1:] if "layers" in path else spec.shape))
        for path, spec in specs.items()
        if len(spec.shape) > 1 and "scale" not in path
    }
    state = steps.init_state(trained, [SGD], [0])
    step = functools.partial(steps.train_step, graphdef, [SGD], StepOptions())
    program = jax.make_jaxpr(step)(state, frozen, make_batch())
    return [
        (equation.primitive.name, equation.outvars[0].aval.shape)
        for equation, _ in equations(program)
        if equation.primitive.name in ("dot_general", "scatter-add")
        and tuple(sorted(equation.outvars[0].aval.shape)) in shapes
    ]


def test_no_weight_gradient_is_computed():
    assert weight_shaped_outputs(GRAPHDEF, TRAINED, FROZEN) == []


def test_full_tuning_does_compute_weight_gradients():
    """The same reading of the program finds every kernel's gradient where there is one."""
    found = weight_shaped_outputs(*make_parts(...))
    kernels = [path for path in trees.flatten(param_specs(CONFIG)) if path.endswith("kernel")]
    assert len([name for name, _ in found if name == "dot_general"]) >= len(kernels)
    assert ("scatter-add", (CONFIG.vocab_size, CONFIG.d_model)) in found


def test_by_tokens_the_loss_is_the_mean_over_target_tokens():
    losses = losses_of_examples()
    _, metrics = gradient(StepOptions(), make_batch())
    np.testing.assert_allclose(metrics["loss"], np.concatenate(losses).mean(), rtol=1e-5)
    assert metrics["tokens"] == len(np.concatenate(losses))
    assert metrics["examples"] == len(losses) == len(EXAMPLES)


BY_EXAMPLES = StepOptions(loss_by="examples", z_loss=0.01)


def test_by_examples_the_loss_is_the_mean_over_examples_of_their_means():
    _, metrics = gradient(BY_EXAMPLES, make_batch())
    want = np.mean([losses.mean() for losses in losses_of_examples(z_loss=0.01)])
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_the_update_is_the_gradient_of_the_loss():
    """Against a central difference along the gradient."""
    grad, metrics = gradient(StepOptions(), make_batch())
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(grad), rtol=1e-5)

    def loss(shift: float) -> float:
        trained = {"method": {"prompt": TRAINED["method"]["prompt"] + shift * grad}}
        state = steps.init_state(trained, [SGD], [0])
        return float(compiled(StepOptions())(state, FROZEN, make_batch())[1]["loss"][0])

    width = 0.01 / metrics["grad_norm"].item()
    slope = (loss(width) - loss(-width)) / (2 * width)
    np.testing.assert_allclose(slope, np.sum(grad**2), rtol=1e-2)


def test_accumulation_equals_the_full_batch():
    """Microbatches of unequal numbers of examples, one of them with a row of padding."""
    want, want_metrics = gradient(BY_EXAMPLES, make_batch())
    got, metrics = gradient(dataclasses.replace(BY_EXAMPLES, accumulate=4), make_batch())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics, want_metrics)


def test_a_batch_of_padding_changes_nothing():
    empty = tiny.make_batch([[]] * ROWS, encoder=17, decoder=7, segments=2)
    grad, metrics = gradient(StepOptions(), empty)
    np.testing.assert_array_equal(grad, np.zeros_like(grad))
    assert metrics["loss"] == 0 and metrics["tokens"] == 0


def test_dropout_depends_on_seed_and_step_alone():
    options = StepOptions(dropout_rate=0.2)

    def loss(seed: int, step: int) -> float:
        state = steps.init_state(TRAINED, [SGD], [seed])
        state = dataclasses.replace(state, step=jnp.int32(step))
        return float(compiled(options)(state, FROZEN, make_batch())[1]["loss"][0])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


def test_one_trace_for_each_batch_shape():
    """A step's own output must look like its input, or the second step would be traced anew."""
    traces = 0

    def counted(state: TrainState, frozen: dict, batch: Batch) -> Any:
        nonlocal traces
        traces += 1
        return steps.train_step(GRAPHDEF, [ADAMW], StepOptions(), state, frozen, batch)

    run = jax.jit(counted)
    state = adamw_state()
    for rows in (2, 4, 2, 4, 2):
        state, _ = run.eval_shape(state, FROZEN, make_batch(rows))
    assert traces == 2


# After two steps of AdamW, from the first run of this test. It may change only with a change of the
# model, the loss, the optimizer's formula or this file's weights and batch, never in a refactoring.
GOLDEN_LOSS = 4.403328
GOLDEN_FIRST_SLOT = [1.394939, -2.757921, 0.983281, -1.078075]


def test_golden_step():
    state = adamw_state()
    for _ in range(2):
        state, metrics = adamw_step(state, FROZEN, make_batch())
    np.testing.assert_allclose(metrics["loss"], GOLDEN_LOSS, rtol=1e-4)
    got = state.trained["method"]["prompt"][0, :4]
    np.testing.assert_allclose(got, GOLDEN_FIRST_SLOT, rtol=1e-3)


def test_a_mesh_computes_what_one_device_does():
    """Rows over 2, heads, mlp and vocabulary over 4 simulated devices; microbatches on top."""
    want, want_metrics = gradient(StepOptions(), make_batch())
    mesh = sharding.make_mesh(data=2, model=4)
    shardings = sharding.tree_shardings(mesh, param_specs(CONFIG))
    frozen = jax.device_put(FROZEN, {"backbone": {"params": shardings}})
    state = jax.device_put(
        steps.init_state(TRAINED, [SGD], [0]), NamedSharding(mesh, PartitionSpec())
    )
    rows = sharding.shard_batch(mesh, make_batch())
    state, metrics = compiled(StepOptions(accumulate=2))(state, frozen, rows)
    got = TRAINED["method"]["prompt"] - np.asarray(state.trained["method"]["prompt"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), metrics, want_metrics)
    assert state.trained["method"]["prompt"].sharding.is_fully_replicated


def test_eval_step_sums_over_examples():
    losses, batch = losses_of_examples(), make_batch()
    right = of_examples(np.argmax(log_probabilities()[0], -1) == batch.targets_BT)
    run = jax.jit(functools.partial(steps.eval_step, GRAPHDEF, StepOptions(loss_by="examples")))
    sums = run(TRAINED, FROZEN, batch)
    np.testing.assert_allclose(sums["loss"], sum(loss.mean() for loss in losses), rtol=1e-5)
    assert sums["units"] == sums["examples"] == len(EXAMPLES)
    assert sums["tokens"] == sum(map(len, losses))
    assert sums["right"] == np.concatenate(right).sum()
    assert sums["exact"] == sum(example.all() for example in right)


target_log_likelihood = jax.jit(functools.partial(steps.target_log_likelihood, GRAPHDEF))


def test_log_likelihood_of_targets_is_summed_by_segment():
    batch = make_batch()
    got = target_log_likelihood(TRAINED, FROZEN, batch)
    assert got.shape == (ROWS, 2) and got.dtype == jnp.float32
    want = [-losses.sum() for losses in losses_of_examples()]
    np.testing.assert_allclose(got[batch.example_index_BG >= 0], want, rtol=1e-5)


def test_candidate_scores_are_the_likelihoods_of_the_answers():
    """Three candidates; the second example of a row lacks the last of them."""
    answers = [[7], [8, 9], [10, 11, 12]]
    rows = [EXAMPLES[0:2], EXAMPLES[2:3], *[[]] * (ROWS - 2)]
    asked = [
        tiny.make_batch(
            [[dataclasses.replace(example, target=answer) for example in row] for row in rows],
            encoder=17, decoder=7, segments=2,
        )
        for answer in answers
    ]  # fmt: skip
    stacked = {
        field.name: np.stack([getattr(b, field.name.replace("_C", "_")) for b in asked])
        for field in dataclasses.fields(Candidates)
    }
    stacked["loss_weights_CBT"][2][asked[2].decoder_segments_BT == 2] = 0
    program = jax.jit(functools.partial(steps.candidate_scores, GRAPHDEF))
    got = np.asarray(program(TRAINED, FROZEN, asked[0], Candidates(**stacked)))
    want = np.stack([target_log_likelihood(TRAINED, FROZEN, batch) for batch in asked], axis=-1)
    want[0, 1, 2] = want[1:, 1] = want[2:] = -np.inf
    np.testing.assert_allclose(got, want, rtol=1e-5)
